"""The decode step: one more text token for every row of a batch, and no image.

It runs the same `run_layer` as a forward pass over packed chunks, but between layers there is no
layout and no Python list. Keys and values lie in buffers with room to grow, which stay where they
are while tokens come; what a row reads there is said by a length or a mask. So the launches of a
step are always the same ones, and a GPU repeats them as a CUDA graph.

What a step knows of a mechanism is the `plan` of its first token: positions, which rows read their
window and whose text joins it. From there on every token is like the one before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .block import FusionPlan
from .decoder import backbone_rope
from .graphs import Graphs, look_over
from .room import Columns, Room, grows, held_by, put, show
from .rope import Frequencies, Rope, Table, as_products, rope_frequencies, rope_table
from .segments import on_device
from .streaming import FlatCache, StreamingState
from .windows import Chunk

# A window has room for so many more tokens when decoding begins, or for this part of itself.
WINDOW_SLOTS, WINDOW_SHARE = 64, 8


def fixed_shapes(device: torch.device) -> bool:
    """Whether tensors of a step keep their shapes from token to token, so that it can be repeated
    as a graph; elsewhere attention gets the columns in use alone, which is less work.
    """
    return device.type == "cuda"


class DecodeStep:
    """A batch of streams on their way from token to token; lives in their state.

    :ivar plan: that of the first token. What layers look at holds for the next ones, too: whether
        there is a window (`cross`), and which rows read it.
    :ivar is_open: whether the windows lie here, and not in the state.
    :ivar graphs: of the step; :ivar repeats: whether it may run by them.
    :ivar watched: whether hooks or adapters have Python of their own to run in it.
    """

    plan: FusionPlan
    rope: Rope
    frequencies: Frequencies
    backend: str
    repeats: bool
    watched: bool

    def __init__(self, state: StreamingState) -> None:
        self.text = Columns(state.room)
        self.window = Columns(Room(WINDOW_SLOTS, WINDOW_SHARE))
        self.is_open = False
        self.graphs = Graphs()
        # On the device: of the next token, and which rows read their window.
        self.positions = self.query_positions = self.reads = torch.zeros(0)
        # On the host: rows that read their window, and rows whose text joins it.
        self.reading = self.joining = np.zeros(0, bool)
        self._flags: dict[bytes, Tensor] = {}
        self._opened_by = 0
        self._made_in_inference = False
        self._read_by_graphs: Any = None

    def open(self, model: Any, cache: Any, state: StreamingState) -> str | None:
        """Takes the streams over where whole forward passes left them.

        :param model: a `PackedModel`.
        :return: why a step cannot go on there; None: it does.
        """
        device = model.model.norm.weight.device
        weights, self.watched = look_over(model.model)
        places = sorted({str(weight.device) for weight in weights})
        if len(places) > 1:
            return f"the decoder lies on several devices, {places}"
        chunks = [
            Chunk(text=1, past_text=text, past_span=span)
            for text, span in zip(state.text, state.span, strict=True)
        ]
        flat = FlatCache(cache, state, model.mechanism.stream_lengths(chunks))
        plan = model.mechanism.plan(chunks, state, flat, device)
        if not _only_goes_on(plan, state):
            return "its plan of a token without images does not just go on with the stream"
        depth = len(model.model.layers)
        if not all(grows(cache, index) for index in range(depth)):
            return f"the cache, a {type(cache).__name__}, does more than grow"
        self._layers = [i for i in range(depth) if state.make_room(cache, i, 1)]
        kept = [*state.room.layers.values(), *state.window.values()]
        if any(keys.device != device for keys, _ in kept):
            return "the weights do not lie where the cache lies"
        self.backend = model.attention_backend
        if self._opened_by != id(model):
            self.rope = backbone_rope(model.model.config)
            self.frequencies = rope_frequencies(model.model.config, device)
        self._take_plan(plan, state, device)
        fixed = model.compile_decoding or fixed_shapes(device)
        self.text.open(_columns(state.slots, state.cache_length), device, fixed)
        self._open_windows(state, device, fixed)
        self.repeats = fixed_shapes(device) and not self.watched
        self._made_in_inference = torch.is_inference_mode_enabled()
        self._opened_by, self.is_open = id(model), True
        self._check_graphs(weights)
        return None

    def _take_plan(self, plan: FusionPlan, state: StreamingState, device: torch.device) -> None:
        """What holds for the first token and those behind it."""
        kept = [sum(b - a for a, b in ranges) for ranges in plan.keep] or state.window_lengths
        read: list[int] = []
        if plan.cross is not None:
            read = [int(rows[0]) for rows in plan.cross.query_rows]
            for table in ("identity_queries", "query_index"):
                getattr(plan.cross, table)  # made here, since neither compilers nor graphs can
        # A token a row and no image: the stream is the text, row by row.
        self.plan = replace(plan, stream_index=None, text_index=None)
        self.joining = np.array(kept) > np.array(state.window_lengths)
        self.reading = np.isin(np.arange(state.batch), read)
        self._some_read, self._all_read = bool(self.reading.any()), bool(self.reading.all())
        self._some_join = bool(self.joining.any())
        self.positions = put(self.positions, plan.stream_positions)
        if plan.query_positions is not None and plan.query_positions is not plan.stream_positions:
            self.query_positions = put(self.query_positions, plan.query_positions)
        self.reads = put(self.reads, on_device(self.reading[:, None], device))

    def _open_windows(self, state: StreamingState, device: torch.device, fixed: bool) -> None:
        """Takes the windows, right-aligned."""
        room, lengths, width = self.window.room, state.window_lengths, max(state.window_lengths)
        if room.capacity > 4 * (width + WINDOW_SLOTS):  # of a much larger image
            room.layers.clear()
        valid = np.arange(width) >= width - np.array(lengths)[:, None]
        for index, (keys, values) in state.window.items():
            room.take(index, (_padded(keys, valid, device), _padded(values, valid, device)), 1)
        state.window.clear()
        self.window.open(valid, device, fixed)

    def _check_graphs(self, weights: Sequence[Tensor]) -> None:
        """Forgets graphs that were captured with other weights, buffers or rows that read."""
        if not self.repeats:
            self._read_by_graphs = None
            return
        tensors = [*self.text.tensors(), *self.window.tensors(), *weights]
        tensors += [self.positions, self.query_positions, self.reads, self.frequencies.values]
        if self.frequencies.axis is not None:
            tensors.append(self.frequencies.axis)
        if self.plan.cross is not None and not self._all_read:
            tensors.append(self.plan.cross.query_index)
        read = [
            tuple((tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors),
            (self._some_read, self._all_read, self._some_join, self.backend),
        ]
        if read != self._read_by_graphs:
            self.graphs.forget()
        self._read_by_graphs = read

    def settle(self, state: StreamingState) -> None:
        """Gives the windows back to the state, for a forward pass that may bring images."""
        if not self.is_open:
            return
        self.is_open = False
        used = self.window.used
        rows = None
        if not self.window.whole or state.batch > 1:
            rows = torch.from_numpy(np.flatnonzero(self.window.valid.ravel()))
        for index, (keys, values) in self.window.room.layers.items():
            if rows is None:
                state.window[index] = keys[0, :used], values[0, :used]
            else:
                here = rows.to(keys.device)
                k, v = (x.flatten(0, 1).index_select(0, here) for x in (keys, values))
                state.window[index] = k, v

    def goes_on(self, model: Any) -> bool:
        """Whether it is open, for this model, and may be written to in this mode."""
        writable = torch.is_inference_mode_enabled() or not self._made_in_inference
        return self.is_open and self._opened_by == id(model) and writable

    def begin(self, model: Any, cache: Any, state: StreamingState, active: np.ndarray) -> None:
        """Makes a column for the next token of the rows that are active."""
        device, fixed = self.positions.device, not self.text.exact
        grown = self.text.full or not self._shown(cache)
        if grown:
            for index in self._layers:
                state.make_room(cache, index, 1)
            self.text.open(_columns(state.slots, state.cache_length), device, fixed)
        if self._some_join and self.window.full:
            grown, used = True, self.window.used
            for index, (keys, values) in list(self.window.room.layers.items()):
                self.window.room.take(index, (keys[:, :used], values[:, :used]), 1)
            self.window.open(self.window.valid[:, :used], device, fixed)
        if grown:
            self._made_in_inference |= torch.is_inference_mode_enabled()
            self._check_graphs(look_over(model.model)[0])
        self.text.append(active, self.flags(active))
        if self._some_join:
            joining = active & self.joining
            self.window.append(joining, self.flags(joining))

    def end(self, cache: Any, state: StreamingState, active: np.ndarray) -> None:
        """Takes the token into cache and state."""
        self.positions += self.flags(active)
        if self.query_positions.numel():
            self.query_positions += self.flags(active)
        for index in self._layers:
            show(cache, index, *state.room.head(index, self.text.used))
        state.append(active.tolist(), (active & self.joining).tolist())

    def abandon(self, cache: Any, state: StreamingState, window: int) -> None:
        """A token failed on its way: the stream is again what it was before.

        :param window: columns of the windows then.
        """
        for index in self._layers:
            show(cache, index, *state.room.head(index, state.cache_length))
        self.window.take_back(window)
        self.settle(state)

    def _shown(self, cache: Any) -> bool:
        """Whether the cache still shows the buffers; copies of a stream have their own."""
        if not self._layers:
            return True
        held, (keys, _) = held_by(cache, self._layers[0]), self.text.room.layers[self._layers[0]]
        return held is not None and held[0].data_ptr() == keys.data_ptr()

    def flags(self, rows: np.ndarray) -> Tensor:
        """(B,) bool on the device."""
        name = rows.tobytes()
        if name not in self._flags:
            self._flags[name] = on_device(rows, self.positions.device)
        return self._flags[name]

    def tables(self, dtype: torch.dtype, products: bool) -> tuple[Table, Table | None]:
        """RoPE of the next tokens in the stream and, as queries and keys, in fusion layers.

        :param products: for `BY_PRODUCT` in place of the backbone's rotation. The model says so: an
            export that takes the stream over has a `lean.py` of its own.
        """
        stream = self._table(self.positions, dtype, products)
        if self.plan.query_positions is None or not self.query_positions.numel():
            return stream, None if self.plan.query_positions is None else stream
        return stream, self._table(self.query_positions, dtype, products)

    def _table(self, positions: Tensor, dtype: torch.dtype, products: bool) -> Table:
        table = rope_table(self.rope, positions, self.frequencies, dtype)
        return as_products(self.rope, table) if products else table

    def self_attention(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H * D): what every row reads in its text, this token included.

        :param q: (B, H, D); :param k: (B, Hkv, D), as is v; q and k rotated.
        """
        self.text.write(layer_idx, k, v)
        return self.text.read(layer_idx, q, self.backend)

    def window_attention(
        self, layer_idx: int, q: Tensor, k: Tensor | None, v: Tensor | None
    ) -> Tensor:
        """(B, H * D): what every row reads in its window, zero where it has none.

        :param k: (B, Hkv, D), as is v; None: text does not join windows.
        """
        if k is not None and v is not None and self._some_join:
            self.window.write(layer_idx, k, v)
        if not self._some_read:
            return q.new_zeros(q.shape[0], q.shape[1] * q.shape[2])
        read = self.window.read(layer_idx, q, self.backend)
        return read if self._all_read else torch.where(self.reads, read, 0)


def _only_goes_on(plan: FusionPlan, state: StreamingState) -> bool:
    """Whether every row's token stands alone at the end of its text and, if at all, its window."""
    if plan.stream_lengths != [1] * state.batch:
        return False
    own = [sum(b - a for a, b in slots) + 1 for slots in state.slots]
    if plan.self_attention.key_lengths != own:
        return False
    if plan.cross is None:
        return True
    starts = np.cumsum([0, *state.window_lengths])
    ends = [[] if a == b else [(int(a), int(b))] for a, b in zip(starts, starts[1:], strict=False)]
    text = int(starts[-1])
    for row, (kept, ranges) in enumerate(zip(ends, plan.keep, strict=True)):
        if list(ranges) not in (kept, [*kept, (text + row, text + row + 1)]):
            return False
    read = [int(rows[0]) for rows in plan.cross.query_rows]
    lengths = [sum(b - a for a, b in plan.keep[row]) for row in read]
    return plan.cross.key_lengths == lengths


def _columns(slots: Sequence[Sequence[tuple[int, int]]], width: int) -> np.ndarray:
    """(B, width) bool, True in the ranges of each row."""
    valid = np.zeros((len(slots), width), bool)
    for row, ranges in enumerate(slots):
        for start, stop in ranges:
            valid[row, start:stop] = True
    return valid


def _padded(packed: Tensor, valid: np.ndarray, device: torch.device) -> Tensor:
    """(sum of columns, Hkv, D), row after row -> (B, columns, Hkv, D), zero where not valid."""
    batch, width = valid.shape
    if valid.all():
        return packed.view(batch, width, *packed.shape[1:])
    rows = on_device(np.flatnonzero(valid.ravel()), device)
    flat = packed.new_zeros(batch * width, *packed.shape[1:]).index_copy(0, rows, packed)
    return flat.view(batch, width, *packed.shape[1:])
