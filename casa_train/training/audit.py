"""Does everything that should train get a gradient and move, and does nothing else move?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.metrics.sinks.base import Record
from casa_train.setup.lora import zero_gradient_at_start
from casa_train.setup.optim import build_groups
from casa_train.training.hooks import Hook
from casa_train.training.state import Log

FINAL_STEPS = 10  # so many steps after the first look nothing may wait for a gradient any more
PIECE = 1 << 22  # elements that are digested at once
MULTIPLIER = 6364136223846793005  # of Knuth's MMIX generator: odd, so it loses no bit


class AuditedEngine(Protocol):
    """What the audit needs of an engine; every method is collective."""

    @property
    def module(self) -> Any: ...

    def full_gradient(self, parameter: nn.Parameter) -> Tensor | None: ...

    def full_parameter(self, parameter: nn.Parameter) -> Tensor: ...


class Audit(Hook):
    """Looks at one step in which everything can move, and once more if something had to wait.

    A step that is left out, because its numbers are not finite, is none to look at: the next one
    is. Values are compared through digests of their bits. A tensor waits if the mechanism or LoRA
    declares its first gradient zero, or if the rate is too small to change its fp32 values, as in a
    warm-up.

    :param log: is told the verdicts.
    """

    def __init__(self, config: Config, engine: AuditedEngine, log: Log) -> None:
        self.engine, self.log = engine, log
        self.by_design: Callable[[str], bool] = engine.module.mechanism.zero_at_start
        self.steps = config.trainer.steps
        groups = build_groups(engine.module.named_parameters(), config.optim.groups)
        self.groups = {name: group["name"] for group in groups for name in group["names"]}
        self.first_step: int | None = None
        self.waiting: set[str] = set()
        self._before: dict[str, int] = {}
        self._final = False
        # Of the step that is looked at, until it is known whether it was taken.
        self._looking = False
        self._waiting: set[str] = set()
        self._without: set[str] = set()  # a gradient: decay alone may move them
        self._problems: list[str] = []

    def before_update(self, step: int, rates: Mapping[str, float], pairs: float) -> None:
        self._looking = self.due(step, rates, pairs)
        if self._looking:
            self.look(rates)

    def after_step(self, record: Record) -> bool:
        """:raises UserError: see `verdict`."""
        if self._looking:
            line = self.verdict(record["step"], applied=not record["skipped"])
            if line is not None:
                self.log.log(line)
        return False

    def after_save(self, step: int) -> None:
        if step == self.steps and self.first_step is None:
            self.log.log(
                "the audit did not run: no step that was taken had a non-zero rate and an image "
                "with answers"
            )

    def due(self, step: int, rates: Mapping[str, float], pairs: float) -> bool:
        """Whether this step should be looked at.

        :param rates: rate of each group in this step.
        :param pairs: samples of the step, over all ranks, with images and answers.
        """
        if not any(rates.values()) or not pairs:
            return False
        if self.first_step is None:
            return True
        # Or the first step after that one in which everything can move.
        return bool(self.waiting) and not self._final and step >= self.first_step + FINAL_STEPS

    def look(self, rates: Mapping[str, float]) -> None:
        """At all gradients, after the step's last backward and before its update."""
        again = self.first_step is not None
        if not again:
            self._before = {name: self._digest(p) for name, p in self._parameters()}
        self._waiting, self._without, self._problems = set(), set(), []
        for name, parameter in self._parameters():
            if not parameter.requires_grad:
                if parameter.grad is not None:
                    self._problems.append(f"frozen {name} received a gradient")
                continue
            gradient = self.engine.full_gradient(parameter)
            if gradient is None or not bool(gradient.any()):
                if again or not (self.by_design(name) or zero_gradient_at_start(name)):
                    state = "no gradient" if gradient is None else "an all-zero gradient"
                    self._problems.append(f"trainable {name} got {state}")
                self._waiting.add(name)
                self._without.add(name)
            elif not self._can_move(parameter, rates[self.groups[name]]):
                self._waiting.add(name)

    def verdict(self, step: int, applied: bool) -> str | None:
        """After the update: the verdict as one line, None for a step left out.

        :param applied: whether the update took place.
        :raises UserError: a trainable tensor without gradient, a frozen one with gradient, a
            trainable tensor that stayed, or a frozen one that moved.
        """
        if not applied:
            return None
        self._report(step, self._problems)
        if self.first_step is None:
            self.first_step = step
        else:
            self._final = True
        self.waiting = self._waiting
        problems = []
        trained = frozen = 0
        for name, parameter in self._parameters():
            moved = self._digest(parameter) != self._before[name]
            if parameter.requires_grad:
                trained += 1
                if moved and name not in self._without:
                    self.waiting.discard(name)
                elif not moved and name not in self.waiting:
                    problems.append(f"trainable {name} did not move")
            else:
                frozen += 1
                if moved:
                    problems.append(f"frozen {name} moved")
        self._report(step, problems)
        done = trained - len(self.waiting)
        line = (
            f"audit of step {step}: {done} of {trained} trainable tensors got a gradient and "
            f"moved, {frozen} frozen ones did not"
        )
        if self.waiting:
            line += f"; {len(self.waiting)} wait (zero gradient by design, or too small a rate)"
        return line

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        parameters: Iterator[tuple[str, nn.Parameter]] = self.engine.module.named_parameters()
        return parameters

    def _can_move(self, parameter: nn.Parameter, rate: float) -> bool:
        """Whether a step of about `rate`, Adam's first, changes some element in fp32."""
        smallest = float(self.engine.full_parameter(parameter).detach().abs().min())
        return rate > float(np.spacing(np.float32(smallest)))

    def _digest(self, parameter: nn.Parameter) -> int:
        return digest(self.engine.full_parameter(parameter).detach())

    def _report(self, step: int, problems: list[str]) -> None:
        if problems:
            shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
            raise UserError(
                f"audit of step {step} failed for {len(problems)} tensors: {shown}. Expected every "
                "trainable tensor to get a gradient and to move, and no frozen one. What trains is "
                "set by model.backbone.trainable, model.vision.train_last_blocks and fusion; "
                "trainer.audit=false turns this check off."
            )


def digest(value: Tensor) -> int:
    """A number of the bits and places of a tensor's fp32 values, made where the tensor is.

    Integers wrap around, so neither the order of a sum nor the device matters.
    """
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    bits = value.float().contiguous().view(torch.int32).flatten()
    for number, piece in enumerate(bits.split(PIECE)):
        places = torch.arange(len(piece), device=value.device) + (number * PIECE + 1)
        mixed = (piece.long() + 1) * (places * MULTIPLIER)
        total += (mixed ^ (mixed >> 29)).sum()
    return int(total)
