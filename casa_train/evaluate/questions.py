"""A few fixed questions that a model in training answers at every validation."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.rows import BadRow
from casa_train.evaluate.exact_match import Question, matches, question_of
from casa_train.evaluate.held_out import Forward, HeldOut
from casa_train.evaluate.shares import show_image_first, spread
from casa_train.modeling.image_processing_casa import SIDE, ImageError
from casa_train.modeling.processing_casa import CasaProcessor


@dataclass(frozen=True)
class Asked:
    """A question, where it stands and how long it is.

    :param messages: the first turn of its sample, as the processor takes it.
    """

    question: Question
    messages: list[dict[str, Any]]
    split: str
    row: int
    text_tokens: int
    image_tokens: int


class Questions:
    """Fixed questions: the first turns of samples that show an image there.

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
        self.processor = processor
        self.ends = {held_out.end, processor.tokenizer.eos_token_id}
        self.max_new_tokens = config.evaluation.max_new_tokens
        self.budget = Budget.of(config.data)
        self.skipped: Counter[str] = Counter()
        splits = held_out.splits
        candidates = {
            source: show_image_first(splits[name], rows)
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
        for asked in self._batches():
            batch = self._tokenize([a.messages for a in asked]).to(device)
            for ids in greedy(forward, batch, self.max_new_tokens):
                said = list(itertools.takewhile(lambda i: i not in self.ends, ids))
                answers.append(self.processor.decode(said, skip_special_tokens=True).strip())
            heartbeat()
        return [
            {
                "id": asked.question.id,
                "source": asked.question.source,
                "split": asked.split,
                "row": asked.row,
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
            question = question_of(f"{name}/{sample.key}", sample)
            if question is None:
                return None
            messages = question.messages(question.images)
            batch = self._tokenize([messages])
        except (BadRow, ImageError) as error:
            self.skipped[error.reason] += 1
            return None
        text = batch["input_ids"].shape[1] + self.max_new_tokens
        images = sum(p.shape[1] * p.shape[2] // SIDE**2 for p in batch["pixel_values"])
        if not self.budget.holds(text, images):
            self.skipped["over_budget"] += 1
            return None
        return Asked(question, messages, name, row, text, images)

    def _batches(self) -> list[list[Asked]]:
        """The questions in order, together as far as the budgets allow."""
        batches: list[list[Asked]] = []
        text = images = 0
        for asked in self.asked:
            text, images = text + asked.text_tokens, images + asked.image_tokens
            if not batches or not self.budget.holds(text, images):
                batches.append([])
                text, images = asked.text_tokens, asked.image_tokens
            batches[-1].append(asked)
        return batches

    def _tokenize(self, conversations: Sequence[Any]) -> Any:
        """A batch padded on the left, behind which something can be generated."""
        tokenizer = self.processor.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            return self.processor.tokenize_messages(conversations)
        finally:
            tokenizer.padding_side = side


@torch.no_grad()
def greedy(forward: Forward, batch: Mapping[str, Any], new_tokens: int) -> list[list[int]]:
    """The most likely continuation of every row, past its end token if it has one.

    It takes exactly `new_tokens` forward passes, whatever is said: parameters that are sharded are
    gathered by all ranks together, and nothing tells one rank that another came to an end.

    :param batch: of the processor, padded on the left.
    """
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    mask: Tensor = batch["attention_mask"]
    cache = DynamicCache()
    new: list[Tensor] = []
    for _ in range(new_tokens):
        logits = forward(
            **inputs,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        new.append(logits[:, -1:].argmax(-1))
        mask = torch.cat([mask, torch.ones_like(new[-1])], 1)
        inputs = {"input_ids": new[-1]}
    ids: list[list[int]] = torch.cat(new, 1).tolist()
    return ids
