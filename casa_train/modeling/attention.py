"""Attention over packed segments: flash-attn, torch's varlen kernel and SDPA behind one call.

What attends to what are the segments of `segments.py`. No backend is quadratic in the packed
length.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .segments import Segments

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None  # type: ignore[assignment]

BACKENDS = ("auto", "flash_attn", "torch_varlen", "sdpa")
# On a CPU a query reads so many keys sooner by three products than by SDPA, whose kernel is a tenth
# faster from 2,000 on.
FEW_KEYS = 1024
SCORES_AT_ONCE = 1 << 24  # of `attention_on`, over all heads


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
        q = _rows(q, segments.query_index, segments.queries_once)
    if segments.identity_keys != k.shape[0]:
        k, v = (_rows(x, segments.key_index, segments.keys_once) for x in (k, v))
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


def _rows(x: Tensor, index: Tensor, once: bool) -> Tensor:
    """x.index_select(0, index).

    :param once: no row is taken twice: then no two gradients meet in one.
    """
    rows: Tensor = _TakeOnce.apply(x, index) if once else x.index_select(0, index)
    return rows


class _TakeOnce(torch.autograd.Function):
    """Its backward pass copies rows where that of `index_select` adds them up atomically, four
    times slower on a GPU, and in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, index, grad), None


def takes_length(backend: str) -> bool:
    """Whether a backend reads the length of one row's keys on the device, splits long ones over
    the whole GPU, and so needs no mask.
    """
    return backend in ("flash_attn", "torch_varlen")


def one_query_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, ends: Tensor, backend: str
) -> Tensor:
    """Attention of one query a row over its row's keys, scaled by D ** -0.5.

    :param q: (B, H, D).
    :param k: (B, n, Hkv, D), as is v.
    :param mask: (B, n) bool, keys that a row reads; a row that reads none gets anything, NaN too.
    :param ends: (2, 2) int32 [[0, 1], [0, keys in use]]: what a single row without a mask reads, on
        backends that `takes_length` names.
    :return: (B, H * D).
    """
    if mask is None and takes_length(backend):
        # Not causal: so kernels split the keys of a single query.
        around = ends[0], ends[1], 1, k.shape[1]
        if backend == "flash_attn":
            out: Tensor = flash_attn_varlen_func(q, k[0], v[0], *around, causal=False)
        else:
            out = _torch_varlen()(q, k[0], v[0], *around, (-1, -1))
        return out.flatten(1)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    # The heads that share a key head stand as its queries.
    grouped = q.unflatten(1, (k.shape[1], -1))
    seen = None if mask is None else mask[:, None, None]
    with sdpa_kernels(q.device):
        read = F.scaled_dot_product_attention(grouped, k, v, attn_mask=seen)
    return read.flatten(1)


def short_way(q: Tensor, columns: int) -> bool:
    """Whether `one_row_attention` reads so many columns sooner than `one_query_attention`."""
    one = q.is_cpu and len(q) == 1 and columns <= FEW_KEYS
    return one and q.dtype in (torch.float32, torch.float64)


def one_row_attention(q: Tensor, k: Tensor, v: Tensor, columns: int) -> Tensor:
    """As `one_query_attention`, of a single row over the first columns of whole buffers, by three
    products: on a CPU, the way to SDPA's kernel takes longer than these.

    :param k: (1, capacity, Hkv, D), contiguous as is v.
    """
    _, _, heads, width = k.shape
    row, none = heads * width, _nothing(q.dtype)
    keys = k.as_strided((heads, width, columns), (width, 1, row))
    values = v.as_strided((heads, columns, width), (width, row, 1))
    grouped = q.view(heads, -1, width)
    scores = torch.baddbmm(none, grouped, keys, beta=0, alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1), values).view(1, -1)


@functools.cache
def _nothing(dtype: torch.dtype) -> Tensor:
    return torch.zeros(1, 1, 1, dtype=dtype, device="cpu")


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

    From the scores themselves, segment by segment and some queries at once: slower than
    `varlen_attention`, for a look.

    :param q: (Tq, H, D); :param k: (Tk, Hkv, D), as for `varlen_attention`.
    :param rows: (R,) int64, the queries asked for.
    :param marked: (Tk,) bool.
    :return: (R,) shares from 0 to 1, at least float32; NaN for queries of no segment.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    wanted = rows.cpu().numpy()
    shares = torch.full(rows.shape, torch.nan, dtype=wide, device=q.device)
    for queries, keys in zip(segments.query_rows, segments.key_rows, strict=True):
        every = np.flatnonzero(np.isin(wanted, queries))
        of_keys = torch.from_numpy(keys).to(q.device)
        order = np.argsort(queries)
        some = max(1, SCORES_AT_ONCE // (q.shape[1] * max(1, len(keys))))
        for asked in np.split(every, range(some, len(every), some)) if len(every) else []:
            of_asked = torch.from_numpy(asked).to(q.device)
            scores = torch.einsum("rhd,khd->hrk", q[rows[of_asked]].to(wide), k[of_keys].to(wide))
            if segments.causal:
                # Where each asked row stands in its segment, whose last query sees every key.
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
