"""Validations of a run: when they are, what they record, and which was the best.

A record of validation.jsonl holds `step`; `loss` and `exact_match` over all held-out answers and by
source (see `held_out.score`); `questions`, the answers to the fixed questions; `best_step` and
`best_loss` so far; `samples_digest`, which identifies what was measured; and `seconds`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from casa_train.config.schema import Config
from casa_train.distributed.random_state import rng_state, set_rng_state
from casa_train.evaluate.held_out import Gather, HeldOut, score
from casa_train.evaluate.questions import Questions
from casa_train.metrics.sinks.base import Record, Sink
from casa_train.metrics.sinks.jsonl import JsonlSink, keep_steps, read_metrics


class EvaluatedEngine(Protocol):
    """A model that can be run without training it."""

    def forward(self, **inputs: Any) -> Any: ...

    def evaluating(self) -> AbstractContextManager[None]: ...


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


class Validator:
    """Measures the model of a run every few steps; every rank calls it.

    Training goes on as if nothing had been: the random generators are put back, no gradient is
    touched, and no data of training is read.

    :param path: of validation.jsonl, where rank 0 keeps the records.
    :param every: steps between two validations; the last step of `steps` is one, too.
    :param done: steps that are trained already: later records are dropped, since those steps come
        again.
    :param gather: the value of every rank, in rank order.
    :param sinks: take every record, and a line for the user (rank 0).
    :param beat: called whenever something went forward.
    """

    def __init__(
        self,
        engine: EvaluatedEngine,
        held_out: HeldOut,
        questions: Questions,
        path: Path,
        every: int,
        steps: int,
        done: int,
        rank: int,
        world: int,
        device: torch.device,
        gather: Gather,
        sinks: Sequence[Sink],
        heartbeat: Callable[[], None],
    ) -> None:
        self.engine, self.held_out, self.questions = engine, held_out, questions
        self.every, self.steps = every, steps
        self.rank, self.world, self.device = rank, world, device
        self.gather, self.sinks, self.heartbeat = gather, sinks, heartbeat
        earlier: list[Record] = []
        self._file: JsonlSink | None = None
        if rank == 0:
            keep_steps(path, done)
            earlier = read_metrics(path) if path.exists() else []
            self._file = JsonlSink(path, self._say)
        known = gather([(r["step"], r["loss"]) for r in earlier if self._comparable(r)])[0]
        self.best = Best()
        for step, loss in known:
            self.best.takes(step, loss)
        # A run that was asked to leave at a validation's step left it to the next one.
        self.owed = done > 0 and self._due(done) and done not in [step for step, _ in known]

    def catch_up(self, step: int) -> bool:
        """The validation that an earlier life of the run owes; whether it is the best so far."""
        owed, self.owed = self.owed, False
        return owed and self._validate(step)

    def __call__(self, step: int) -> bool:
        """Validates if it is time to; whether the step is the best so far."""
        return self._due(step) and self._validate(step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _say(self, line: str) -> None:
        for sink in self.sinks:
            sink.log(line)

    def _due(self, step: int) -> bool:
        return step % self.every == 0 or step == self.steps

    def _comparable(self, record: Record) -> bool:
        return bool(record["samples_digest"] == self.held_out.digest)

    def _validate(self, step: int) -> bool:
        began = time.perf_counter()
        generators = rng_state()
        with self.engine.evaluating():
            scores = score(
                self.held_out,
                self.engine.forward,
                self.rank,
                self.world,
                self.device,
                self.gather,
                self.heartbeat,
            )
            answers = self.questions.answer(self.engine.forward, self.device, self.heartbeat)
        set_rng_state(generators)
        best = self.best.takes(step, scores["loss"])
        if self._file is not None:
            record = {
                "step": step,
                "time": time.time(),
                **scores,
                "best_step": self.best.step,
                "best_loss": self.best.loss,
                "seconds": time.perf_counter() - began,
                "samples_digest": self.held_out.digest,
                "questions": answers,
            }
            self._file.write(record)
            for sink in self.sinks:
                sink.validated(record)
            self._say(line(record))
        return best


def line(record: Record) -> str:
    """A validation in one line."""
    loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
    parts = [f"validation of step {record['step']}: loss {loss}"]
    if record["exact_match"] is not None:
        parts.append(f"exact match {record['exact_match']:.3f} of {record['answers']} answers")
    if record["bad_samples"]:
        parts.append(f"{record['bad_samples']} samples could not be used")
    if record["best_step"] == record["step"]:
        parts.append("the best so far")
    elif record["best_loss"] is not None:
        parts.append(f"best so far {record['best_loss']:.4f} at step {record['best_step']}")
    return ", ".join(parts) + f"; {record['seconds']:.1f} s"


def describe(
    held_out: HeldOut, questions: Questions, config: Config, training: Mapping[str, str]
) -> list[str]:
    """What validations will measure, for the start of the run.

    :param training: fingerprints of the splits that are trained, by name.
    """
    samples = sum(len(pack.items) for pack in held_out.packs)
    lines = [
        f"validation every {config.evaluation.every} steps: {samples} held-out samples of "
        f"{len(held_out.groups)} sources in {sum(bool(p.items) for p in held_out.packs)} packs, "
        f"{len(questions.asked)} questions"
    ]
    if questions.skipped:
        lines[-1] += f" (left out: {dict(questions.skipped)})"
    lines += [
        f"data.validation.{name} is trained, too: what it measures is not held out"
        for name, split in held_out.splits.items()
        if split.fingerprint in training.values()
    ]
    return lines
