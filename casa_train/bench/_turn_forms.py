"""What a chat template has around the frame, the text and the answer of a stream's turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from casa_train.errors import UserError
from casa_train.export.loading import side_of_tokens

LARGEST = 224  # side of a frame in pixels where none is asked for


@dataclass(frozen=True)
class TurnForm:
    """Ids around what the benchmark enters; all empty for random models, which have no template.

    :param first: before the first turn; :param later: before each other one. The answer before was
        cut off, so it ends with the template's end.
    :param before: before the frame; :param after: behind it, such as a token that sees it.
    :param answer: what opens the answer.
    """

    first: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, processor: Any) -> TurnForm:
        """As a user's chat with this processor goes on: a message with an image, then its text."""
        message = [{"role": "user", "content": [{"type": "image", "image": "a frame"}]}]
        before, after = processor.pre_image_tokens, processor.post_image_tokens
        begins, ends = [], []
        for how in ({}, {"continues": True, "end_answer": True}):
            encoded = processor.encode(message, generation_prompt=True, **how)
            ids, (point,) = encoded.ids, encoded.points
            begins.append(list(ids[: point - len(before)]))
            ends.append(list(ids[point + len(after) :]))
        first, later = begins
        return cls(first, later, list(before), list(after), ends[0])

    def turn(self, index: int, prompt: Tensor, text: Tensor) -> tuple[Tensor, int]:
        """One turn of each stream of a batch.

        :param prompt: (B, P) ids before the frame; :param text: (B, T) ids behind it.
        :return: (B, ...) all ids, and the column that the frame stands before.
        """
        opening = self.first if index == 0 else self.later
        pieces = [opening, prompt, self.before, self.after, text, self.answer]
        wide = [
            piece
            if isinstance(piece, Tensor)
            else torch.tensor(piece, dtype=text.dtype).expand(len(text), -1)
            for piece in pieces
        ]
        return torch.cat(wide, dim=1), sum(piece.shape[1] for piece in wide[:3])


def ordinary_ids(vocabulary: int, processors: Iterable[Any]) -> Tensor:
    """Ids below `vocabulary` that are plain text to every one of the processors: none of them ends
    an answer or stands for an image.
    """
    special = {i for p in processors for i in p.tokenizer.all_special_ids}
    special |= {i for p in processors for i in p.tokenizer.added_tokens_decoder}
    return torch.tensor([i for i in range(vocabulary) if i not in special], dtype=torch.long)


def frame_side(asked: int | None, processors: Mapping[str, Any]) -> int:
    """Side of the frames in pixels: what was asked for, or the largest up to 224 that every export
    takes as it is.

    :param processors: of the exports by label; none: random models.
    :raises UserError: a side that an export would change, or none that suits all.
    """
    if asked is None:
        for side in range(LARGEST, 0, -1):
            if not any(_misfit(side, processor) for processor in processors.values()):
                return side
        raise UserError(
            "no frame of up to 224 x 224 pixels suits all exports: their bounds on pixels or the "
            "sides of their image tokens exclude each other. Give --image-size, or measure them "
            "apart."
        )
    for label, processor in processors.items():
        if wanted := _misfit(asked, processor):
            raise UserError(f"--image-size is {asked}; it must be {wanted} of {label}.")
    return asked


def _misfit(side: int, processor: Any) -> str | None:
    """What a frame of this side would have to be to enter unchanged; None: it does."""
    token = side_of_tokens(processor)
    if side < token or side % token:
        return f"a positive multiple of {token}, the side of an image token"
    least, most = processor.min_pixels, processor.max_pixels
    if not least <= side**2 <= most:
        return f"a square of {least:,} to {most:,} pixels, the bounds"
    return None
