"""Atomic checkpoints: write, hash, rename; validate, fall back, prune.

Every rank writes into `step_N.tmp/`, the files are hashed into a manifest, everything is flushed to
disk, and one rename makes the checkpoint exist. At start the newest checkpoint whose every byte
matches its manifest is taken; broken ones are renamed to `step_N.broken` and named.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from casa_train.errors import UserError
from casa_train.files import sha256, sync_directory, sync_file, write_atomic

MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step_(\d+)$")


@dataclass(frozen=True)
class Found:
    """A valid checkpoint: its directory and what was saved beside the engine's state."""

    step: int
    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    :param directory: holds `step_N/` directories; on a file system all ranks see.
    :param fingerprints: identify configuration and data; stored with every checkpoint.
    :param say: prints one line for the user (rank 0).
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        keep_every: int,
        fingerprints: dict[str, str],
        say: Callable[[str], None],
    ) -> None:
        self.directory = directory
        self.keep_last, self.keep_every = keep_last, keep_every
        self.fingerprints = fingerprints
        self.say = say
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Commits one checkpoint; collective.

        :param write: writes this rank's engine state into the given directory.
        :param state: JSON-able state that is the same on every rank.
        :raises UserError: the step was saved already, which only another job on it can have done.
        """
        temporary = self.directory / f"step_{step}.tmp"
        final = self.directory / f"step_{step}"
        if final.exists():
            raise UserError(
                f"{final} exists already, so another job writes into this run; expected to be the "
                "only one. Stop the other one."
            )
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        _barrier()
        write(temporary)
        torch.save(rng_state(), temporary / f"rng_{self.rank}.pt")
        if self.rank == 0:
            (temporary / STATE).write_text(json.dumps({"step": step, **state}))
        _barrier()
        entries = _gather(self._hash_share(temporary, sync=True))
        if self.rank == 0:
            manifest = {
                "step": step,
                "world_size": self.world,
                "fingerprints": self.fingerprints,
                "files": dict(sorted(pair for share in entries for pair in share.items())),
            }
            write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
            os.rename(temporary, final)
            sync_directory(self.directory)
        _barrier()
        if self.rank == 0:
            self._prune()
        return final

    def latest(self) -> Found | None:
        """The newest valid checkpoint, None where none was ever saved; collective.

        :raises UserError: checkpoints exist, but none is valid.
        """
        if self.rank == 0:
            for leftover in self.directory.glob("step_*.tmp"):
                self.say(f"removing unfinished checkpoint {leftover.name}")
                shutil.rmtree(leftover)
        _barrier()
        steps = self.steps()
        broken: list[str] = []
        for step in reversed(steps):
            path = self.directory / f"step_{step}"
            problems = [p for share in _gather(self._problems(path)) for p in share]
            if not problems:
                return _found(step, path)
            broken.append(f"{path.name}: {problems[0]}")
            if self.rank == 0:
                self.say(f"checkpoint {path.name} is broken ({problems[0]}); trying an older one")
                target = self.directory / f"{path.name}.broken"
                shutil.rmtree(target, ignore_errors=True)
                os.rename(path, target)
            _barrier()
        older = sorted(p.name for p in self.directory.glob("step_*.broken"))
        if broken or older:
            raise UserError(
                f"{self.directory} holds checkpoints, but none is valid "
                f"({'; '.join(broken) or older}). "
                "Restore one from a backup, or start over with checkpoint.resume=never."
            )
        return None

    def load_rng(self, found: Found) -> None:
        """Restores this rank's random number generators."""
        path = found.path / f"rng_{self.rank}.pt"
        set_rng_state(torch.load(path, weights_only=False))

    def read(self, step: int) -> Found | None:
        """The checkpoint of one step, None if it is not valid; changes nothing, not collective."""
        path = self.directory / f"step_{step}"
        problems = self._problems(path)
        if problems:
            self.say(f"checkpoint {path.name} is broken ({problems[0]})")
            return None
        return _found(step, path)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        names = [STEP_NAME.match(path.name) for path in self.directory.glob("step_*")]
        return sorted(int(match.group(1)) for match in names if match)

    def _hash_share(self, directory: Path, sync: bool) -> dict[str, dict[str, Any]]:
        """Size and sha256 of this rank's share of the files."""
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        share = {}
        for path in files[self.rank :: self.world]:
            if sync:
                sync_file(path)
            share[str(path.relative_to(directory))] = {
                "bytes": path.stat().st_size,
                "sha256": sha256(path),
            }
        return share

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            files = sorted(manifest["files"].items())
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{MANIFEST} is missing or unreadable ({type(error).__name__})"]
        problems = []
        if path.name != f"step_{manifest.get('step')}" or STATE not in manifest["files"]:
            problems.append(f"{MANIFEST} is that of step {manifest.get('step')}, or lacks {STATE}")
        for name, entry in files[self.rank :: self.world]:
            file = path / name
            if not file.is_file():
                problems.append(f"{name} is missing")
            elif file.stat().st_size != entry["bytes"]:
                size = file.stat().st_size
                problems.append(f"{name} has {size} bytes, expected {entry['bytes']}")
            elif sha256(file) != entry["sha256"]:
                problems.append(f"{name} does not match its sha256")
        return problems

    def _prune(self) -> None:
        """Deletes what no longer has to be kept; runs only after a newer commit."""
        steps = self.steps()
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                shutil.rmtree(self.directory / f"step_{step}")


def _found(step: int, path: Path) -> Found:
    manifest = json.loads((path / MANIFEST).read_text())
    return Found(step, path, json.loads((path / STATE).read_text()), manifest)


def rng_state() -> dict[str, Any]:
    """States of python's, numpy's and torch's generators, CUDA's included."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def seed_all(seed: int) -> None:
    """Seeds the generators that `rng_state` saves."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's too


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _gather(value: Any) -> Sequence[Any]:
    """The value of every rank, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered
