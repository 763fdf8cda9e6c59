"""Which queries attend to which keys: segments of packed rows, laid out for attention kernels.

A *segment* is a set of queries that attend to a set of keys and to nothing else; within a causal
segment the mask is aligned bottom-right, so the last query sees every key. Samples, windows and
vision windows are all segments.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .windows import Range

# Padding in an SDPA batch may cost at most this factor in attention scores.
PADDING_LIMIT = 1.5


@dataclass
class _Rows:
    """(b, n) rows of a tensor; `start` is the first where they are consecutive: then a view will
    do.
    """

    shape: tuple[int, int]
    start: int | None
    index: Tensor | None  # (b * n,) int64, None where they are consecutive

    def gather(self, x: Tensor) -> Tensor:
        """(Tx, H, D) -> (b, H, n, D)."""
        b, n = self.shape
        if self.index is not None:
            picked = x.index_select(0, self.index)
        else:
            picked = x.narrow(0, self.start or 0, b * n)
        return picked.view(b, n, *x.shape[1:]).transpose(1, 2)


@dataclass
class _Group:
    """Segments of similar lengths, padded into one SDPA batch of b rows."""

    query: _Rows  # (b, q) rows of the query tensor
    key: _Rows  # (b, k) rows of the key tensor
    mask: Tensor | None  # (b, 1, q, k) bool, True where attended; None: no mask needed
    causal: bool  # SDPA's own causal flag


class Segments:
    """Which queries attend to which keys.

    Built on the host from ranges, so no attention call ever waits for the device.

    :param queries: for each segment, the ranges of query rows it is made of, in order.
    :param keys: for each segment, the ranges of key rows; a segment without queries or without keys
        is left out.
    :param causal: query i of q sees the keys j <= i + k - q of its k keys.
    """

    def __init__(
        self,
        queries: Sequence[Sequence[Range]],
        keys: Sequence[Sequence[Range]],
        causal: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        self.causal = causal
        self.device = torch.device(device)
        self._query_ranges: list[Sequence[Range]] = []
        self._key_ranges: list[Sequence[Range]] = []
        self.query_lengths: list[int] = []
        self.key_lengths: list[int] = []
        for query, key in zip(queries, keys, strict=True):
            q, k = _length(query), _length(key)
            if q and k:
                self._query_ranges.append(query)
                self._key_ranges.append(key)
                self.query_lengths.append(q)
                self.key_lengths.append(k)

    def __len__(self) -> int:
        """The number of segments."""
        return len(self.query_lengths)

    def to(self, device: torch.device | str | int) -> Segments:
        """The same segments with their tensors on another device."""
        other = copy.copy(self)
        for name in ("query_index", "key_index", "cu_seqlens", "groups"):
            other.__dict__.pop(name, None)
        other.device = torch.device(device)  # accelerate names it by a number or a string
        return other

    @property
    def total_queries(self) -> int:
        return sum(self.query_lengths)

    @property
    def pairs(self) -> int:
        """Attended (query, key) pairs."""
        lengths = zip(self.query_lengths, self.key_lengths, strict=True)
        if not self.causal:
            return sum(q * k for q, k in lengths)
        return sum(q * (k - q) + q * (q + 1) // 2 for q, k in lengths)

    @functools.cached_property
    def query_rows(self) -> list[np.ndarray]:
        """The query rows of each segment."""
        return [_rows(ranges) for ranges in self._query_ranges]

    @functools.cached_property
    def key_rows(self) -> list[np.ndarray]:
        """The key rows of each segment."""
        return [_rows(ranges) for ranges in self._key_ranges]

    @functools.cached_property
    def _query_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _bounds(self._query_ranges)

    @functools.cached_property
    def _key_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return _bounds(self._key_ranges)

    @functools.cached_property
    def query_index(self) -> Tensor:
        """(Q,) int64: the query rows in segment order."""
        return self._tensor(_joined_rows(*self._query_bounds))

    @functools.cached_property
    def key_index(self) -> Tensor:
        """(K,) int64: the key rows in segment order."""
        return self._tensor(_joined_rows(*self._key_bounds))

    @functools.cached_property
    def cu_seqlens(self) -> tuple[Tensor, Tensor]:
        """Cumulative query and key lengths, two (segments + 1,) int32 tensors."""
        bounds = [
            self._tensor(np.cumsum([0, *lengths]).astype(np.int32))
            for lengths in (self.query_lengths, self.key_lengths)
        ]
        return bounds[0], bounds[1]

    def covers(self, rows: int) -> bool:
        """Whether the queries are exactly the rows 0..rows-1 in order, so no gather is needed."""
        return self.identity_queries == rows

    @functools.cached_property
    def identity_queries(self) -> int:
        """The number of query rows if the queries are 0..Q-1 in order, otherwise -1."""
        return _identity(*self._query_bounds)

    @functools.cached_property
    def identity_keys(self) -> int:
        """The number of key rows if the keys are 0..K-1 in order, otherwise -1."""
        return _identity(*self._key_bounds)

    @functools.cached_property
    def queries_once(self) -> bool:
        """Whether no row is a query twice."""
        return _once(*self._query_bounds)

    @functools.cached_property
    def keys_once(self) -> bool:
        """Whether no row is a key twice, as in windows that share none."""
        return _once(*self._key_bounds)

    @functools.cached_property
    def groups(self) -> tuple[list[_Group], Tensor]:
        """SDPA batches, and for every query its row in their flattened, concatenated outputs."""
        shapes = list(zip(self.key_lengths, self.query_lengths, strict=True))
        groups: list[list[int]] = []
        members: list[int] = []
        cost = longest_k = longest_q = 0
        for i in sorted(range(len(shapes)), key=shapes.__getitem__):
            k, q = shapes[i]
            next_k, next_q = max(longest_k, k), max(longest_q, q)
            padded = (len(members) + 1) * next_k * next_q
            if members and padded > PADDING_LIMIT * (cost + k * q):
                groups.append(members)
                members, cost, next_k, next_q = [], 0, k, q
            members.append(i)
            cost += k * q
            longest_k, longest_q = next_k, next_q
        if members:
            groups.append(members)

        queries, keys = _joined_rows(*self._query_bounds), _joined_rows(*self._key_bounds)
        q_lengths, k_lengths = np.array(self.query_lengths), np.array(self.key_lengths)
        positions = np.zeros(self.total_queries, np.int64)
        built: list[_Group] = []
        row = 0
        for members in groups:
            q_len, k_len = q_lengths[members], k_lengths[members]
            q_max, k_max = int(q_len.max()), int(k_len.max())
            of_queries, real = _table_of(q_lengths, members, q_max)
            of_keys, real_keys = _table_of(k_lengths, members, k_max)
            query = np.where(real, queries[of_queries], 0)
            key = np.where(real_keys, keys[of_keys], 0)
            positions[of_queries[real]] = row + np.flatnonzero(real)
            row += query.size
            padded = bool((q_len < q_max).any() or (k_len < k_max).any())
            square = self.causal and not padded and q_max == k_max
            mask = None
            if padded or (self.causal and not square and q_max > 1):
                column = np.arange(k_max)[None, None, :]
                mask = column < k_len[:, None, None]
                if self.causal:
                    # Padding queries would see no key at all (NaN): let them see as the last one.
                    line = np.minimum(np.arange(q_max)[None, :, None], q_len[:, None, None] - 1)
                    mask = mask & (column <= line + (k_len - q_len)[:, None, None])
                else:
                    mask = np.broadcast_to(mask, (len(members), q_max, k_max)).copy()
                mask = mask[:, None]
            built.append(
                _Group(
                    self._table(query),
                    self._table(key),
                    None if mask is None else self._tensor(mask),
                    causal=square and q_max > 1,
                )
            )
        return built, self._tensor(positions)

    def _table(self, rows: np.ndarray) -> _Rows:
        flat = rows.ravel()
        if (flat == flat[0] + np.arange(flat.size)).all():
            return _Rows(rows.shape, int(flat[0]), None)
        return _Rows(rows.shape, None, self._tensor(flat))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device(array, self.device)


def on_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor there; the host does not wait for what a GPU is doing meanwhile."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # from ordinary memory the copy would wait
    return tensor.to(device, non_blocking=True)


def _length(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _rows(ranges: Sequence[Range]) -> np.ndarray:
    return _join([np.arange(start, stop) for start, stop in ranges])


def _join(pieces: Sequence[np.ndarray]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _bounds(ranges: Sequence[Sequence[Range]]) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of all ranges of all segments, in order."""
    flat = [bound for parts in ranges for pair in parts for bound in pair]
    pairs = np.array(flat, np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1] - pairs[:, 0]


def _joined_rows(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The rows of all ranges, one after another; at once, as a pack has thousands of windows."""
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def _identity(starts: np.ndarray, lengths: np.ndarray) -> int:
    """The number of rows if they are 0, 1, 2, ..., otherwise -1."""
    consecutive = (starts == np.cumsum(lengths) - lengths)[lengths > 0].all()
    return int(lengths.sum()) if consecutive else -1


def _table_of(lengths: np.ndarray, members: list[int], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the rows of some segments stand among the joined rows of all.

    :return: (members, width), the last row repeated as padding; and what of it is none.
    """
    column, own = np.arange(width), lengths[members][:, None]
    starts = (np.cumsum(lengths) - lengths)[members][:, None]
    return starts + np.minimum(column, own - 1), column < own


def _once(starts: np.ndarray, lengths: np.ndarray) -> bool:
    """Whether ranges share no row."""
    order = np.argsort(starts[lengths > 0], kind="stable")
    starts, lengths = starts[lengths > 0][order], lengths[lengths > 0][order]
    return bool((starts[1:] >= (starts + lengths)[:-1]).all())
