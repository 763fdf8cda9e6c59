"""What a start leaves in the run directory when its process has to end at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from casa_train.run.directory import request_requeue
from casa_train.run.starts import StartLog


class Saved(Protocol):
    """Knows the steps that have a checkpoint."""

    def steps(self) -> list[int]: ...


@dataclass(frozen=True)
class LastWords:
    """Says in starts.jsonl why the start left, and asks for the next one from its checkpoint."""

    run_dir: Path
    starts: StartLog
    checkpoints: Saved

    def leave(self, reason: str) -> None:
        """:raises UserError: it cannot be told."""
        self.starts.leave(reason)
        request_requeue(self.run_dir, max(self.checkpoints.steps(), default=0), reason)
