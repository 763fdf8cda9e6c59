"""Validations of a run: when they are, what they record, and which was the best.

A record of validation.jsonl holds `step`; `loss` and `exact_match` over all held-out answers and by
source (see `held_out.score`); `questions`, the answers to the fixed questions; `benchmarks` by name
(see `AskedBenchmark.measure`); `best_step` and `best_loss` so far; `samples_digest`, which
identifies the held-out samples; and `seconds`; with `evaluation.attention_while_training` also
`attention` (see `WatchedSamples.measure`). Where benchmarks alone are measured, there are no
losses, no questions and no best: a benchmark's score never makes a step the best.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from casa_train.config.schema import Config
from casa_train.distributed.random_state import rng_state, set_rng_state
from casa_train.distributed.ranks import Ranks
from casa_train.evaluate.attention_while_training import WatchedSamples
from casa_train.evaluate.benchmarks.table import figure
from casa_train.evaluate.held_out import score
from casa_train.evaluate.measured import Measured
from casa_train.evaluate.questions import Questions
from casa_train.metrics.sinks.base import Record, Sink
from casa_train.metrics.sinks.jsonl import JsonlSink, keep_steps, read_metrics
from casa_train.training.hooks import Hook
from casa_train.training.state import Progress


class EvaluatedEngine(Protocol):
    """A model that can be run without training it."""

    def forward(self, **inputs: Any) -> Any: ...

    def evaluating(self) -> AbstractContextManager[None]: ...


class Proceeds(Protocol):
    """What goes on in the background if it is asked now and then."""

    def proceed(self) -> None: ...


@dataclass
class Best:
    """The lowest validation loss so far."""

    step: int = 0
    loss: float | None = None

    def takes(self, step: int, loss: float | None) -> bool:
        """Whether this one is the best now."""
        if loss is None or (self.loss is not None and loss >= self.loss):
            return False
        self.step, self.loss = step, loss
        return True


class Validator(Hook):
    """Measures the model of a run every few steps, and after the last one; every rank calls it.

    Training goes on as if nothing had been: the random generators are put back, no gradient is
    touched, and no data of training is read.

    :param measured: what is measured.
    :param path: of validation.jsonl, where the first rank keeps the records.
    :param sinks: take every record, and lines for the user.
    :param best: the best validation so far, for others to read.
    :param heartbeat: called whenever something went forward.
    :param exports: go on meanwhile.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: EvaluatedEngine,
        measured: Measured,
        path: Path,
        sinks: Sink,
        best: Best,
        heartbeat: Callable[[], None] = lambda: None,
        exports: Proceeds | None = None,
    ) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.measured, self.path = measured, path
        self.sinks, self.best = sinks, best
        self.heartbeat, self.exports = heartbeat, exports
        self._file: JsonlSink | None = None

    def begin(self, progress: Progress) -> None:
        """Says what is measured, and validates if an earlier attempt of the run owes it.

        Records of steps that come again are dropped.
        """
        held_out = self.measured.held_out
        # A split that one rank cannot read ends all: none waits for it in the first validation.
        self.questions, self.watched = self.ranks.agree(self._read_samples)
        for text in describe(self.measured, self.questions, self.config):
            self.sinks.log(text)
        if self.watched is not None:
            left_out = f" (left out: {dict(self.watched.skipped)})" if self.watched.skipped else ""
            self.sinks.log(
                f"attention to images is measured on {len(self.watched.samples)} of them{left_out}"
            )
        earlier: list[Record] = []
        if self.ranks.first:
            keep_steps(self.path, progress.step)
            earlier = read_metrics(self.path) if self.path.exists() else []
            self._file = JsonlSink(self.path, self.sinks.log)
        changed = sorted({name for record in earlier for name in self.measured.others(record)})
        if changed:
            self.sinks.log(
                f"evaluation.benchmarks: {', '.join(changed)} was measured otherwise before (other "
                "questions, pictures, protocol or limits): those scores do not compare with what "
                "follows"
            )
        same = [record for record in earlier if self.measured.loss_compares(record)]
        if held_out is not None and any("loss" in r and r not in same for r in earlier):
            self.sinks.log(
                "data.validation or evaluation.ask: other held-out answers were measured before; "
                "those losses and exact matches do not compare with what follows, and the best "
                "begins anew"
            )
        known = [(r["step"], r.get("loss"), self.measured.whole(r)) for r in same]
        known = self.ranks.gather(known)[0]
        for step, loss, _ in known:
            self.best.takes(step, loss)
        # An attempt that was asked to leave at a validation's step left it to the next one.
        done = progress.step
        if done > 0 and self._due(done) and done not in [step for step, _, whole in known if whole]:
            self._validate(done)

    def _read_samples(self) -> tuple[Questions | None, WatchedSamples | None]:
        """What is asked and what is watched, of the held-out samples if there are any."""
        held_out = self.measured.held_out
        if held_out is None:
            return None, None
        watched = self.config.evaluation.attention_while_training
        return (
            Questions(held_out, held_out.materializer.processor, self.config),
            WatchedSamples(held_out, watched) if watched else None,
        )

    def after_step(self, record: Record) -> bool:
        """Validates if it is time to; the best so far is saved if it is to be exported."""
        step = record["step"]
        return self._due(step) and self._validate(step) and self.config.export.best

    def close(self, reason: str | None) -> None:
        if self._file is not None:
            self._file.close()

    def _heartbeat(self) -> None:
        self.heartbeat()
        if self.exports is not None:
            self.exports.proceed()

    def _due(self, step: int) -> bool:
        return step % self.config.evaluation.every == 0 or step == self.config.trainer.steps

    def _validate(self, step: int) -> bool:
        """Whether the step is the best so far."""
        began = time.perf_counter()
        generators = rng_state()
        forward = self.engine.forward
        held_out, scores, answers = self.measured.held_out, {}, []
        attention: dict[str, Any] = {}
        with self.engine.evaluating():
            if held_out is not None and self.questions is not None:
                scores = score(held_out, forward, self.ranks, self._heartbeat)
                answers = self.questions.answer(forward, self.ranks.device, self._heartbeat)
            if self.watched is not None:
                seen = self.watched.measure(forward, self.ranks, self._heartbeat)
                attention["attention"] = seen
            benchmarks = {
                benchmark.name: benchmark.measure(forward, self.ranks, self._heartbeat)
                for benchmark in self.measured.benchmarks
            }
        set_rng_state(generators)
        best = self.best.takes(step, scores.get("loss"))
        if self._file is not None:
            record = {
                "step": step,
                "time": time.time(),
                **scores,
                "best_step": self.best.step,
                "best_loss": self.best.loss,
                "seconds": time.perf_counter() - began,
                "samples_digest": None if held_out is None else held_out.digest,
                "questions": answers,
                **({"benchmarks": benchmarks} if benchmarks else {}),
            }
            self._file.write({**record, **attention})
            self.sinks.validated(record)
            self.sinks.log(line(record))
        return best


def line(record: Record) -> str:
    """A validation in one line."""
    parts = _held_out_parts(record) if "loss" in record else []
    for name, found in (record.get("benchmarks") or {}).items():
        score = "not scored" if found["score"] is None else figure(name, found["score"])
        parts.append(f"{name} {score} of {found['questions']} questions")
        if found["unreadable"]:
            parts[-1] += f" ({found['unreadable']} pictures could not be read)"
    return f"validation of step {record['step']}: {', '.join(parts)}; {record['seconds']:.1f} s"


def _held_out_parts(record: Record) -> list[str]:
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"loss {loss}"]
    if record["exact_match"] is not None:
        parts.append(f"exact match {record['exact_match']:.3f} of {record['answers']} answers")
    if record["bad_samples"]:
        parts.append(f"{record['bad_samples']} samples could not be used")
    if record["best_step"] == record["step"]:
        parts.append("the best so far")
    elif record["best_loss"] is not None:
        parts.append(f"best so far {record['best_loss']:.4f} at step {record['best_step']}")
    return parts


def describe(measured: Measured, questions: Questions | None, config: Config) -> list[str]:
    """What validations will measure, for the start of the run."""
    lines = []
    every, held_out = f"validation every {config.evaluation.every} steps", measured.held_out
    if held_out is not None and questions is not None:
        samples = sum(len(pack.items) for pack in held_out.packs)
        lines.append(
            f"{every}: {samples} held-out samples of {len(held_out.groups)} sources in "
            f"{sum(bool(p.items) for p in held_out.packs)} packs, {len(questions.asked)} questions"
        )
        if questions.skipped:
            lines[-1] += f" (left out: {dict(questions.skipped)})"
        if held_out.last:
            lines[-1] += ", of each the last answer"
        if held_out.left_out:
            lines.append(
                f"evaluation.ask=last: {held_out.left_out} held-out samples are not measured: "
                "their last turn is rated out (data.ratings) or does not fit a pack "
                "(data.text_tokens, data.image_tokens)"
            )
        lines += [
            f"data.validation.{name} is trained, too: what it measures is not held out"
            for name in held_out.trained
        ]
    else:
        lines.append(f"{every}: benchmarks alone, so no step is the best (data.validation)")
    return [*lines, *(text for b in measured.benchmarks for text in b.describe())]
