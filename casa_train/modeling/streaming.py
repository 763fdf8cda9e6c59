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

from .room import Room, held_by, show
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
    :param room: buffers whose heads are the KV cache.
    :param step: goes on from token to token and holds the windows meanwhile (`decoding.py`).
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
    room: Room = field(default_factory=lambda: Room(GROWTH_SLOTS, GROWTH_SHARE))
    step: Any = None
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

    def settle(self) -> None:
        """Makes `window` hold the windows, wherever they are."""
        if self.step is not None:
            self.step.settle(self)

    def select(self, rows: Sequence[int]) -> None:
        """Takes these of its samples, in this order; a sample may come several times."""
        self.settle()
        self.step = None
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
        self.room.layers.clear()  # the cache's keys are no longer their heads
        self.history, self.pending = (
            None if ids is None else ids[list(rows)] for ids in (self.history, self.pending)
        )

    def enter(self, ids: Tensor) -> None:
        """Notes the (B, columns) ids that have entered now."""
        self.columns += ids.shape[1]
        self.pending = None
        seen = ids.detach()
        self.history = seen if self.history is None else torch.cat([self.history, seen], 1)

    def append(self, active: Sequence[bool], joining: Sequence[bool]) -> None:
        """One more column of text.

        :param active: for each sample whether it took a token; :param joining: whether that joined
            its window.
        """
        stop = self.cache_length + 1
        for row, (takes, joins) in enumerate(zip(active, joining, strict=True)):
            if takes:
                slots = self.slots[row]
                self.slots[row] = _merge([*slots, (self.cache_length, stop)])
                self.text[row] += 1
                self.window_text[row] += 1
            self.window_lengths[row] += joins
        self.cache_length = stop

    def make_room(self, cache: Any, layer_idx: int, more: int) -> bool:
        """Whether a layer of the cache now shows the head of buffers with room for more columns."""
        held = held_by(cache, layer_idx)
        if held is None or held[0].shape[2] != self.cache_length:
            return False
        buffers = self.room.layers.get(layer_idx)
        shown = buffers is not None and held[0].data_ptr() == buffers[0].data_ptr()
        if not shown or not self.room.fits(layer_idx, self.cache_length + more, held[0]):
            self.room.layers.pop(layer_idx, None)  # what the cache holds may lie in it
            self.room.take(layer_idx, (held[0].transpose(1, 2), held[1].transpose(1, 2)), more)
            show(cache, layer_idx, *self.room.head(layer_idx, self.cache_length))
        return True

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
        if hasattr(self, "layers"):
            super().batch_select_indices(indices)  # type: ignore[misc]
        else:  # transformers 4.51 to 4.53 fail on layers that hold nothing
            for layers in (self.key_cache, self.value_cache):  # type: ignore[attr-defined]
                layers[:] = [x[indices, ...] if x.numel() else x for x in layers]
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if hasattr(self, "casa"):
            self.casa.select([row for row in range(self.casa.batch) for _ in range(repeats)])

    def reset(self) -> None:
        """Empties the cache, for a new stream."""
        if not hasattr(self, "layers"):  # transformers 4.51 to 4.53: growing caches have no reset
            self.__dict__.update(key_cache=[], value_cache=[], _seen_tokens=0)
        for layer in getattr(self, "layers", ()):
            if layer.keys is not None:  # 4.55 fails on a layer that holds nothing
                layer.reset()
            # Many releases, 4.57 and 5.17 among them, fill the slots with zeros and keep them.
            layer.keys = layer.values = None
            layer.is_initialized = False
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
        new = [self._pad(x).unflatten(0, (self.batch, self.width)) for x in (k, v)]
        stop = self.state.cache_length + self.width
        if self._make_room(layer_idx):
            for buffer, columns in zip(self.state.room.layers[layer_idx], new, strict=True):
                buffer[:, stop - self.width : stop] = columns
            keys, values = self.state.room.head(layer_idx, stop)
            show(self.cache, layer_idx, keys, values)
        else:
            keys, values = self.cache.update(*(x.transpose(1, 2) for x in new), layer_idx)
        return keys.transpose(1, 2).flatten(0, 1), values.transpose(1, 2).flatten(0, 1)

    def _make_room(self, layer_idx: int) -> bool:
        """Whether the layer's keys and values now are the head of buffers with room for new ones.

        Its first chunk stays with the library's cache, and so do caches of other kinds and
        everything that is differentiated.
        """
        if self.state.cache_length == 0 or torch.is_grad_enabled():
            return False
        return self.state.make_room(self.cache, layer_idx, self.width)

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
