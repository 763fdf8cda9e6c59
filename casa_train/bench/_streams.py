"""Streams of frames on a model, and what each turn of one costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from casa_train.bench._paths import TokenClock
from casa_train.bench._timing import synchronise, tensor_bytes
from casa_train.bench._turn_forms import TurnForm


@dataclass(frozen=True)
class Turn:
    """What one turn took and what the stream held after it.

    :param first_token: seconds until the first new token.
    :param tokens_per_second: of the new tokens after the first.
    :param cache_bytes: keys and values of the KV cache; `state_bytes`: all else the stream keeps.
    :param memory_bytes: weights, cache, state and temporaries at the turn's peak; None on the CPU.
    """

    first_token: float
    tokens_per_second: float
    cache_tokens: int
    cache_bytes: int
    state_bytes: int
    memory_bytes: int | None


# Of what a turn took and held: title, field, unit, format.
TURN_ROWS = (
    ("time to first token, ms", "first_token", 1e3, ".1f"),
    ("decoding, tokens/s", "tokens_per_second", 1.0, ".1f"),
    ("KV cache, tokens", "cache_tokens", 1.0, ",.0f"),
    ("KV cache, MiB", "cache_bytes", 2.0**-20, ",.2f"),
    ("streaming state, MiB", "state_bytes", 2.0**-20, ",.2f"),
)


class Stream:
    """One stream of a model and its cache, or a batch of them that go on together.

    :param cache: of streams that have run before; None starts anew.
    :param form: of its turns.
    """

    def __init__(self, model: Any, cache: Any = None, form: TurnForm | None = None) -> None:
        self.model, self.form = model, form or TurnForm()
        self.cache = DynamicCache() if cache is None else cache
        self.batch = self.cache.casa.batch if hasattr(self.cache, "casa") else 1
        self.device = model.lm_head.weight.device
        self.weight_bytes = tensor_bytes(list(model.parameters()))

    def generate(
        self,
        ids: Tensor,
        point: int,
        frames: Sequence[Tensor],
        new_tokens: int,
        clock: TokenClock | None = None,
    ) -> Tensor:
        """Enters ids (B, T) with a frame (3, H, W) a row before column `point`; takes `new_tokens`
        a row.

        :return: (B, T + new_tokens) all of them, once the device is done.
        """
        ids = self.model.generate_from_image(
            ids,
            list(frames),
            [[point] for _ in frames],
            reset_streaming=False,
            past_key_values=self.cache,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
        )
        synchronise(self.device)
        return ids

    def turn(self, ids: Tensor, point: int, frames: Sequence[Tensor], new_tokens: int) -> Turn:
        """`generate`, measured."""
        clock = TokenClock()
        cuda = self.device.type == "cuda"
        synchronise(self.device)
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            allocated = torch.cuda.memory_allocated(self.device)
            own = self.weight_bytes + self.cache_bytes() + self.state_bytes()
        began = time.perf_counter()
        self.generate(ids, point, frames, new_tokens, clock)
        memory = None
        if cuda:  # what the other streams hold is not this one's
            memory = own + torch.cuda.max_memory_allocated(self.device) - allocated
        return Turn(
            first_token=clock.arrivals[1] - began,  # the prompt comes back first
            tokens_per_second=clock.tokens_per_second(),
            cache_tokens=int(self.cache.get_seq_length()),
            cache_bytes=self.cache_bytes(),
            state_bytes=self.state_bytes(),
            memory_bytes=memory,
        )

    def cache_tensors(self) -> list[Any]:
        if hasattr(self.cache, "layers"):
            return [[layer.keys, layer.values] for layer in self.cache.layers]
        return [self.cache.key_cache, self.cache.value_cache]  # transformers 4

    def cache_bytes(self) -> int:
        return tensor_bytes(self.cache_tensors())

    def state_bytes(self) -> int:
        """What the stream keeps beside the cache; nothing counts twice that stands in both."""
        state = getattr(self.cache, "casa", None)
        return tensor_bytes(self.cache_tensors(), state) - self.cache_bytes()


class Script:
    """What enters in which turn, alike for every stream: a frame, and random ids behind it.

    :param image_size: side of a frame in pixels.
    :param vocabulary: what ids are drawn from: all below a number, or these.
    :param prompt_tokens: before the frame of the first turn; :param text_tokens: after each frame;
        both beside what a stream's form has around them.
    """

    def __init__(
        self,
        *,
        seed: int,
        image_size: int,
        vocabulary: int | Tensor,
        prompt_tokens: int,
        text_tokens: int,
        new_tokens: int,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        shape = (4, 3, image_size, image_size)
        self.frames = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
        self.words = torch.arange(vocabulary) if isinstance(vocabulary, int) else vocabulary
        self.seed, self.new_tokens = seed, new_tokens
        self.prompt_tokens, self.text_tokens = prompt_tokens, text_tokens

    def given(self, stream: Stream, index: int) -> tuple[Tensor, int, list[Tensor], int]:
        """What turn `index` of a stream, or of each of a batch, gives `Stream.turn`."""
        prompt = self.prompt_tokens if index == 0 else 0
        shape = (stream.batch, prompt + self.text_tokens)
        draw = torch.Generator().manual_seed(self.seed + index)
        drawn = self.words[torch.randint(0, len(self.words), shape, generator=draw)]
        ids, point = stream.form.turn(index, drawn[:, :prompt], drawn[:, prompt:])
        frames = [self.frames[(index + row) % len(self.frames)] for row in range(stream.batch)]
        return ids.to(stream.device), point, frames, self.new_tokens
