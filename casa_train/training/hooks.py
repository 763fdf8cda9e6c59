"""What watches the loop: small objects with the same methods, in one list.

The list itself, its order and the reasons for it stand in `train.build_run`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from casa_train.metrics.sinks.base import Record
from casa_train.training.state import Progress


@dataclass(frozen=True)
class Leave:
    """A hook's word that the run has to leave after this step, the same on every rank."""

    reason: str


class Hook:
    """Watches a run. Every rank calls the same hooks in the same order, so they may be collective.

    What a hook does not define does nothing. Three methods go beyond begin, step, save and close:
    gradients can only be looked at in `before_update`; an export has to say in `after_failed_save`
    that it stays what it was; and `after_step` can answer `Leave`, since validation must not be
    begun by a run whose time is up.
    """

    def begin(self, progress: Progress) -> None:
        """Before the first step; what fails here is closed, too.

        :param progress: where the run stands, now and later.
        """

    def before_update(self, step: int, rates: Mapping[str, float], pairs: float) -> None:
        """After the last backward pass of a step, before its update.

        :param rates: of each parameter group.
        :param pairs: samples of the step, over all ranks, with images and answers.
        """

    def after_step(self, record: Record) -> bool | Leave:
        """After a step: whether it is to be saved.

        :return: `Leave` saves the step, asks no hook further down the list, and ends the run.
        """
        return False

    def after_save(self, step: int) -> None:
        """A checkpoint of the step was committed."""

    def after_failed_save(self, step: int) -> None:
        """A disk refused the checkpoint of the step."""

    def close(self, reason: str | None) -> None:
        """The run ends, whatever became of it.

        :param reason: why before its last step; None after that one.
        """


class Hooks:
    """The hooks of a run as one: asked in order, closed in reverse."""

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self.hooks = list(hooks)
        self._begun: list[Hook] = []

    def begin(self, progress: Progress) -> None:
        for hook in self.hooks:
            self._begun.append(hook)
            hook.begin(progress)

    def before_update(self, step: int, rates: Mapping[str, float], pairs: float) -> None:
        for hook in self.hooks:
            hook.before_update(step, rates, pairs)

    def after_step(self, record: Record) -> tuple[bool, str | None]:
        """Whether the step is to be saved, and why the run leaves after it, if it does."""
        wanted = False
        for hook in self.hooks:
            answer = hook.after_step(record)
            if isinstance(answer, Leave):
                return True, answer.reason
            wanted = wanted or answer
        return wanted, None

    def after_save(self, step: int) -> None:
        for hook in self.hooks:
            hook.after_save(step)

    def after_failed_save(self, step: int) -> None:
        for hook in self.hooks:
            hook.after_failed_save(step)

    def close(self, reason: str | None) -> None:
        """Closes those that began, the last one first; one that fails keeps none from it."""
        with contextlib.ExitStack() as stack:
            for hook in self._begun:
                stack.callback(hook.close, reason)
            self._begun = []


def described(error: BaseException) -> str:
    """An exception as the reason why a run ended: its kind and its first line."""
    first = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
