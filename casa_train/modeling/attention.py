"""Attention over packed segments: flash-attn, torch's varlen kernel and SDPA behind one call.

A *segment* is a set of queries that attend to a set of keys and to nothing else; within a causal
segment the mask is aligned bottom-right, so the last query sees every key. Samples, windows and
vision windows are all segments. No backend is quadratic in the packed length.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .windows import Range

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

BACKENDS = ("auto", "flash_attn", "torch_varlen", "sdpa")
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
        pairs = [
            (q, k)
            for q, k in zip(map(_rows, queries), map(_rows, keys), strict=True)
            if len(q) and len(k)
        ]
        self.causal = causal
        self.device = torch.device(device)
        self._queries = [q for q, _ in pairs]
        self._keys = [k for _, k in pairs]
        self.query_lengths = [len(q) for q in self._queries]
        self.key_lengths = [len(k) for k in self._keys]

    def __len__(self) -> int:
        """The number of segments."""
        return len(self._queries)

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

    @functools.cached_property
    def query_index(self) -> Tensor:
        """(Q,) int64: the query rows in segment order."""
        return self._tensor(_join(self._queries))

    @functools.cached_property
    def key_index(self) -> Tensor:
        """(K,) int64: the key rows in segment order."""
        return self._tensor(_join(self._keys))

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
        return _identity(_join(self._queries))

    @functools.cached_property
    def identity_keys(self) -> int:
        """The number of key rows if the keys are 0..K-1 in order, otherwise -1."""
        return _identity(_join(self._keys))

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

        starts = np.cumsum([0, *self.query_lengths])
        positions = np.zeros(self.total_queries, np.int64)
        built: list[_Group] = []
        row = 0
        for members in groups:
            q_len = np.array([self.query_lengths[i] for i in members])
            k_len = np.array([self.key_lengths[i] for i in members])
            q_max, k_max = int(q_len.max()), int(k_len.max())
            query = np.zeros((len(members), q_max), np.int64)
            key = np.zeros((len(members), k_max), np.int64)
            for b, i in enumerate(members):
                query[b, : q_len[b]] = self._queries[i]
                key[b, : k_len[b]] = self._keys[i]
                positions[starts[i] : starts[i + 1]] = row + b * q_max + np.arange(q_len[b])
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


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype) -> str:
    """The attention backend that will run: `requested`, or the fastest available for "auto".

    :raises ValueError: an unknown backend, or one that cannot run here.
    """
    if requested not in BACKENDS:
        raise ValueError(f"attention backend {requested!r} is unknown; choose one of {BACKENDS}")
    half = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and _ampere(device)
    available = {
        "flash_attn": half and flash_attn_varlen_func is not None,
        "torch_varlen": half and varlen_attn is not None,
        "sdpa": True,
    }
    if requested == "auto":
        return next(name for name, usable in available.items() if usable)
    if not available[requested]:
        raise ValueError(
            f"attention backend {requested!r} cannot run with {dtype} on {device.type}: it needs a "
            "CUDA device of compute capability 8.0 (Ampere), bfloat16 or float16, and "
            + ("the flash-attn package" if requested == "flash_attn" else "torch >= 2.10")
            + ". Use 'auto' or 'sdpa'."
        )
    return requested


@functools.cache
def _ampere(device: torch.device) -> bool:
    """Whether the varlen kernels run on this GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, backend: str = "auto"
) -> Tensor:
    """Softmax attention of every segment's queries over its keys, scaled by D ** -0.5.

    :param q: (Tq, H, D); `segments` names its rows.
    :param k: (Tk, Hkv, D) with H a multiple of Hkv.
    :param v: (Tk, Hkv, D).
    :return: (Q, H, D), the segments' queries one after another (`segments.query_index`).
    """
    if len(segments) == 0:
        return q[:0]
    chosen = "meta" if q.is_meta else choose_backend(backend, q.device, q.dtype)
    if chosen == "sdpa":
        return _sdpa(q, k, v, segments)
    if not segments.covers(q.shape[0]):
        q = q.index_select(0, segments.query_index)
    if segments.identity_keys != k.shape[0]:
        k, v = (x.index_select(0, segments.key_index) for x in (k, v))
    if chosen == "meta":
        shape: Tensor = _OnMeta.apply(q, k, v)
        return shape
    cu_q, cu_k = segments.cu_seqlens
    max_q, max_k = max(segments.query_lengths), max(segments.key_lengths)
    causal = segments.causal
    if max_q == 1 and not torch.is_grad_enabled():
        # A single query sees every key. Said so, the kernels split long caches over the whole GPU.
        causal = False
    else:
        # A longest query of 1 would make kernels reshape GQA groups into the query axis, for which
        # there is no backward pass; any upper bound is allowed.
        max_q = max(2, max_q)
    if chosen == "flash_attn":
        # torch's own kernels ask for themselves.
        deterministic = torch.are_deterministic_algorithms_enabled()
        out: Tensor = flash_attn_varlen_func(
            q, k, v, cu_q, cu_k, max_q, max_k, causal=causal, deterministic=deterministic
        )
        return out
    window = (-1, 0) if causal else (-1, -1)
    return _torch_varlen()(q, k, v, cu_q, cu_k, max_q, max_k, window)


class _OnMeta(torch.autograd.Function):
    """Attention on the meta device: nothing is computed, and autograd saves what it does for the
    varlen kernels, so that memory can be counted without any.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(q.shape)
        log_sums = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.new_empty(x.shape) for x in ctx.saved_tensors[:3])
        return q, k, v


def attention_on(q: Tensor, k: Tensor, segments: Segments, rows: Tensor, marked: Tensor) -> Tensor:
    """How much of their attention some queries pay to marked keys, mean over heads.

    From the scores themselves, segment by segment: slower than `varlen_attention`, for a look.

    :param q: (Tq, H, D); :param k: (Tk, Hkv, D), as for `varlen_attention`.
    :param rows: (R,) int64, the queries asked for.
    :param marked: (Tk,) bool.
    :return: (R,) shares from 0 to 1, at least float32; NaN for queries of no segment.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    wanted = rows.cpu().numpy()
    shares = torch.full(rows.shape, torch.nan, dtype=wide, device=q.device)
    for queries, keys in zip(segments._queries, segments._keys, strict=True):
        asked = np.flatnonzero(np.isin(wanted, queries))
        if not len(asked):
            continue
        of_keys = torch.from_numpy(keys).to(q.device)
        of_asked = torch.from_numpy(asked).to(q.device)
        scores = torch.einsum("rhd,khd->hrk", q[rows[of_asked]].to(wide), k[of_keys].to(wide))
        if segments.causal:
            # Where each asked row stands in its segment, whose last query sees every key.
            order = np.argsort(queries)
            place = order[np.searchsorted(queries, wanted[asked], sorter=order)]
            last = place + (len(keys) - len(queries))
            hidden = torch.from_numpy(np.arange(len(keys)) > last[:, None]).to(q.device)
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = (scores * q.shape[-1] ** -0.5).softmax(-1)
        shares[of_asked] = (weights * marked[of_keys]).sum(-1).mean(0)
    return shares


@functools.cache
def _torch_varlen() -> Callable[..., Tensor]:
    """torch's varlen_attn under one signature: 2.10 and 2.11 know neither window_size nor gqa
    flag.
    """
    parameters = inspect.signature(varlen_attn).parameters

    def call(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        window: tuple[int, int],
    ) -> Tensor:
        extra: dict[str, Any] = {}
        if "enable_gqa" in parameters:
            extra["enable_gqa"] = q.shape[1] != k.shape[1]
        if "window_size" in parameters:
            extra["window_size"] = window
        else:
            extra["is_causal"] = window == (-1, 0)
        result: Any = varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, **extra)
        return torch.as_tensor(result)

    return call


def _sdpa(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    groups, positions = segments.groups
    repeat = q.shape[1] // k.shape[1]
    outputs = []
    for group in groups:
        gq, gk, gv = group.query.gather(q), group.key.gather(k), group.key.gather(v)
        native = False
        if repeat > 1 and gq.shape[2] == 1:
            # One query a segment: its heads stand as queries of the key head they share.
            gq = gq.reshape(gq.shape[0], -1, repeat, gq.shape[-1])
        elif repeat > 1 and q.device.type == "cpu":
            native = True
        elif repeat > 1:
            gk, gv = (x.repeat_interleave(repeat, dim=1) for x in (gk, gv))
        with sdpa_kernels(q.device):
            out = F.scaled_dot_product_attention(
                gq, gk, gv, attn_mask=group.mask, is_causal=group.causal, enable_gqa=native
            )
        out = out.reshape(out.shape[0], q.shape[1], -1, out.shape[-1])
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, positions)


def sdpa_kernels(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Keeps SDPA from cuDNN's kernels, which prepare every new shape for half a second and have
    been wrong under masks (pytorch issues 193893 and 196678); shapes change with every pack.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    allowed: contextlib.AbstractContextManager[None] = sdpa_kernel(list(kernels))
    return allowed


def _rows(ranges: Sequence[Range]) -> np.ndarray:
    return _join([np.arange(start, stop) for start, stop in ranges])


def _join(pieces: Sequence[np.ndarray]) -> np.ndarray:
    if len(pieces) == 1:
        return pieces[0]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def _identity(rows: np.ndarray) -> int:
    """The number of rows if they are 0, 1, 2, ..., otherwise -1."""
    return len(rows) if bool((rows == np.arange(len(rows))).all()) else -1
