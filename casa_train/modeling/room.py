"""Keys and values in buffers with room to grow, as the heads of which a cache shows them.

The caches of transformers copy all they hold for every token. Here a token is written in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import one_query_attention, one_row_attention, short_way, takes_length
from .segments import on_device

Pair = tuple[Tensor, Tensor]  # keys and values
# Capacities are multiples of this many columns, as kernels that take a mask like it.
COLUMNS = 16


@dataclass
class Room:
    """Keys and values of a batch by layer, each (B, capacity, Hkv, D).

    Free columns hold zeros, or keys that were there before: masks leave them out, so they must be
    numbers.

    :param slots: columns that a full buffer grows by; :param share: or this part of itself, if
        that is more.
    """

    slots: int
    share: int
    layers: dict[int, Pair] = field(default_factory=dict)

    def fits(self, layer_idx: int, columns: int, like: Tensor) -> bool:
        """Whether a layer has buffers of so many columns that may be written to now.

        :param like: of the dtype and on the device of its keys.
        """
        pair = self.layers.get(layer_idx)
        if pair is None or pair[0].shape[1] < columns:
            return False
        if pair[0].dtype != like.dtype or pair[0].device != like.device:
            return False
        return torch.is_inference_mode_enabled() or not pair[0].is_inference()

    def take(self, layer_idx: int, held: Pair, more: int) -> None:
        """Copies (B, n, Hkv, D) keys and values into buffers with room for `more` columns.

        Buffers that are there already and fit are written to again, unless these are their head.
        """
        used = held[0].shape[1]
        if not self.fits(layer_idx, used + more, held[0]):
            wanted = used + more + max(self.slots, used // self.share)
            capacity = -(-wanted // COLUMNS) * COLUMNS
            shapes = [(x.shape[0], capacity, *x.shape[2:]) for x in held]
            self.layers[layer_idx] = (held[0].new_zeros(shapes[0]), held[1].new_zeros(shapes[1]))
        for buffer, kept in zip(self.layers[layer_idx], held, strict=True):
            if kept.data_ptr() != buffer.data_ptr():
                buffer[:, :used] = kept

    @property
    def capacity(self) -> int:
        """Columns of the buffers, which are alike in all layers."""
        return next((keys.shape[1] for keys, _ in self.layers.values()), 0)

    def head(self, layer_idx: int, columns: int) -> Pair:
        """The first columns as caches have them: views (B, Hkv, columns, D)."""
        keys, values = self.layers[layer_idx]
        return _head(keys, columns), _head(values, columns)


def _head(buffer: Tensor, columns: int) -> Tensor:
    """A narrower view with its axes swapped, by one operation: (B, Hkv, columns, D)."""
    batch, capacity, heads, width = buffer.shape
    row = heads * width
    return buffer.as_strided((batch, heads, columns, width), (capacity * row, width, row, 1))


class Columns:
    """Keys and values of a batch in buffers, and which of their columns each row reads.

    With fixed shapes attention gets whole buffers, whose free columns a length or a mask leaves
    out.

    :ivar used: columns in use; :ivar valid: (B, capacity) bool, those that a row reads, on the
        host. `mask` is the same on the device.
    :ivar newest: (1,) the last column in use.
    :ivar ends: (2, 2) int32 [[0, 1], [0, used]], where queries and keys of a single row end.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.used = 0
        self.valid = np.zeros((0, 0), bool)
        self.whole = self.exact = True
        self.mask = self.newest = self.ends = torch.zeros(0)

    def open(self, valid: np.ndarray, device: torch.device, fixed: bool) -> None:
        """Begins with columns that lie in the buffers.

        :param valid: (B, used) bool; :param fixed: whether shapes are.
        """
        batch, self.used = valid.shape
        # Without any layer that keeps keys there are no buffers to fill.
        capacity = self.room.capacity or self.used + self.room.slots
        self.valid = np.zeros((batch, capacity), bool)
        self.valid[:, : self.used] = valid
        self.whole = bool(valid.all())
        self.exact = not fixed
        ends = np.array([[0, 1], [0, self.used]], np.int32)
        self.mask = put(self.mask, on_device(self.valid, device))
        self.newest = put(self.newest, on_device(np.array([self.used - 1]), device))
        self.ends = put(self.ends, on_device(ends, device))

    def tensors(self) -> list[Tensor]:
        """All that a step reads here, on the device."""
        buffers = [tensor for pair in self.room.layers.values() for tensor in pair]
        return [*buffers, self.mask, self.newest, self.ends]

    @property
    def full(self) -> bool:
        """Whether another column has no room."""
        return self.used == self.valid.shape[1]

    def append(self, rows: np.ndarray, on: Tensor) -> None:
        """One more column.

        :param rows: (B,) bool, the rows that read it from now on; :param on: the same on the
            device.
        """
        self.valid[:, self.used] = rows
        self.used += 1
        self.whole = self.whole and bool(rows.all())
        if self.exact:
            if not self.whole:
                self.mask = on_device(self.valid, on.device)
            return
        self.newest += 1
        self.ends[1, 1] += 1
        self.mask.index_copy_(1, self.newest, on[:, None])

    def take_back(self, used: int) -> None:
        """Leaves out the columns behind the first `used`, until it is opened again."""
        self.valid[:, used:] = False
        self.used = used

    def write(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """Keys and values (B, Hkv, D) into the newest column."""
        for buffer, new in zip(self.room.layers[layer_idx], (k, v), strict=True):
            if self.exact:
                buffer.select(1, self.used - 1).copy_(new)
            else:
                buffer.index_copy_(1, self.newest, new[:, None].to(buffer.dtype))

    def read(self, layer_idx: int, q: Tensor, backend: str) -> Tensor:
        """(B, H * D): what a query of every row reads in its columns."""
        k, v = self.room.layers[layer_idx]
        mask = None
        if self.exact and self.whole and short_way(q, self.used):
            return one_row_attention(q, k, v, self.used)
        if self.exact:
            k, v = k.narrow(1, 0, self.used), v.narrow(1, 0, self.used)
            mask = None if self.whole else self.mask[:, : self.used]
        elif not (self.whole and len(q) == 1 and takes_length(backend)):
            mask = self.mask
        return one_query_attention(q, k, v, mask, self.ends, backend)


def held_by(cache: Any, layer_idx: int) -> Pair | None:
    """A layer's (B, Hkv, n, D) keys and values in a cache of either transformers generation that
    just grows; None: it holds none, or is of another kind.
    """
    if hasattr(cache, "key_cache"):  # transformers 4.51
        if layer_idx >= len(cache.key_cache):
            return None
        keys, values = cache.key_cache[layer_idx], cache.value_cache[layer_idx]
    else:
        layers = getattr(cache, "layers", ())
        if layer_idx >= len(layers):
            return None
        keys, values = (getattr(layers[layer_idx], name, None) for name in ("keys", "values"))
    if not grows(cache, layer_idx) or not isinstance(keys, Tensor) or not keys.numel():
        return None
    return keys, values


def grows(cache: Any, layer_idx: int) -> bool:
    """Whether all that a cache does with a layer's keys is to keep them."""
    if hasattr(cache, "key_cache"):
        return type(cache).__name__ == "StreamedDynamicCache"
    layers = cache.layers
    return layer_idx >= len(layers) or type(layers[layer_idx]).__name__ == "DynamicLayer"


def show(cache: Any, layer_idx: int, keys: Tensor, values: Tensor) -> None:
    """Makes these a layer's keys and values in a cache that `held_by` knows."""
    if hasattr(cache, "key_cache"):
        cache.key_cache[layer_idx], cache.value_cache[layer_idx] = keys, values
        cache._seen_tokens = keys.shape[2]
    else:
        layer = cache.layers[layer_idx]
        layer.keys, layer.values = keys, values


def put(old: Tensor, new: Tensor) -> Tensor:
    """`new`, in the memory of `old` if it fits."""
    alike = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    if alike and (torch.is_inference_mode_enabled() or not old.is_inference()):
        return old.copy_(new)
    return new
