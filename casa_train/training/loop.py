"""The loop: fetch, forward, backward, step, report. Nothing about files or flags."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from casa_train.config.schema import Config
from casa_train.data.loader import dead_workers_named
from casa_train.data.transfer import to_device
from casa_train.distributed.ranks import Ranks
from casa_train.errors import SaveError, UserError
from casa_train.metrics.counts import Batch, StepCounts, count_step
from casa_train.metrics.sinks.base import Record
from casa_train.metrics.timeline import COPY, LOSS, REST, UPDATE
from casa_train.setup.optim import scheduled_factor, set_rates
from casa_train.training.hooks import Hooks, described
from casa_train.training.loss import answer_losses
from casa_train.training.state import State


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

    def collect(self, ranks: Ranks) -> dict[str, dict[str, float]]:
        """Over all ranks, and starts anew."""
        local = {name: (float(self._sums[name]), self._tokens[name]) for name in self._sums}
        self.forget()
        total: dict[str, list[float]] = {}
        for theirs in ranks.gather(local):
            for name, (loss, tokens) in theirs.items():
                entry = total.setdefault(name, [0.0, 0])
                entry[0] += loss
                entry[1] += tokens
        return {
            name: {"loss": loss / max(1, tokens), "answer_tokens": tokens}
            for name, (loss, tokens) in sorted(total.items())
        }


class Trainer:
    """Runs optimiser steps until the last one that the configuration asks for.

    :param hooks: watch it; see `train.build_run` for their order.
    """

    def __init__(self, config: Config, ranks: Ranks, state: State, hooks: Hooks) -> None:
        self.config, self.ranks, self.state, self.hooks = config, ranks, state, hooks
        self._skipped_in_a_row = 0
        self._by_source = SourceLosses()

    def run(self) -> str | None:
        """Trains to the last step; saves on the way and at the end. The hooks live as long.

        :return: why it left early, the same on every rank; None after the last step.
        """
        try:
            with dead_workers_named(self.ranks.rank):
                self.hooks.begin(self.state.progress)
                reason = self._loop()
        except BaseException as error:
            self.hooks.close(described(error))
            raise
        self.hooks.close(reason)
        return reason

    def _loop(self) -> str | None:
        progress, steps = self.state.progress, self.config.trainer.steps
        while progress.step < steps:
            record = self.train_step(progress.step + 1)
            wanted, reason = self.hooks.after_step(record)
            step = progress.step
            if wanted or step % self.config.checkpoint.every == 0 or step == steps:
                self._save(step, leaving=reason is not None)
            if reason is not None:
                return reason
        self._log_what_was_left_out()
        return None

    def _log_what_was_left_out(self) -> None:
        bad, good = self.state.progress.bad_samples, self.state.progress.samples
        if bad:
            self.state.log.log(
                f"{bad} of {bad + good} samples could not be used; the quarantine files in the run "
                "directory name them"
            )
        if left_out := self.state.progress.left_out:
            self.state.log.log(
                f"{left_out} samples exceeded the budgets and were left out; to keep them raise "
                "data.text_tokens or data.image_tokens, or lower data.max_pixels"
            )

    def _save(self, step: int, leaving: bool) -> None:
        """A checkpoint; before the last step, a disk may refuse it.

        :raises SaveError: the last step's could not be written.
        """
        if self.state.checkpoints is None:
            return
        engine, loader = self.state.engine, self.state.loader
        state = {"progress": vars(self.state.progress), "data": loader.state_dict()}
        try:
            self.state.checkpoints.save(step, engine.save, state)
        except SaveError as error:
            self.hooks.after_failed_save(step)
            if step == self.config.trainer.steps:
                raise
            hope = "" if leaving else " Training goes on; the next save tries again."
            self.state.log.log(f"warning: {error}{hope}")
        else:
            self.state.log.log(f"saved checkpoint of step {step}")
            self.hooks.after_save(step)

    def train_step(self, step: int) -> Record:
        """One optimiser step over all ranks and micro-steps; returns its record."""
        engine, meter, device = self.state.engine, self.state.meter, self.ranks.device
        meter.begin()
        batches = self.state.loader.next_step()
        meter.data_arrived()
        counts = self._count(batches)
        rates = set_rates(engine.param_groups, scheduled_factor(self.config, step))
        answers = max(1.0, counts.totals["answer_tokens"])
        losses = torch.zeros((), dtype=torch.float64, device=device)
        for i, batch in enumerate(batches):
            meter.enter(COPY)
            # Targets too, now: after the forward pass the host would wait for all of it.
            inputs, targets = to_device(batch.inputs, batch.targets, device)
            with meter.forward():
                logits = engine.forward(packed=inputs).logits
            meter.enter(LOSS)
            each = answer_losses(logits, targets)
            loss = each.sum()
            losses += loss.detach()
            self._by_source.add(each.detach(), batch.answer_sources)
            meter.enter(LOSS, backward=True)
            engine.backward(loss * (self.ranks.world / answers))
            meter.enter(REST)
            if i == len(batches) - 1:
                self.hooks.before_update(step, rates, counts.totals["pairs"])
            meter.enter(UPDATE)
            engine.step()
            meter.enter(REST)
        rows = self.ranks.gather_rows([float(losses), *meter.measured()])
        loss_sum = sum(row[0] for row in rows)
        gradient_norm = engine.gradient_norm()
        finite = math.isfinite(loss_sum) and math.isfinite(gradient_norm)
        applied = engine.step_applied()
        self._watch_anomalies(step, finite and applied, batches, loss_sum / answers, gradient_norm)
        self.state.progress.step = step
        return {
            "step": step,
            "loss": loss_sum / answers if finite and counts.totals["answer_tokens"] else None,
            "gradient_norm": gradient_norm if finite else None,
            "skipped": not applied,
            "rates": rates,
            **counts.record(),
            "bad_samples": self.state.progress.bad_samples,
            "left_out": self.state.progress.left_out,
            **meter.record([row[1:] for row in rows], counts.operations, counts.totals),
            **self._sources(step),
        }

    def _sources(self, step: int) -> Record:
        """Mean loss and answer tokens by source since the last such record, now and then."""
        trainer = self.config.trainer
        if step % trainer.log_every and step != trainer.steps:
            return {}
        return {"sources": self._by_source.collect(self.ranks)}

    def _watch_anomalies(
        self, step: int, good: bool, batches: Sequence[Batch], loss: float, norm: float
    ) -> None:
        """Counts steps that were left out because their numbers are not finite.

        :raises UserError: too many in a row.
        """
        if good:
            self._skipped_in_a_row = 0
            return
        self.state.progress.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._by_source.forget()
        ranks = self.ranks.gather([i for batch in batches for i in batch.sample_ids])
        ids = [i for rank in ranks for i in rank]
        self.state.log.log(
            f"step {step} was skipped: loss {loss}, gradient norm {norm}; weights stay as they "
            f"were. Its samples: {ids[:12]}"
        )
        if self._skipped_in_a_row >= self.config.trainer.max_skipped_steps:
            raise UserError(
                f"step {step}: the numbers of {self._skipped_in_a_row} steps in a row were not "
                f"finite (loss {loss}, gradient norm {norm}); expected finite numbers. Lower the "
                "learning rates (optim.groups), or look at the samples of the last step: "
                f"{ids[:12]}"
            )

    def _count(self, batches: Sequence[Batch]) -> StepCounts:
        """Counts of the step over all ranks; also checks the share of bad samples."""
        counts = count_step(batches, self.ranks)
        total = counts.totals
        progress, most = self.state.progress, self.config.data.max_bad_share
        for name in vars(progress).keys() & total.keys():
            setattr(progress, name, getattr(progress, name) + int(total[name]))
        if self.state.quarantine is not None:
            self.state.quarantine.add([failure for b in batches for failure in b.failures])
        seen = progress.samples + progress.bad_samples
        nothing = total["bad_samples"] > 0 and total["samples"] == 0
        if nothing or (seen >= 1000 and progress.bad_samples > most * seen):
            raise UserError(
                f"{progress.bad_samples} of {seen} samples could not be used"
                + (", and none of this step's" if nothing else "")
                + f"; expected at most a share of data.max_bad_share = {most}. See the quarantine "
                "files in the run directory, mend the data, or raise the limit."
            )
        return counts
