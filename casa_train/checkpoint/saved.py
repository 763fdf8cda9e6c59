"""One checkpoint as it lies in a directory: its name, its manifest, its state."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_train.checkpoint.frozen import FrozenFile

MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step_(\d+)$")
# What reading a damaged manifest may raise.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError)


@dataclass(frozen=True)
class SavedCheckpoint:
    """A valid checkpoint: its directory and what was saved beside the engine's state.

    :param frozen: the file of its frozen weights; None where nothing is frozen, and in older ones,
        which hold theirs themselves.
    """

    step: int
    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]
    frozen: FrozenFile | None


def saved_steps(directory: Path) -> list[int]:
    """Steps that have a checkpoint in a run's directory of them, oldest first."""
    names = [STEP_NAME.match(path.name) for path in directory.glob("step_*")]
    return sorted(int(match.group(1)) for match in names if match)


def frozen_of(manifest: dict[str, Any]) -> FrozenFile | None:
    """The file of frozen weights that a checkpoint refers to; older ones hold theirs themselves."""
    entry = manifest.get("frozen")
    return FrozenFile(**entry) if entry is not None else None


def open_saved(step: int, path: Path) -> SavedCheckpoint:
    """A checkpoint whose files were found whole."""
    manifest = json.loads((path / MANIFEST).read_text())
    state = json.loads((path / STATE).read_text())
    return SavedCheckpoint(step, path, state, manifest, frozen_of(manifest))
