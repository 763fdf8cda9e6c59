"""The hooks that write down what happens: records of steps, and the attempts of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from casa_train.config.schema import Config
from casa_train.metrics.sinks.base import Record
from casa_train.metrics.sinks.opening import Sinks
from casa_train.training.hooks import Hook
from casa_train.training.state import Progress


class Reporting(Hook):
    """Gives every record to the sinks, which are open between begin and close.

    :param metrics: the file of metrics.jsonl; None: no sinks but those that are open already.
    """

    def __init__(self, config: Config, sinks: Sinks, metrics: Path | None) -> None:
        self.config, self.sinks, self.metrics = config, sinks, metrics

    def begin(self, progress: Progress) -> None:
        if self.metrics is not None:
            self.sinks.open(self.config, self.metrics, progress.step)

    def after_step(self, record: Record) -> bool:
        self.sinks.write(record)
        return False

    def close(self, reason: str | None) -> None:
        self.sinks.close()


class Starts(Protocol):
    """Keeps when a run was started and why each start left; see `run.starts.StartLog`."""

    def begin(self, progress: Any) -> None: ...

    def close(self, reason: str | None) -> None: ...


class Attempt(Hook):
    """Notes when this attempt of the run begins to train, and why it leaves."""

    def __init__(self, starts: Starts) -> None:
        self.starts = starts

    def begin(self, progress: Progress) -> None:
        self.starts.begin(progress)

    def close(self, reason: str | None) -> None:
        self.starts.close(reason)
