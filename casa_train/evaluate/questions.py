"""A few fixed questions that a model in training answers at every validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.rows import BadRow
from casa_train.evaluate.exact_match import Question, matches, question_of
from casa_train.evaluate.greedy_answers import Decoder
from casa_train.evaluate.held_out import Forward, HeldOut
from casa_train.evaluate.shares import show_image, spread
from casa_train.modeling.image_processing_casa import ImageError
from casa_train.modeling.processing_casa import CasaProcessor


@dataclass(frozen=True)
class Asked:
    """A question, where it stands and how long it is.

    :param messages: as the processor takes it.
    :param size: text tokens with those of the answer, and image tokens.
    """

    question: Question
    messages: list[dict[str, Any]]
    split: str
    row: int
    size: tuple[int, int]


class Questions:
    """Fixed questions: the first turns of samples that show an image there, or with
    `evaluation.ask=last` the last turns of samples that show any, after the turns before them.

    They are in even shares of all sources; as many are answered at once as fit a pack together, and
    one that does not fit alone is left out.

    :ivar skipped: questions that cannot be asked, by reason.
    """

    def __init__(
        self,
        held_out: HeldOut,
        processor: CasaProcessor,
        config: Config,
    ) -> None:
        self.decoder = Decoder(processor, Budget.of(config.data), config.evaluation.max_new_tokens)
        self.skipped: Counter[str] = Counter()
        self.last = held_out.last
        splits = held_out.splits
        candidates = {
            source: show_image(splits[name], rows, self.last)
            for source, (name, rows) in held_out.groups.items()
        }
        asked = [
            self._ask(splits[name], name, row)
            for source, rows in spread(candidates, config.evaluation.questions).items()
            for name in [held_out.groups[source][0]]
            for row in rows
        ]
        self.asked = [a for a in asked if a is not None]

    def answer(
        self, forward: Forward, device: torch.device, heartbeat: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """Greedy answers, one record a question; every rank calls it and asks the same.

        :param forward: the model's, in eval mode.
        :param heartbeat: called after each batch.
        """
        answers: list[str] = []
        for batch in self._batches():
            answers += self.decoder.answer(forward, [a.messages for a in batch], device)
            heartbeat()
        return [
            {
                "id": asked.question.id,
                "source": asked.question.source,
                "split": asked.split,
                "row": asked.row,
                "history": len(asked.question.history),
                "question": asked.question.text,
                "reference": asked.question.reference,
                "answer": answer,
                "correct": matches(answer, asked.question.reference),
            }
            for asked, answer in zip(self.asked, answers, strict=True)
        ]

    def _ask(self, split: Split, name: str, row: int) -> Asked | None:
        try:
            sample = split.read(row)
            question = question_of(f"{name}/{sample.key}", sample, self.last)
            if question is None:
                return None
            messages = question.messages(question.images)
            size = self.decoder.size(messages)
        except (BadRow, ImageError) as error:
            self.skipped[error.reason] += 1
            return None
        if not self.decoder.budget.holds(*size):
            self.skipped["over_budget"] += 1
            return None
        return Asked(question, messages, name, row, size)

    def _batches(self) -> list[list[Asked]]:
        """The questions in order, together as far as the budgets allow."""
        batches = self.decoder.batches([asked.size for asked in self.asked])
        return [[self.asked[place] for place in batch] for batch in batches]
