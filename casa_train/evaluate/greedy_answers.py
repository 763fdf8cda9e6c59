"""Greedy answers of a model in training, by forward passes that every rank makes alike.

Parameters that are sharded are gathered by all ranks together, so no rank may make a pass more than
another, whatever its own questions have come to.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from casa_train.data.budget import Budget
from casa_train.evaluate.held_out import Forward
from casa_train.modeling.processing_casa import CasaProcessor

ASKED_EVERY = 8
"""New tokens between two times that ranks ask each other whether all answers have ended."""

Ended = Callable[[bool], bool]


class Decoder:
    """Answers conversations, as many at once as a pack holds.

    :param budget: of a pack; a conversation that it does not hold alone is not to be asked.
    :param max_new_tokens: of an answer.
    """

    def __init__(self, processor: CasaProcessor, budget: Budget, max_new_tokens: int) -> None:
        self.processor, self.budget = processor, budget
        self.max_new_tokens = max_new_tokens
        self.ends = {processor.answer_end_token, processor.tokenizer.eos_token_id} - {None}

    def size(self, conversation: Any) -> tuple[int, int]:
        """Text tokens with those of the answer, and image tokens.

        :raises ImageError: an image that cannot be used.
        """
        batch = self._tokenize([conversation])
        side = self.processor.token_side
        images = sum(p.shape[1] * p.shape[2] // side**2 for p in batch["pixel_values"])
        return batch["input_ids"].shape[1] + self.max_new_tokens, images

    def batches(self, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
        """Places in order, together as far as the budget allows."""
        batches: list[list[int]] = []
        text = images = 0
        for place, (its_text, its_images) in enumerate(sizes):
            text, images = text + its_text, images + its_images
            if not batches or not self.budget.holds(text, images):
                batches.append([])
                text, images = its_text, its_images
            batches[-1].append(place)
        return batches

    def answer(
        self,
        forward: Forward,
        conversations: Sequence[Any],
        device: torch.device,
        ended: Ended = lambda own: False,
    ) -> list[str]:
        """Answers one batch.

        :param forward: the model's, in eval mode.
        :param ended: whether this rank's answers have ended -> whether all ranks' have.
        """
        batch = self._tokenize(conversations).to(device)
        said = []
        for ids in greedy(forward, batch, self.max_new_tokens, lambda n: ended(self._ended(n))):
            own = list(itertools.takewhile(lambda i: i not in self.ends, ids))
            said.append(self.processor.decode(own, skip_special_tokens=True).strip())
        return said

    def _ended(self, new: Tensor) -> bool:
        """:param new: (B, T) ids."""
        ends = torch.tensor(sorted(self.ends), dtype=new.dtype, device=new.device)
        return bool(torch.isin(new, ends).any(1).all())

    def _tokenize(self, conversations: Sequence[Any]) -> Any:
        """A batch padded on the left, behind which something can be generated."""
        tokenizer = self.processor.tokenizer
        side, tokenizer.padding_side = tokenizer.padding_side, "left"
        try:
            return self.processor.tokenize_messages(conversations)
        finally:
            tokenizer.padding_side = side


@torch.no_grad()
def greedy(
    forward: Forward,
    batch: Mapping[str, Any],
    new_tokens: int,
    ended: Callable[[Tensor], bool] = lambda new: False,
) -> list[list[int]]:
    """The most likely continuation of every row, past its end token if it has one.

    It takes exactly `new_tokens` forward passes, or as many fewer as `ended` says on all ranks
    alike: nothing else tells one rank that another came to an end.

    :param batch: of the processor, padded on the left.
    :param ended: (B, T) new ids -> whether it is enough; asked every `ASKED_EVERY` tokens.
    """
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    mask: Tensor = batch["attention_mask"]
    cache = DynamicCache()
    new: list[Tensor] = []
    for _ in range(new_tokens):
        if new and len(new) % ASKED_EVERY == 0 and ended(torch.cat(new, 1)):
            break
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
