"""After the first real step: did everything that should train get a gradient and move, and nothing
else?
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Protocol

from torch import Tensor, nn

from casa_train.errors import UserError

FINAL_STEP = 10  # from here on no gradient may be all zero


class AuditedEngine(Protocol):
    """What the audit needs of an engine; every method is collective."""

    @property
    def module(self) -> nn.Module: ...

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None: ...

    def full_parameter(self, parameter: nn.Parameter) -> Tensor: ...


class Audit:
    """Watches one optimiser step; every tensor is compared byte by byte through a digest.

    :param zero_at_start: whether a parameter's gradient may be all zero on the first step.
    """

    def __init__(self, engine: AuditedEngine, zero_at_start: Callable[[str], bool]) -> None:
        self.engine = engine
        self.zero_at_start = zero_at_start
        self._before: dict[str, str] = {}
        self._without_gradient: set[str] = set()
        self.done = False

    @property
    def waiting(self) -> int:
        """Tensors that had an all-zero gradient, by design, when last looked at."""
        return len(self._without_gradient)

    def before_update(self, step: int) -> None:
        """Call after the step's last backward and before its update.

        :raises UserError: a trainable tensor without gradient, or a frozen one with gradient.
        """
        problems = []
        self._without_gradient = set()
        for name, parameter in self._parameters():
            if not parameter.requires_grad:
                if parameter.grad is not None:
                    problems.append(f"frozen {name} received a gradient")
                continue
            gradient = self.engine.full_gradient(parameter)
            if gradient is not None and bool(gradient.any()):
                continue
            self._without_gradient.add(name)
            if step >= FINAL_STEP or not self.zero_at_start(name):
                state = "no gradient" if gradient is None else "an all-zero gradient"
                problems.append(f"trainable {name} got {state}")
        self._report(step, problems)
        self._before = {n: self._digest(p) for n, p in self._parameters()}

    def after_update(self, step: int) -> str:
        """Call after the update; returns the verdict as one line.

        :raises UserError: a trainable tensor that stayed, or a frozen one that moved.
        """
        problems = []
        trained = frozen = 0
        for name, parameter in self._parameters():
            moved = self._digest(parameter) != self._before[name]
            if parameter.requires_grad:
                trained += 1
                if not moved and name not in self._without_gradient:
                    problems.append(f"trainable {name} did not move")
            else:
                frozen += 1
                if moved:
                    problems.append(f"frozen {name} moved")
        self._report(step, problems)
        self._before = {}
        self.done = True
        later = f" ({self.waiting} start at zero gradient by design)" if self.waiting else ""
        return (
            f"audit of step {step}: {trained} trainable tensors got a gradient and moved{later}, "
            f"{frozen} frozen ones did not"
        )

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.engine.module.named_parameters()

    def _digest(self, parameter: nn.Parameter) -> str:
        value = self.engine.full_parameter(parameter).detach().float().cpu().contiguous()
        return hashlib.blake2b(value.numpy().tobytes(), digest_size=16).hexdigest()

    def _report(self, step: int, problems: list[str]) -> None:
        if problems:
            shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
            raise UserError(
                f"audit of step {step} failed for {len(problems)} tensors: {shown}. What trains "
                "is set "
                "by model.backbone.trainable, model.vision.train_last_blocks and fusion; "
                "trainer.audit=false turns this check off."
            )
