"""The loop: fetch, forward, backward, step, report. Nothing about files or flags."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from casa_train.data.transfer import to_device
from casa_train.distributed.ranks import gather_rows, sum_over_ranks
from casa_train.errors import SaveError, UserError
from casa_train.metrics.counts import Batch, StepCounts, count_step
from casa_train.metrics.meter import Meter
from casa_train.metrics.sinks.base import Record, Sink
from casa_train.training.audit import Audit
from casa_train.training.loss import answer_losses


class Loader(Protocol):
    """Gives the micro-batches of a step and knows its consumed position."""

    def next_step(self) -> Sequence[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...


class TrainingEngine(Protocol):
    """A sharded model with its optimiser."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def forward(self, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def step_applied(self) -> bool: ...

    def gradient_norm(self) -> float: ...

    def save(self, directory: Path) -> Any: ...


@dataclass
class Progress:
    """Counters that a checkpoint carries."""

    step: int = 0
    answer_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    samples: int = 0
    bad_samples: int = 0
    left_out: int = 0
    skipped_steps: int = 0


class SourceLosses:
    """Loss and answer tokens by source, summed on the device until somebody asks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    def add(self, losses: Tensor, sources: Sequence[tuple[str, int]]) -> None:
        """:param losses: (A,) of one micro-step; :param sources: (name, answer tokens) in order."""
        parts = losses.split([tokens for _, tokens in sources])
        for (name, tokens), part in zip(sources, parts, strict=True):
            total = part.double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._tokens[name] = self._tokens.get(name, 0) + tokens

    def forget(self) -> None:
        self._sums, self._tokens = {}, {}

    def collect(self, gather: Callable[[Any], Sequence[Any]]) -> dict[str, dict[str, float]]:
        """Over all ranks, and starts anew."""
        local = {name: (float(self._sums[name]), self._tokens[name]) for name in self._sums}
        self.forget()
        total: dict[str, list[float]] = {}
        for rank in gather(local):
            for name, (loss, tokens) in rank.items():
                entry = total.setdefault(name, [0.0, 0])
                entry[0] += loss
                entry[1] += tokens
        return {
            name: {"loss": loss / max(1, tokens), "answer_tokens": tokens}
            for name, (loss, tokens) in sorted(total.items())
        }


@dataclass
class Trainer:
    """Runs optimiser steps until `steps`.

    :param set_rates: applies the schedule of a step; returns the rate of each group.
    :param save: commits a checkpoint of the engine with this JSON state.
    :param quarantine: called with the failed samples of this rank.
    :param gather: the value of every rank, in rank order.
    :param stop_flags: asked once a step: was this process asked to stop, is its time nearly up?
    :param beat: called whenever something went forward; a watchdog listens.
    :param collect: called after each step; may collect garbage.
    :param validate: called after each step; whether it is to be saved: the best so far.
    :param max_skipped: so many steps without finite numbers in a row end the run.
    :param meter: measures time, memory and work of this rank.
    :param source_every: steps between two records of the loss of every source.
    """

    engine: TrainingEngine
    loader: Loader
    device: torch.device
    world: int
    steps: int
    save_every: int
    max_bad_share: float
    set_rates: Callable[[int], dict[str, float]]
    save: Callable[[int, Callable[[Path], Any], dict[str, Any]], Any]
    quarantine: Callable[[Sequence[Any]], None]
    gather: Callable[[Any], Sequence[Any]]
    sinks: Sequence[Sink]
    audit: Audit | None = None
    progress: Progress = field(default_factory=Progress)
    stop_flags: Callable[[], tuple[bool, bool]] = lambda: (False, False)
    heartbeat: Callable[[], None] = lambda: None
    collect: Callable[[int], None] = lambda step: None
    validate: Callable[[int], bool] = lambda step: False
    max_skipped: int = 5
    source_every: int = 10
    meter: Meter = field(default_factory=Meter)
    _skipped_in_a_row: int = 0
    _by_source: SourceLosses = field(default_factory=lambda: SourceLosses())

    def run(self) -> str | None:
        """Trains to the last step; saves on the way and at the end.

        :return: why it left early, the same on every rank; None after the last step.
        """
        trained = self.progress.step < self.steps
        while self.progress.step < self.steps:
            record = self.train_step(self.progress.step + 1)
            for sink in self.sinks:
                sink.write(record)
            self.heartbeat()
            step = self.progress.step
            self.collect(step)
            reason = self._stop_reason() if step < self.steps else None
            # Who has to leave saves at once; the run's next life validates then.
            best = reason is None and self.validate(step)
            if best or step % self.save_every == 0 or step == self.steps or reason is not None:
                self._save(step, leaving=reason is not None)
                self.heartbeat()
            if reason is not None:
                return reason
        if trained and self.audit is not None and self.audit.first_step is None:
            self._say(
                "the audit did not run: no step that was taken had a non-zero rate and an image "
                "with answers"
            )
        bad, good = self.progress.bad_samples, self.progress.samples
        if bad:
            self._say(
                f"{bad} of {bad + good} samples could not be used; the quarantine files in the run "
                "directory name them"
            )
        if self.progress.left_out:
            self._say(
                f"{self.progress.left_out} samples exceeded the budgets and were left out; to keep "
                "them raise data.text_tokens or data.image_tokens, or lower data.max_pixels"
            )
        return None

    def _save(self, step: int, leaving: bool) -> None:
        """A checkpoint; before the last step, a disk may refuse it.

        :raises SaveError: the last step's could not be written.
        """
        state = {"progress": vars(self.progress), "data": self.loader.state_dict()}
        try:
            self.save(step, self.engine.save, state)
        except SaveError as error:
            if step == self.steps:
                raise
            hope = "" if leaving else " Training goes on; the next save tries again."
            self._say(f"warning: {error}{hope}")
        else:
            self._say(f"saved checkpoint of step {step}")

    def _stop_reason(self) -> str | None:
        """A signal to any rank, or the time of any rank: all ranks leave after the same step."""
        local = [float(flag) for flag in self.stop_flags()]
        signalled, late = sum_over_ranks(local, self.device)
        return "signal" if signalled else "max_hours" if late else None

    def train_step(self, step: int) -> Record:
        """One optimiser step over all ranks and micro-steps; returns its record."""
        self.meter.begin()
        batches = self.loader.next_step()
        self.meter.data_arrived()
        counts = self._count(batches)
        rates = self.set_rates(step)
        answers = max(1.0, counts.totals["answer_tokens"])
        losses = torch.zeros((), dtype=torch.float64, device=self.device)
        audit = self.audit
        if audit is not None and not audit.due(step, rates, counts.totals["pairs"]):
            audit = None
        for i, batch in enumerate(batches):
            # Targets too, now: after the forward pass the host would wait for all of it.
            inputs, targets = to_device(batch.inputs, batch.targets, self.device)
            with self.meter.forward():
                logits = self.engine.forward(packed=inputs).logits
            each = answer_losses(logits, targets)
            loss = each.sum()
            losses += loss.detach()
            self._by_source.add(each.detach(), batch.answer_sources)
            self.engine.backward(loss * (self.world / answers))
            if audit is not None and i == len(batches) - 1:
                audit.before_update(rates)
            self.engine.step()
        if audit is not None:
            verdict = audit.after_update(step, self.engine.step_applied())
            if verdict is not None:
                self._say(verdict)
        rows = gather_rows([float(losses), *self.meter.measured()], self.device)
        loss_sum = sum(row[0] for row in rows)
        gradient_norm = self.engine.gradient_norm()
        finite = math.isfinite(loss_sum) and math.isfinite(gradient_norm)
        applied = self.engine.step_applied()
        self._watch_anomalies(step, finite and applied, batches, loss_sum / answers, gradient_norm)
        self.progress.step = step
        return {
            "step": step,
            "loss": loss_sum / answers if finite and counts.totals["answer_tokens"] else None,
            "gradient_norm": gradient_norm if finite else None,
            "skipped": not applied,
            "rates": rates,
            **counts.record(),
            "bad_samples": self.progress.bad_samples,
            "left_out": self.progress.left_out,
            **self.meter.record([row[1:] for row in rows], counts.operations, counts.totals),
            **self._sources(step),
        }

    def _sources(self, step: int) -> Record:
        """Mean loss and answer tokens by source since the last such record, now and then."""
        if step % self.source_every and step != self.steps:
            return {}
        return {"sources": self._by_source.collect(self.gather)}

    def _watch_anomalies(
        self, step: int, good: bool, batches: Sequence[Batch], loss: float, norm: float
    ) -> None:
        """Counts steps that were left out because their numbers are not finite.

        :raises UserError: too many in a row.
        """
        if good:
            self._skipped_in_a_row = 0
            return
        self.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._by_source.forget()
        ranks = self.gather([i for batch in batches for i in batch.sample_ids])
        ids = [i for rank in ranks for i in rank]
        self._say(
            f"step {step} was skipped: loss {loss}, gradient norm {norm}; weights stay as they "
            f"were. Its samples: {ids[:12]}"
        )
        if self._skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"step {step}: the numbers of {self._skipped_in_a_row} steps in a row were not "
                f"finite (loss {loss}, gradient norm {norm}); expected finite numbers. Lower the "
                "learning rates (optim.groups), or look at the samples of the last step: "
                f"{ids[:12]}"
            )

    def _count(self, batches: Sequence[Batch]) -> StepCounts:
        """Counts of the step over all ranks; also checks the share of bad samples."""
        counts = count_step(batches, self.device)
        total = counts.totals
        progress = self.progress
        for name in vars(progress).keys() & total.keys():
            setattr(progress, name, getattr(progress, name) + int(total[name]))
        self.quarantine([failure for b in batches for failure in b.failures])
        seen = progress.samples + progress.bad_samples
        nothing = total["bad_samples"] > 0 and total["samples"] == 0
        if nothing or (seen >= 1000 and progress.bad_samples > self.max_bad_share * seen):
            raise UserError(
                f"{progress.bad_samples} of {seen} samples could not be used"
                + (", and none of this step's" if nothing else "")
                + f"; expected at most a share of data.max_bad_share = {self.max_bad_share}. See "
                "the quarantine files in the run directory, mend the data, or raise the limit."
            )
        return counts

    def _say(self, line: str) -> None:
        for sink in self.sinks:
            sink.log(line)
