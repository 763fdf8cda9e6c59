"""TensorBoard's event files."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from casa_train.metrics.fields import scalars
from casa_train.metrics.sinks.base import Record


class TensorBoardSink:
    """Every number of a record as a scalar; a resumed run continues the same curves.

    :param after_step: last step of the checkpoint; what was reported behind it is hidden.
    """

    def __init__(self, directory: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only where it is switched on

        self._hook = threading.excepthook
        threading.excepthook = self._note
        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1)

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def validated(self, record: Record) -> None:
        for name, value in scalars({"validation": record}).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def log(self, line: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        try:
            self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _note(self, failed: Any) -> None:
        """The library's thread would print a traceback of what the next write raises anyway."""
        if not type(failed.thread).__module__.startswith("tensorboard."):
            self._hook(failed)
