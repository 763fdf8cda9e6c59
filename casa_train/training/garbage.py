"""Python's cyclic garbage collector on a schedule: on all ranks after the same steps."""

from __future__ import annotations

import gc
import os


class ScheduledCollection:
    """Collects every n-th step, and at no other time.

    Left to itself the collector interrupts one rank here and another there, and all wait for each.
    What exists at the start is set aside, so that a collection looks only at what steps left.

    :param every: steps between two collections; 0 leaves the collector to itself.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def __enter__(self) -> ScheduledCollection:
        if self.every:
            gc.collect()
            gc.freeze()
            gc.disable()
            os.register_at_fork(after_in_child=gc.enable)  # loader processes have no schedule
        return self

    def after(self, step: int) -> None:
        """Call after every step."""
        if self.every and step % self.every == 0:
            gc.collect()

    def __exit__(self, *exception: object) -> None:
        if self.every:
            gc.enable()
            gc.unfreeze()
