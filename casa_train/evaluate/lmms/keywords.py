"""A task's generation keywords, as an export's `generate` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.scorers import until

COUNTS = ("num_beams", "num_return_sequences", "n", "best_of")
"""More than one is what a stream's state cannot be copied for."""
SAMPLING = ("temperature", "top_p", "top_k")
STOPS = ("until", "stop_sequences")
OF_OTHERS = ("image_aspect_ratio", "seed")
"""What stock tasks set for other models, and what has no effect here: an image keeps its aspect
ratio, and lmms-eval's own --seed seeds what is sampled.
"""
NO_ANSWERS = ("output_", "return_", "use_cache", "cache_", "transformers_version", "_")
"""Fields of transformers' GenerationConfig that say nothing about an answer begin so."""


@dataclass(frozen=True)
class Keywords:
    """:param generate: for `generate_from_image`.
    :param stops: an answer ends before the first of these texts.
    """

    generate: Mapping[str, Any]
    stops: tuple[str, ...] = ()

    def cut(self, answer: str) -> str:
        """An answer as far as it counts, without outer white space."""
        return until(answer, self.stops).strip()


def read_keywords(given: Mapping[str, Any], max_new_tokens: int) -> Keywords:
    """What a task asks for.

    Greedy unless `do_sample` is true, or is not given and the temperature is above 0; never at
    temperature 0.

    :param max_new_tokens: where the task has none.
    :raises UserError: what an export cannot do, and what nobody knows.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    for name in COUNTS:
        if asked.pop(name, 1) > 1:
            raise UserError(
                f"generation_kwargs.{name}={given[name]}: an export answers with one sequence, "
                f"greedy or sampled; expected {name}=1. Set it with --gen_kwargs {name}=1."
            )
    stops: list[str] = []
    for name in STOPS:
        texts = asked.pop(name, [])
        stops += [texts] if isinstance(texts, str) else texts
    for name in OF_OTHERS:
        asked.pop(name, None)
    tokens = int(asked.pop("max_new_tokens", asked.pop("max_gen_toks", max_new_tokens)))
    warmth = asked.get("temperature")
    sampled = bool(asked.pop("do_sample", bool(warmth))) and warmth != 0
    sampling = {name: asked.pop(name) for name in SAMPLING if name in asked}
    known = {name for name in GenerationConfig().to_dict() if not name.startswith(NO_ANSWERS)}
    if unknown := sorted(set(asked) - known):
        raise UserError(
            f"generation_kwargs: {', '.join(f'{name}={given[name]!r}' for name in unknown)} is "
            f"unknown; expected until, max_new_tokens, do_sample, {', '.join(SAMPLING)} or "
            "another field of transformers' GenerationConfig"
        )
    greedy = {"temperature": None, "top_p": None, "top_k": None}  # else transformers warns
    how = {"max_new_tokens": tokens, "do_sample": sampled, **(sampling if sampled else greedy)}
    return Keywords({**asked, **how}, tuple(stop for stop in stops if stop))
