"""How captions are made: the request, when a frame's words end, and how tokens are chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from casa_train.data.schemas.video_rows import FRAME_END
from casa_train.errors import UserError

TURN_END = "turn"
"""As a frame's end: the token that ends an answer, as the released CASA models are trained."""


@dataclass(frozen=True)
class CaptionOptions:
    """What a stream is asked and how its tokens are chosen; by default the most likely ones.

    Penalties, bias and block are those of the captioner that CASA's authors publish, and remember
    across frames what a stream has said.

    :param prompt: what the user asks before the first frame; empty: nothing.
    :param system: a system message before it; empty: the template's own.
    :param begin: words that the first answer begins with, behind the first frame.
    :param frame_end: the text that ends the words of a frame, as the recipe of Live-WhisperX writes
        it, or `TURN_END`.
    :param max_new_tokens: of a frame; what goes on then is cut.
    :param temperature: 0: the most likely token. :param top_k: of how many; 0: of all.
    :param stop_bias: multiplies the logit of ending a frame where it is positive and divides it
        where it is negative: above 1 a model says less.
    :param repetition_penalty: to the power of how often a token was said, at most
        `penalty_most`, divides positive logits and multiplies negative ones; 1: none.
    :param penalty_decay: what is left of each count after another token.
    :param ngram: tokens in a row that are not said twice within `ngram_window` tokens; 0: any.
    :param seed: of every stream, so that each is the same alone and beside others.
    """

    prompt: str = "Describe the video while it plays."
    system: str = ""
    begin: str = ""
    frame_end: str = FRAME_END
    max_new_tokens: int = 20
    temperature: float = 0.0
    top_k: int = 0
    stop_bias: float = 1.0
    repetition_penalty: float = 1.0
    penalty_decay: float = 0.99
    penalty_most: float = 5.0
    ngram: int = 0
    ngram_window: int = 60
    seed: int = 0

    def check(self, name: Any = lambda field: field) -> None:
        """Refuses what cannot be.

        :param name: field -> what a user calls it.
        :raises UserError: naming the field.
        """
        for field, fits, expected in (
            ("frame_end", bool(self.frame_end.strip()), "a text that is not empty"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", _finite(self.temperature, 0), "0 (the most likely token) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("stop_bias", _finite(self.stop_bias, 0, open_least=True), "more than 0; 1 is none"),
            (
                "repetition_penalty",
                _finite(self.repetition_penalty, 0, open_least=True),
                "more than 0; 1 is none",
            ),
            ("penalty_decay", _finite(self.penalty_decay, 0) and self.penalty_decay <= 1, "0 to 1"),
            ("penalty_most", _finite(self.penalty_most, 0), "0 or more"),
            ("ngram", self.ngram >= 0, "0 (no block) or more"),
            ("ngram_window", self.ngram_window >= max(1, self.ngram), "at least as many as ngram"),
        ):
            if not fits:
                raise UserError(f"{name(field)} is {getattr(self, field)!r}; expected {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether nothing but the model's logits chooses."""
        return (
            not self.ngram
            and self.stop_bias == self.repetition_penalty == 1
            and (self.temperature == 0)
        )

    def changed(self, **values: Any) -> CaptionOptions:
        """The same with other values."""
        return replace(self, **values)


PUBLISHED = {
    "prompt": "Please describe what you see in the video in real-time. Stick to the visual facts. ",
    "begin": "In this video",
    "max_new_tokens": 20,
    "temperature": 0.4,
    "top_k": 256,
    "stop_bias": 0.95,
    "repetition_penalty": 1.15,
    "penalty_decay": 0.99,
    "penalty_most": 5.0,
    "ngram": 4,
    "ngram_window": 60,
}
"""The values of the live captioner that CASA's authors publish (kyutai-labs/casa, 2026), for the
released models."""


NAMES = tuple(field.name for field in fields(CaptionOptions))


def _finite(value: float, least: float, open_least: bool = False) -> bool:
    return math.isfinite(value) and (value > least if open_least else value >= least)
