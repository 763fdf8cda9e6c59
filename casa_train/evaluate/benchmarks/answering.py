"""The answers of an export to a benchmark: left-padded batches of questions of one size.

The batches follow from the questions alone, and each is answered by one rank as a whole: what is
rounded in a batch is the same on any number of ranks and after any interruption, and so are the
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.kept import KeptAnswers
from casa_train.evaluate.benchmarks.protocols import Task
from casa_train.evaluate.benchmarks.reading import Benchmark
from casa_train.evaluate.exact_match import generate_answers
from casa_train.export.loading import side_of_tokens
from casa_train.modeling.image_sources import ImageError

READERS = 4
"""Threads that decode and resize pictures."""
AHEAD = 2
"""Batches whose pictures are read before their turn."""


def batches_of(benchmark: Benchmark, processor: Any, size: int) -> list[list[int]]:
    """The questions in batches, the largest pictures first: what memory does not hold fails at
    once. Questions whose picture's header says that it cannot be used are in none.
    """
    keys = []
    for index, found in enumerate(benchmark.sizes):
        if not isinstance(found, ImageError):
            tokens = processor.image_processor.token_count(*found)
            keys.append((-tokens, -len(benchmark.questions[index].text), index))
    order = [index for *_, index in sorted(keys)]
    return [order[start : start + size] for start in range(0, len(order), size)]


@dataclass(frozen=True)
class Asker:
    """An export that is asked, with its model on the device."""

    model: Any
    processor: Any

    def answer(
        self,
        benchmark: Benchmark,
        task: Task,
        batches: Sequence[Sequence[int]],
        kept: KeptAnswers,
        done: Callable[[int], object],
    ) -> None:
        """Answers batches and keeps every one as it comes.

        :param batches: of questions' numbers; see `batches_of`.
        :param done: told of each batch how many questions it had.
        :raises UserError: a batch that memory does not hold, or a disk that takes no more.
        """
        for batch, pictures in _read_ahead(benchmark, batches, self._load):
            records: dict[int, dict[str, Any]] = {}
            asked: dict[int, Tensor] = {}
            for index, picture in zip(batch, pictures, strict=True):
                if isinstance(picture, ImageError):
                    records[index] = {"error": str(picture)}
                else:
                    asked[index] = picture
            answers = self._generate(benchmark, task, asked) if asked else []
            for index, answer in zip(asked, answers, strict=True):
                records[index] = {"answer": answer}
            kept.add([{"index": benchmark.rows[index], **records[index]} for index in batch])
            done(len(batch))

    def _load(self, data: bytes) -> Tensor:
        pixels: Tensor = self.processor.image_processor.load(data)
        return pixels

    def _generate(self, benchmark: Benchmark, task: Task, asked: Mapping[int, Tensor]) -> list[str]:
        """:param asked: by a question's number, its picture."""
        conversations = [
            [user_turn(picture, task.prompt(benchmark.questions[index]))]
            for index, picture in asked.items()
        ]
        try:
            return generate_answers(
                self.model, self.processor, conversations, len(asked), task.max_new_tokens
            )
        except torch.OutOfMemoryError as error:
            side = side_of_tokens(self.processor)
            tokens = sum(picture[0].numel() for picture in asked.values()) // side**2
            raise UserError(
                f"{benchmark.name}: a batch of {len(asked)} questions ({tokens:,} image tokens) "
                f"does not fit in memory: {str(error).splitlines()[0]}. Name a smaller "
                "--batch-size or --image-size; the answers so far are kept, but belong to this "
                "batch size."
            ) from error


def user_turn(picture: Any, prompt: str) -> dict[str, Any]:
    """The turn that asks: the picture, then the text."""
    content = [{"type": "image", "image": picture}, {"type": "text", "text": prompt}]
    return {"role": "user", "content": content}


def _read_ahead(
    benchmark: Benchmark,
    batches: Sequence[Sequence[int]],
    load: Callable[[bytes], Tensor],
) -> Iterator[tuple[Sequence[int], list[Tensor | ImageError]]]:
    """Batches with their pictures, which threads read while the model answers earlier ones."""

    def picture(index: int) -> Tensor | ImageError:
        try:
            return load(benchmark.picture(index))
        except ImageError as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        waiting: list[tuple[Sequence[int], list[Future[Tensor | ImageError]]]] = []
        try:
            for batch in batches:
                waiting.append((batch, [pool.submit(picture, index) for index in batch]))
                if len(waiting) > AHEAD:
                    first, futures = waiting.pop(0)
                    yield first, [future.result() for future in futures]
            for first, futures in waiting:
                yield first, [future.result() for future in futures]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
