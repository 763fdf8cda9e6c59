"""What a generation stream remembers beside the KV cache.

The state lives on the cache object (`cache.casa`): whoever keeps the cache keeps the stream. It
holds which cache slots are padding, how far each sample is, and for cross-attention mechanisms the
keys and values of the current window. Earlier images leave nothing behind, so memory does not grow
with them, except where a mechanism reads all earlier images (`history=all`, hyper attention): there
the window is the whole stream.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from .windows import Range

# A full buffer of cached keys grows by this many slots, or by this part of itself if that is more.
GROWTH_SLOTS, GROWTH_SHARE = 256, 8


@dataclass
class StreamingState:
    """State of a batch of streams after some chunks.

    :param columns: columns of `input_ids` (padding included) that entered so far.
    :param text: text tokens of each sample so far; `span`: positions that its images took
        (`windows.image_spans`).
    :param slots: for each sample the ranges of KV-cache slots that hold its tokens.
    :param cache_length: slots of the KV cache in use, padding included.
    :param window_lengths: for each sample the number of keys kept of its open window.
    :param window_text: for each sample the text tokens since its newest image.
    :param window: by layer index, keys and values (sum of window_lengths, Hkv, D) of open windows.
    :param image_columns: for each sample the columns at which its images entered.
    :param room: by layer index, buffers (B, Hkv, capacity, D) whose heads are the KV cache.
    :param history: (B, columns) every id that entered, so that a later turn can continue.
    :param pending: (B, n) generated ids that have not entered yet; they open the next turn.
    :param waiting: while a batch is generated, by row the end token that waits to become pending.
    :param brought: whether the ids that enter next have the pending ones before them already.
    """

    batch: int
    columns: int = 0
    text: list[int] = field(default_factory=list)
    span: list[int] = field(default_factory=list)
    slots: list[list[Range]] = field(default_factory=list)
    cache_length: int = 0
    window_lengths: list[int] = field(default_factory=list)
    window_text: list[int] = field(default_factory=list)
    window: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    image_columns: list[list[int]] = field(default_factory=list)
    room: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    history: Tensor | None = None
    pending: Tensor | None = None
    waiting: dict[int, int] = field(default_factory=dict)
    brought: bool = False

    def __post_init__(self) -> None:
        self.text = self.text or [0] * self.batch
        self.span = self.span or [0] * self.batch
        self.slots = self.slots or [[] for _ in range(self.batch)]
        self.image_columns = self.image_columns or [[] for _ in range(self.batch)]
        self.window_lengths = self.window_lengths or [0] * self.batch
        self.window_text = self.window_text or [0] * self.batch

    def select(self, rows: Sequence[int]) -> None:
        """Takes these of its samples, in this order; a sample may come several times."""
        kept = [
            list(range(a, a + n)) for a, n in zip(self._starts(), self.window_lengths, strict=True)
        ]
        index = torch.tensor([i for row in rows for i in kept[row]], dtype=torch.long)
        for layer_idx, pair in self.window.items():
            k, v = (x.index_select(0, index.to(x.device)) for x in pair)
            self.window[layer_idx] = k, v
        self.batch = len(rows)
        self.text, self.span = [self.text[r] for r in rows], [self.span[r] for r in rows]
        self.slots = [list(self.slots[r]) for r in rows]
        self.image_columns = [list(self.image_columns[r]) for r in rows]
        self.window_lengths = [self.window_lengths[r] for r in rows]
        self.window_text = [self.window_text[r] for r in rows]
        self.room.clear()  # the cache's keys are no longer their heads
        self.history, self.pending = (
            None if ids is None else ids[list(rows)] for ids in (self.history, self.pending)
        )

    def _starts(self) -> list[int]:
        """Where each sample's rows of `window` begin."""
        return list(itertools.accumulate(self.window_lengths, initial=0))[:-1]


class Streamed:
    """What a cache that holds a stream does beside what its class does: the state goes along."""

    casa: StreamingState

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._select(beam_idx)

    def batch_select_indices(self, indices: Any) -> None:
        if hasattr(self, "key_cache"):  # transformers 4.51 fails on layers that hold nothing
            for layers in (self.key_cache, self.value_cache):  # type: ignore[attr-defined]
                layers[:] = [x[indices, ...] if x.numel() else x for x in layers]
        else:
            super().batch_select_indices(indices)  # type: ignore[misc]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if hasattr(self, "casa"):
            self.casa.select([row for row in range(self.casa.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Empties the cache, for a new stream."""
        if hasattr(self, "key_cache"):  # transformers 4.51, whose growing caches have no reset
            self.__dict__.update(key_cache=[], value_cache=[], _seen_tokens=0)
        else:
            super().reset()  # type: ignore[misc]
        self.__dict__.pop("casa", None)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        held = self.get_seq_length()  # type: ignore[attr-defined]
        super().crop(*args, **kwargs)  # type: ignore[misc]
        if held and not self.get_seq_length():  # type: ignore[attr-defined]
            self.reset()

    def _select(self, indices: Any) -> None:
        if hasattr(self, "casa"):
            if isinstance(indices, Tensor):
                indices = indices.cpu()
            self.casa.select(torch.arange(self.casa.batch)[indices].tolist())


# Written out, because pickle finds a class by its name in its module.
class StreamedDynamicCache(Streamed, DynamicCache): ...


@functools.cache
def streamed(base: type) -> type:
    """The class of a cache of class `base` from the moment it holds a stream."""
    if issubclass(base, Streamed):
        return base
    if base is DynamicCache:
        return StreamedDynamicCache
    return type(base.__name__, (Streamed, base), {})


def stream_state(cache: Any, batch: int) -> StreamingState:
    """The state of a cache's streams, a new one on an empty cache.

    :raises ValueError: a cache of fixed size, of another batch, or with tokens that did not enter
        through this model.
    """
    state: StreamingState | None = getattr(cache, "casa", None)
    if state is None:
        if getattr(cache, "is_compileable", False):  # those return all their slots, used or not
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, whose size is fixed; expected a "
                "cache that grows with the text: pass DynamicCache(), or no cache_implementation"
            )
        if cache.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values already holds {cache.get_seq_length()} tokens that this model "
                "did not put there: start with an empty DynamicCache()"
            )
        cache.__class__ = streamed(cache.__class__)
        state = cache.casa = StreamingState(batch)
    if state.batch != batch:
        raise ValueError(
            f"past_key_values belongs to a batch of {state.batch}, input_ids to one of {batch}"
        )
    held = cache.get_seq_length()  # 0 where the first block has no self-attention
    if held and held != state.cache_length:
        raise ValueError(
            f"past_key_values holds {held} tokens, but {state.cache_length} entered: a stream "
            "cannot take tokens back, so start over with an empty DynamicCache()"
        )
    return state


class FlatCache:
    """A Hugging Face cache as the decoder sees it: keys and values without a batch axis.

    New tokens of sample b stand right-aligned in the chunk's columns, as left padding puts them.

    :param cache: a `transformers` cache with (B, Hkv, slots, D) keys and values.
    :param lengths: new stream tokens of each sample.
    """

    def __init__(self, cache: Any, state: StreamingState, lengths: list[int]) -> None:
        self.cache = cache
        self.state = state
        self.width = max(lengths)
        self.batch = len(lengths)
        self.slots = [
            [*ranges, (state.cache_length + self.width - n, state.cache_length + self.width)]
            for ranges, n in zip(state.slots, lengths, strict=True)
        ]
        rows = [
            b * self.width + np.arange(self.width - n, self.width) for b, n in enumerate(lengths)
        ]
        self._dense = all(n == self.width for n in lengths)
        self._rows = torch.from_numpy(np.concatenate(rows))

    def key_ranges(self) -> list[list[Range]]:
        """For each sample the rows of its keys in what `update` returns."""
        total = self.state.cache_length + self.width
        return [
            [(b * total + start, b * total + stop) for start, stop in ranges]
            for b, ranges in enumerate(self.slots)
        ]

    def update(self, k: Tensor, v: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Stores (S, Hkv, D) keys and values; returns all stored ones, (B * slots, Hkv, D)."""
        padded = (self._pad(x).unflatten(0, (self.batch, self.width)) for x in (k, v))
        new_keys, new_values = (x.transpose(1, 2) for x in padded)
        if self._make_room(layer_idx, new_keys):
            keys, values = self._write(layer_idx, new_keys, new_values)
        else:
            keys, values = self.cache.update(new_keys, new_values, layer_idx)
        return keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)

    def _make_room(self, layer_idx: int, new: Tensor) -> bool:
        """Whether the layer's keys and values now are the head of buffers with room for `new`.

        The library's cache copies all of itself for every token. Its first chunk stays with it, and
        so do caches of other kinds and everything that is differentiated.
        """
        length = self.state.cache_length
        layers = getattr(self.cache, "layers", None)  # older releases of transformers have none
        if not layers or layer_idx >= len(layers) or length == 0 or torch.is_grad_enabled():
            return False
        layer = layers[layer_idx]
        if type(layer).__name__ != "DynamicLayer":
            return False
        room = self.state.room.get(layer_idx)
        if room is not None and layer.keys.data_ptr() == room[0].data_ptr():
            if length + new.shape[2] <= room[0].shape[2]:
                return True
        total = length + new.shape[2]
        capacity = total + max(GROWTH_SLOTS, total // GROWTH_SHARE)
        buffers = []
        for held in (layer.keys, layer.values):
            buffer = held.new_empty(*held.shape[:2], capacity, held.shape[3])
            buffer[:, :, :length] = held
            buffers.append(buffer)
        self.state.room[layer_idx] = (buffers[0], buffers[1])
        return True

    def _write(self, layer_idx: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        layer, start = self.cache.layers[layer_idx], self.state.cache_length
        stop = start + keys.shape[2]
        views = []
        for buffer, new in zip(self.state.room[layer_idx], (keys, values), strict=True):
            buffer[:, :, start:stop] = new
            views.append(buffer[:, :, :stop])
        layer.keys, layer.values = views
        return views[0], views[1]

    def commit(self) -> None:
        """Takes the new slots into the state, once every layer has stored its keys."""
        self.state.slots = [_merge(ranges) for ranges in self.slots]
        self.state.cache_length += self.width
        # `generate` asks whether it may run a step ahead and crop the cache (transformers 5 on
        # mps): the state would not go back with it.
        for layer in getattr(self.cache, "layers", ()):
            if type(layer).__name__ == "DynamicLayer":
                layer.is_croppable = False

    def _pad(self, x: Tensor) -> Tensor:
        if self._dense:
            return x
        padded = x.new_zeros(self.batch * self.width, *x.shape[1:])
        return padded.index_copy(0, self._rows.to(x.device), x)


def _merge(ranges: list[Range]) -> list[Range]:
    """Joins ranges that touch, so that a long stream keeps a short list."""
    merged: list[Range] = []
    for start, stop in ranges:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        elif start < stop:
            merged.append((start, stop))
    return merged
