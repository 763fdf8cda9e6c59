"""Python's cyclic garbage collector on a schedule: on all ranks after the same steps."""

from __future__ import annotations

import gc
import os

from casa_train.metrics.sinks.base import Record
from casa_train.training.hooks import Hook
from casa_train.training.state import Progress


class ScheduledCollection(Hook):
    """Collects every n-th step, and at no other time.

    Left to itself the collector interrupts one rank here and another there, and all wait for each.
    What exists at the start is set aside, so that a collection looks only at what steps left.

    :param every: steps between two collections; 0 leaves the collector to itself.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def begin(self, progress: Progress) -> None:
        if self.every:
            gc.collect()
            gc.freeze()
            gc.disable()
            os.register_at_fork(after_in_child=gc.enable)  # loader processes have no schedule

    def after_step(self, record: Record) -> bool:
        if self.every and record["step"] % self.every == 0:
            gc.collect()
        return False

    def close(self, reason: str | None) -> None:
        if self.every:
            gc.enable()
            gc.unfreeze()
