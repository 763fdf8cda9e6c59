"""An export that is asked: answers, and how likely it finds given ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from casa_train.errors import UserError
from casa_train.evaluate.lmms.keywords import Keywords
from casa_train.export.loading import load_model, load_processor

Conversation = list[dict[str, Any]]


class Asked:
    """:param image_size: an image has at most image_size * image_size pixels.
    :raises UserError: a directory that is no export, or an image size that it cannot have.
    """

    def __init__(
        self,
        export: Path,
        device: torch.device,
        dtype: torch.dtype | str,
        image_size: int | None = None,
    ) -> None:
        options = {} if image_size is None else {"image_size": image_size}
        try:
            self.processor = load_processor(export, **options)
        except ValueError as error:
            raise UserError(f"{export}: {error}") from error
        self.processor.tokenizer.padding_side = "left"
        self.model = load_model(export, dtype).to(device).eval()

    @torch.no_grad()
    def answer(
        self, conversations: Sequence[Conversation], keywords: Keywords
    ) -> list[tuple[str, int]]:
        """Answers, each with its number of tokens.

        :raises ValueError: an image that cannot be read, or what the export cannot do.
        """
        batch = self.processor.tokenize_messages(conversations).to(self.model.device)
        tokenizer = self.processor.tokenizer
        options = dict(keywords.generate)
        columns = batch["input_ids"].shape[1]
        if keywords.stops:
            options["stopping_criteria"] = [Stops(tokenizer, keywords.stops, columns)]
        out = self.model.generate_from_image(**batch, **options)
        new = out[:, columns:]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True)
        counts = [self._length(row) for row in new.tolist()]
        return [(keywords.cut(text), count) for text, count in zip(texts, counts, strict=True)]

    @torch.no_grad()
    def log_likelihoods(
        self, conversations: Sequence[Conversation], continuations: Sequence[str]
    ) -> list[tuple[float, bool]]:
        """For each continuation the sum of its tokens' log-probabilities, as the beginning of the
        answer to its conversation, and whether greedy decoding would begin so.

        What the template lets an answer begin with is part of it; the token that ends one is not.

        :raises ValueError: an image that cannot be read.
        """
        begun = [
            [*conversation, {"role": "assistant", "content": text}]
            for conversation, text in zip(conversations, continuations, strict=True)
        ]
        encode = self.processor.encode
        before = [len(encode(c, generation_prompt=True).ids) for c in conversations]
        lengths = [len(encode(c, continue_final=True).ids) for c in begun]
        batch = self.processor.apply_chat_template(
            begun,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding_side="left",
            continue_final_message=True,
        )
        if batch["attention_mask"].sum(1).tolist() != lengths:
            raise ValueError(
                "the export has a chat_template of its own, which renders conversations to other "
                "tokens than the template that it was trained with; log-likelihoods need the latter"
            )
        batch = batch.to(self.model.device)
        asked = [length - start for length, start in zip(lengths, before, strict=True)]
        if not max(asked):
            return [(0.0, True)] * len(asked)
        # Of each row's end, and the position before it, which predicts its first token.
        logits = self.model(**batch, use_cache=False, logits_to_keep=max(asked) + 1).logits
        scored = []
        for row, count in enumerate(asked):
            if not count:
                scored.append((0.0, True))
                continue
            ids = batch["input_ids"][row, -count:]
            predicted = logits[row, -count - 1 : -1].float().log_softmax(-1)
            chosen = predicted.gather(-1, ids[:, None]).sum(dtype=torch.float64)
            scored.append((float(chosen), bool((predicted.argmax(-1) == ids).all())))
        return scored

    def _length(self, ids: list[int]) -> int:
        """Tokens up to the one that ended the answer; what follows in a batch is padding."""
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        for i, token in enumerate(ids):
            if token in ends:
                return i + 1
            if token == self.processor.tokenizer.pad_token_id:
                return i  # a stop came before
        return len(ids)


class Stops(StoppingCriteria):
    """Ends the answers that hold one of some texts.

    The library's own stop_strings also find a text of which the prompt holds the beginning, and go
    through the whole vocabulary in every call: 0.3 s to 0.6 s where it has 129,280 tokens.

    :param columns: of the prompt.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str], columns: int) -> None:
        self.tokenizer, self.stops, self.columns = tokenizer, stops, columns
        # A token has a byte at least; those around the text may be cut characters.
        self.window = max(len(stop.encode()) for stop in stops) + 4

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """:param input_ids: (B, T) prompts and answers so far.
        :return: (B,) whether each has ended.
        """
        newest = input_ids[:, self.columns :][:, -self.window :]
        texts = self.tokenizer.batch_decode(newest, skip_special_tokens=True)
        ended = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
