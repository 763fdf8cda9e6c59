"""TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path

from casa_train.metrics.fields import scalars
from casa_train.metrics.sinks.base import Record


class TensorBoardSink:
    """Every number of a record as a scalar; a resumed run continues the same curves.

    :param after_step: last step of the checkpoint; what was reported behind it is hidden.
    """

    def __init__(self, directory: Path, after_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # only where it is switched on

        self._writer = SummaryWriter(str(directory), purge_step=after_step + 1)

    def write(self, record: Record) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def validated(self, record: Record) -> None:
        for name, value in scalars({"validation": record}).items():
            self._writer.add_scalar(name, value, record["step"], walltime=record["time"])

    def say(self, line: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._writer.close()
