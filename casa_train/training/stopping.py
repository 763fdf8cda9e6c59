"""The hook that lets all ranks leave after the same step."""

from __future__ import annotations

from typing import Protocol

from casa_train.distributed.ranks import Ranks
from casa_train.metrics.sinks.base import Record
from casa_train.training.hooks import Hook, Leave


class StopFlags(Protocol):
    """Whether this process was asked to stop, and whether its time is nearly up."""

    def flags(self) -> tuple[bool, bool]: ...


class Stopping(Hook):
    """A signal to any rank, or the time of any rank: all leave after the same step.

    :param stop: asked once a step, but not after the last of `steps`.
    """

    def __init__(self, stop: StopFlags, ranks: Ranks, steps: int) -> None:
        self.stop, self.ranks, self.steps = stop, ranks, steps

    def after_step(self, record: Record) -> bool | Leave:
        if record["step"] >= self.steps:
            return False
        signalled, late = self.ranks.sum([float(flag) for flag in self.stop.flags()])
        if signalled:
            return Leave("signal")
        return Leave("max_hours") if late else False
