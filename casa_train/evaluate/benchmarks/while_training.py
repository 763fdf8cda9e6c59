"""A fixed part of a benchmark that the model of a run answers at every validation.

Questions are asked a pack's worth at once, and the batches are dealt to the ranks. They follow from
the questions and the budgets alone, so the answers are the same on any number of ranks; those of an
export of the step under the same protocol are the same but for what is rounded in other batches,
and for answers that `evaluation.max_new_tokens` cuts.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from casa_train.config.schema import BenchmarkConfig, Config
from casa_train.data.budget import Budget
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError, named
from casa_train.evaluate.benchmarks.answering import user_turn
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.reading import Benchmark, read_benchmark, remarks
from casa_train.evaluate.benchmarks.results import join
from casa_train.evaluate.greedy_answers import Decoder
from casa_train.evaluate.held_out import Forward
from casa_train.modeling.image_sources import ImageError
from casa_train.modeling.processing_casa import CasaProcessor

OVER_BUDGET = "more than a pack holds"
STAND_IN = torch.zeros(3, 1, 1, dtype=torch.uint8)  # becomes one image token
"""Stands where a picture cannot be read: its question is asked like the others, so that ranks make
equally many forward passes, and what is answered does not count."""


class AskedBenchmark:
    """What is asked of one benchmark, in which order, and what it comes to.

    :param asked: the configuration's own, for `name`.
    :param processor: of the run; pictures are as large as the protocol has them.
    :param config: of the run.
    :raises UserError: no question can be asked, or too few to score one.
    """

    def __init__(
        self,
        name: str,
        asked: BenchmarkConfig,
        whole: Benchmark,
        processor: CasaProcessor,
        config: Config,
    ) -> None:
        self.name, self.protocol = name, PROTOCOLS[asked.protocol]
        self.task = self.protocol.tasks[name]
        self.benchmark = whole.subset(asked.samples)
        self.remarks = remarks(whole)
        self.own_limit = config.evaluation.max_new_tokens
        self.shown = config.evaluation.questions
        most = min(self.own_limit, self.task.max_new_tokens)
        processor = _of_size(processor, self.protocol.image_size)
        self.decoder = Decoder(processor, Budget.of(config.data), most)
        self.errors: dict[int, str] = {}
        sizes = self._sizes()
        # The largest first, as an evaluation of an export asks: batches are of about one size.
        self.order = sorted(sizes, key=lambda i: (-sizes[i][1], -sizes[i][0], i))
        in_order = [sizes[index] for index in self.order]
        self.batches = [[self.order[p] for p in b] for b in self.decoder.batches(in_order)]
        self.over_budget = sum(error == OVER_BUDGET for error in self.errors.values())
        try:
            self.task.total([self.benchmark.questions[i] for i in self.order], [0.0] * len(sizes))
        except ValueError as error:
            reasons = "; ".join(dict.fromkeys(self.errors.values()))
            raise UserError(
                f"nothing can be scored over {len(self.benchmark.questions)} questions of "
                f"{self.benchmark.place}: {error}{f' ({reasons})' if reasons else ''}. Ask more "
                "questions, raise data.text_tokens and data.image_tokens, or take it out."
            ) from error
        self.digest = self._digest(processor.max_pixels)

    def measure(
        self, forward: Forward, ranks: Ranks, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Asks all of it; every rank calls it and gets the same but for `seconds`.

        :param forward: the model's, in eval mode.
        :param heartbeat: called after each batch.
        :return: `score` in the benchmark's unit and its parts `sub_scores`, None and none where no
            picture could be read; how many `questions` it is over, and how many are not among them
            because their picture is `unreadable` or they are `over_budget`; `protocol`,
            `max_new_tokens`, `revision`; `digest`: scores of different ones do not compare; and
            `answers`, the records of a few questions.
        """
        began = time.perf_counter()
        local: dict[int, dict[str, Any]] = {}
        for start in range(0, len(self.batches), ranks.world):
            mine = start + ranks.rank
            # Whoever has none left asks the smallest batch again, which is the last.
            given = self._answer(self.batches[min(mine, len(self.batches) - 1)], forward, ranks)
            if mine < len(self.batches):
                local |= given
            heartbeat()
        answered: dict[int, dict[str, Any]] = {i: {"error": e} for i, e in self.errors.items()}
        for theirs in ranks.gather(local):
            answered |= theirs
        return {**self._record(answered), "seconds": time.perf_counter() - began}

    def describe(self) -> list[str]:
        """What is asked, for the start of the run."""
        most, limit = self.decoder.max_new_tokens, self.task.max_new_tokens
        ruled = (
            f"evaluation.max_new_tokens; the protocol allows {limit}"
            if most < limit
            else f"the protocol's; evaluation.max_new_tokens allows {self.own_limit}"
        )
        said = (
            f"{self.name}, protocol {self.protocol.name}: {len(self.order)} questions in "
            f"{len(self.batches)} batches, at most {most} new tokens each ({ruled})"
        )
        unreadable = len(self.errors) - self.over_budget
        left_out = {"picture unreadable": unreadable, OVER_BUDGET: self.over_budget}
        reasons = [f"{count} {reason}" for reason, count in left_out.items() if count]
        return [*self.remarks, said + (f"; left out: {', '.join(reasons)}" if reasons else "")]

    def _sizes(self) -> dict[int, tuple[int, int]]:
        """Text and image tokens of what can be asked; says why of the others."""
        sizes = {}
        for index, found in enumerate(self.benchmark.sizes):
            if isinstance(found, ImageError):
                self.errors[index] = str(found)
                continue
            images = self.decoder.processor.image_processor.token_count(*found)
            size = self.decoder.size([self._turn(index, STAND_IN)])[0], images
            if self.decoder.budget.holds(*size):
                sizes[index] = size
            else:
                self.errors[index] = OVER_BUDGET
        return sizes

    def _turn(self, index: int, picture: Any) -> dict[str, Any]:
        return user_turn(picture, self.task.prompt(self.benchmark.questions[index]))

    def _answer(
        self, batch: list[int], forward: Forward, ranks: Ranks
    ) -> dict[int, dict[str, Any]]:
        pictures, errors = [], {}
        for index in batch:
            try:
                pictures.append(self._load(index))
            except ImageError as error:
                errors[index] = {"error": str(error)}
                pictures.append(STAND_IN)
        turns = [[self._turn(i, p)] for i, p in zip(batch, pictures, strict=True)]
        answers = self.decoder.answer(
            forward, turns, ranks.device, ended=lambda own: all(ranks.gather(own))
        )
        return {i: {"answer": a} for i, a in zip(batch, answers, strict=True)} | errors

    def _load(self, index: int) -> torch.Tensor:
        """:raises ImageError: a picture that cannot be used."""
        return self.decoder.processor.image_processor.load(self.benchmark.picture(index))

    def _record(self, answered: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
        benchmark = self.benchmark
        kept = {benchmark.rows[index]: answer for index, answer in answered.items()}
        try:
            records, entry = join(benchmark, self.task, kept)
        except UserError:  # pictures that were there at the start: no reason to end the run
            records, entry = [], {"score": None, "sub_scores": {}}
        errors = sum("error" in answer for answer in answered.values())
        return {
            "score": entry["score"],
            "sub_scores": entry["sub_scores"],
            "questions": len(answered) - errors,
            "unreadable": errors - self.over_budget,
            "over_budget": self.over_budget,
            "protocol": self.protocol.name,
            "max_new_tokens": self.decoder.max_new_tokens,
            "revision": benchmark.revision,
            "digest": self.digest,
            "answers": [
                {
                    "id": f"{self.name}/{record['index']}",
                    "index": record["index"],
                    "question": record["question"],
                    "reference": ", ".join(dict.fromkeys(record["reference"])),
                    "answer": record["answer"],
                    "score": record["score"],
                }
                for record in _spread([r for r in records if "answer" in r], self.shown)
            ],
        }

    def _digest(self, max_pixels: int) -> str:
        prompts = [self.task.prompt(question) for question in self.benchmark.questions]
        limits = [self.decoder.max_new_tokens, max_pixels, sorted(self.order)]
        what = [self.benchmark.revision, self.protocol.name, prompts, *limits]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def open_benchmarks(config: Config, processor: CasaProcessor, ranks: Ranks) -> list[AskedBenchmark]:
    """What `evaluation.benchmarks` names, in the order of the tables; collective.

    :raises UserError: on every rank alike, naming the field.
    """
    asked = config.evaluation.benchmarks if config.evaluation.every else {}
    return [_open(name, config, processor, ranks) for name in BENCHMARKS if name in asked]


def _open(name: str, config: Config, processor: CasaProcessor, ranks: Ranks) -> AskedBenchmark:
    asked = config.evaluation.benchmarks[name]
    field = f"evaluation.benchmarks.{name}"

    def read() -> Benchmark:
        copies = None if asked.source is None else Path(asked.source)
        with named(field):
            return read_benchmark(name, copies, "source=")

    def prepare() -> AskedBenchmark:
        whole = first or read()
        with named(field):
            return AskedBenchmark(name, asked, whole, processor, config)

    first = ranks.first_does(read)  # `datasets` fills its cache once, for all ranks of a machine
    return ranks.agree(prepare)


def _of_size(processor: CasaProcessor, side: int | None) -> CasaProcessor:
    """The same for pictures of at most the pixels of a square; None: it itself."""
    if side is None or side * side == processor.max_pixels:
        return processor
    return CasaProcessor(
        processor.tokenizer,
        side * side,
        processor.template,
        min_pixels=min(processor.min_pixels, side * side),
        token_side=processor.token_side,
    )


def _spread(records: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Some of them, evenly."""
    count = min(count, len(records))
    return [records[k * len(records) // count] for k in range(count)]
