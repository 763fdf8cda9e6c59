"""Varlen attention against a dense float64 softmax, on the CPU and by any kernel that is there."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from casa_train.modeling import attention
from casa_train.modeling.attention import BACKENDS, choose_backend, varlen_attention
from casa_train.modeling.segments import Segments
from tests.helpers.tiny import PROPERTY

Ranges = list[tuple[int, int]]


@dataclass(frozen=True)
class Case:
    """Segments over `query_rows` and `key_rows` rows, as ranges."""

    query_rows: int
    key_rows: int
    queries: list[Ranges]
    keys: list[Ranges]
    causal: bool

    def segments(self, device: str = "cpu") -> Segments:
        return Segments(self.queries, self.keys, causal=self.causal, device=device)


def rows_of(ranges: Ranges) -> list[int]:
    """The rows that ranges name, in their order."""
    return [row for start, stop in ranges for row in range(start, stop)]


@st.composite
def ranges(draw: st.DrawFn, rows: int) -> Ranges:
    """Up to three ranges in any order, with gaps, overlaps or nothing at all."""
    pieces = []
    for _ in range(draw(st.sampled_from([2, 1, 3, 2, 1, 0]))):
        start = draw(st.integers(0, rows - 1))
        pieces.append((start, start + draw(st.integers(1, rows - start))))
    return pieces


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Up to five segments; some have no queries or no keys."""
    query_rows, key_rows = draw(st.integers(3, 12)), draw(st.integers(3, 16))
    causal = draw(st.booleans())
    queries = draw(st.lists(ranges(query_rows), min_size=2, max_size=5))
    keys = []
    for query in queries:
        key = draw(ranges(key_rows))
        missing = len(rows_of(query)) - len(rows_of(key))
        if causal and rows_of(key) and missing > 0:
            # Aligned bottom-right, fewer keys than queries would leave queries without any key.
            key = key + [(0, 1)] * missing
        keys.append(key)
    return Case(query_rows, key_rows, queries, keys, causal)


def sees(i: int, j: int, queries: int, keys: int, causal: bool) -> bool:
    """Whether query i of a segment attends to its key j: the last query sees every key."""
    return not causal or queries - 1 - i <= keys - 1 - j


def dense_attention(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """One query after another, one head after another, in the precision of the inputs."""
    outputs = []
    for query_ranges, key_ranges in zip(case.queries, case.keys, strict=True):
        query_rows, key_rows = rows_of(query_ranges), rows_of(key_ranges)
        if not key_rows:
            continue
        for i, query in enumerate(query_rows):
            seen = [
                row
                for j, row in enumerate(key_rows)
                if sees(i, j, len(query_rows), len(key_rows), case.causal)
            ]
            heads = []
            for head in range(q.shape[1]):
                shared = head // (q.shape[1] // k.shape[1])
                scores = k[seen, shared] @ q[query, head] / q.shape[-1] ** 0.5
                heads.append(torch.softmax(scores, dim=0) @ v[seen, shared])
            outputs.append(torch.stack(heads))
    return torch.stack(outputs) if outputs else q[:0]


def random_inputs(case: Case, heads: int, kv_heads: int, width: int, seed: int) -> list[Tensor]:
    """Float64 queries, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(case.query_rows, heads, width)] + [(case.key_rows, kv_heads, width)] * 2
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    ]


def output_and_gradients(out: Tensor, inputs: list[Tensor], seed: int) -> list[Tensor]:
    """The output, and the gradients of a random projection of it."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    # Without any segment the output does not depend on keys and values: their gradient is zero.
    gradients = torch.autograd.grad(
        (out * weights).sum(), inputs, allow_unused=True, materialize_grads=True
    )
    return [out, *gradients]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)], ids=str)
@PROPERTY
@given(case=cases())
def test_sdpa_equals_dense_attention(heads: tuple[int, int], case: Case) -> None:
    """Forward and gradients, with grouped heads, over segments of every kind."""
    inputs = random_inputs(case, *heads, width=8, seed=1)
    found = output_and_gradients(varlen_attention(*inputs, case.segments(), "sdpa"), inputs, 2)
    expected = output_and_gradients(dense_attention(*inputs, case), inputs, 2)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@PROPERTY
@given(cases())
def test_segments_leave_out_what_cannot_attend(case: Case) -> None:
    """Row indices and lengths name the segments with both queries and keys, in order."""
    kept = [
        (rows_of(q), rows_of(k))
        for q, k in zip(case.queries, case.keys, strict=True)
        if rows_of(q) and rows_of(k)
    ]
    segments = case.segments()
    assert len(segments) == len(kept)
    assert segments.query_lengths == [len(q) for q, _ in kept]
    assert segments.key_lengths == [len(k) for _, k in kept]
    assert segments.total_queries == sum(len(q) for q, _ in kept)
    assert segments.query_index.tolist() == [row for q, _ in kept for row in q]
    assert segments.key_index.tolist() == [row for _, k in kept for row in k]
    bounds = [
        [sum(len(pair[side]) for pair in kept[:n]) for n in range(len(kept) + 1)] for side in (0, 1)
    ]
    assert [x.tolist() for x in segments.cu_seqlens] == bounds


@PROPERTY
@given(cases())
def test_rows_in_segment_order_and_their_gradients(case: Case) -> None:
    segments = case.segments()
    for index, once in (
        (segments.query_index, segments.queries_once),
        (segments.key_index, segments.keys_once),
    ):
        assert once == (len(set(index.tolist())) == len(index))
        x = torch.randn(16, 2, 3, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(len(index), 2, 3, dtype=torch.float64)
        found = torch.autograd.grad((attention._rows(x, index, once) * weights).sum(), x)[0]
        (expected,) = torch.autograd.grad((x.index_select(0, index) * weights).sum(), x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_covers_knows_when_no_gather_is_needed() -> None:
    in_order = Segments([[(0, 2)], [(2, 5)]], [[(0, 1), (1, 2)], [(2, 6)]], causal=False)
    assert in_order.covers(5) and not in_order.covers(6)
    assert in_order.identity_keys == 6
    swapped = Segments([[(2, 5)], [(0, 2)]], [[(2, 6)], [(0, 2)]], causal=False)
    assert not swapped.covers(5)
    assert swapped.identity_keys == -1
    gap = Segments([[(0, 2)], [(3, 5)]], [[(0, 2)], [(2, 6)]], causal=False)
    assert not gap.covers(5) and not gap.covers(4)
    nothing_between = Segments([[(0, 2), (9, 9)], [(2, 5)]], [[(1, 2)], [(0, 1)]], causal=False)
    assert nothing_between.covers(5) and nothing_between.identity_keys == -1


def test_causal_is_aligned_bottom_right() -> None:
    """Two queries over four keys with equal scores: the first reads three values, the last all."""
    q, k = torch.zeros(2, 1, 4), torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0))
    v = torch.tensor([1.0, 2.0, 6.0, 11.0])[:, None, None].expand(4, 1, 4)
    out = varlen_attention(q, k, v, Segments([[(0, 2)]], [[(0, 4)]], causal=True), "sdpa")
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([3.0, 5.0]))


def test_order_of_key_ranges_decides_what_a_causal_query_sees() -> None:
    """Keys [2, 3, 0]: the last key of the first query is row 3, not the highest row."""
    q, k = torch.zeros(2, 1, 4), torch.zeros(4, 1, 4)
    v = torch.tensor([1.0, 50.0, 3.0, 8.0])[:, None, None].expand(4, 1, 4)
    segments = Segments([[(1, 2), (0, 1)]], [[(2, 4), (0, 1)]], causal=True)
    out = varlen_attention(q, k, v, segments, "sdpa")
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([5.5, 4.0]))
    assert segments.query_index.tolist() == [1, 0]


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def many_windows(count: int, seed: int) -> Case:
    """Windows as in a pack: 4 to 16 text tokens behind images of 6 to 30 tokens, causal."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(4, 17, (count,), generator=generator).tolist()
    image = torch.randint(6, 31, (count,), generator=generator).tolist()
    queries, keys = [], []
    text_row, image_row = 0, sum(text)
    for t, n in zip(text, image, strict=True):
        queries.append([(text_row, text_row + t)])
        keys.append([(image_row, image_row + n), (text_row, text_row + t)])
        text_row, image_row = text_row + t, image_row + n
    return Case(text_row, image_row, queries, keys, causal=True)


def score_entries(case: Case) -> tuple[int, int]:
    """Attention scores that SDPA computes with its padding, and those of the segments alone."""
    groups, _ = case.segments().groups
    padded = sum(math.prod(g.query.shape) * g.key.shape[1] for g in groups)
    real = sum(
        len(rows_of(q)) * len(rows_of(k)) for q, k in zip(case.queries, case.keys, strict=True)
    )
    return padded, real


@PROPERTY
@given(cases())
def test_padding_stays_a_fraction_of_the_scores(case: Case) -> None:
    padded, real = score_entries(case)
    assert real <= padded <= 1.5 * real


def test_cpu_path_is_not_quadratic_in_the_pack() -> None:
    """Twice the windows cost twice the scores, and no tensor is as large as a pack's square."""
    for count in (50, 100, 200):
        case = many_windows(count, seed=count)
        padded, real = score_entries(case)
        assert padded <= 1.5 * real
        assert real <= 16 * 46 * count  # the longest window there is
        # Windows of like lengths share a call, so calls do not grow with the windows either.
        assert len(case.segments().groups[0]) < 30

    inputs = random_inputs(case, heads=2, kv_heads=1, width=8, seed=0)
    largest = LargestTensor()
    with largest:
        out = varlen_attention(*inputs, case.segments(), "sdpa")
        out.sum().backward()
    assert largest.elements < case.query_rows**2 / 4


def test_windows_of_one_shape_take_one_unmasked_call() -> None:
    same = [[(9 * i, 9 * i + 9)] for i in range(40)]
    (group,), _ = Segments(same, same, causal=True).groups
    assert group.query.shape == group.key.shape == (40, 9)
    assert group.mask is None and group.causal


def test_backends_that_cannot_run_are_refused_by_name() -> None:
    cpu = torch.device("cpu")
    assert choose_backend("auto", cpu, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="'flash'.*choose one of.*torch_varlen"):
        choose_backend("flash", cpu, torch.float32)
    for name in BACKENDS:
        if name not in ("auto", "sdpa"):
            with pytest.raises(ValueError, match=f"'{name}' cannot run with torch.bfloat16 on cpu"):
                choose_backend(name, cpu, torch.bfloat16)


def need(backend: str) -> None:
    """Skips the test, saying what is missing here."""
    if backend == "flash_attn" and attention.flash_attn_varlen_func is None:
        pytest.skip("the flash-attn package is not installed")
    if backend == "torch_varlen" and attention.varlen_attn is None:
        pytest.skip("torch_varlen: torch.nn.attention.varlen is not in this torch")


def kernel_cases() -> dict[str, Case]:
    """Segments that kernels must take; some lose queries or keys, some lie out of order."""
    return {
        "windows": many_windows(12, seed=3),
        # An image without text, text without an image, both at once, and both missing.
        "windows without text or image": Case(
            query_rows=14,
            key_rows=74,
            queries=[[], [(0, 6)], [(6, 11)], [], [(11, 14)]],
            keys=[[(14, 40)], [(0, 6)], [(40, 70), (6, 11)], [], [(70, 74), (11, 14)]],
            causal=True,
        ),
        "only windows that attend to nothing": Case(
            query_rows=5,
            key_rows=9,
            queries=[[], [(0, 5)]],
            keys=[[(0, 9)], []],
            causal=True,
        ),
        "gaps and another order, causal": Case(
            query_rows=40,
            key_rows=90,
            queries=[[(30, 40), (3, 9)], [], [(10, 11)], [(12, 20)], [(0, 3)]],
            keys=[[(50, 90), (0, 30)], [(0, 9)], [(20, 60)], [], [(80, 90), (40, 45), (40, 45)]],
            causal=True,
        ),
        "gaps and overlaps, not causal": Case(
            query_rows=30,
            key_rows=50,
            queries=[[(20, 30), (0, 5)], [(7, 8)], [(5, 20)]],
            keys=[[(3, 4)], [(40, 50), (0, 33)], [(30, 50), (10, 35)]],
            causal=False,
        ),
        # One query a segment, as in a decoding step: kernels treat it in a way of their own, and
        # torch's fails with grouped heads where another segment has no query at all.
        "one query each, causal": one_query_each(causal=True),
        "one query each, not causal": one_query_each(causal=False),
        # Longer than the tiles in which kernels walk over queries and keys.
        "long segments": Case(
            query_rows=150,
            key_rows=430,
            queries=[[(0, 140)], [(140, 150)]],
            keys=[[(150, 430), (0, 140)], [(140, 150)]],
            causal=True,
        ),
    }


def one_query_each(causal: bool) -> Case:
    return Case(
        query_rows=4,
        key_rows=60,
        queries=[[(0, 1)], [(1, 2)], [], [(2, 3)], [(3, 4)]],
        keys=[[(0, 7)], [(7, 30)], [(10, 20)], [(30, 31)], [(31, 60)]],
        causal=causal,
    )


KERNEL_CASES = kernel_cases()
# Query and key heads: grouped, the usual, all queries on one key head.
KERNEL_HEADS = [(4, 2), (2, 2), (4, 1)]
# Largest error, as a share of the largest value, of results in these precisions.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def check_kernel(
    backend: str, device: str, name: str, heads: tuple[int, int], width: int, dtype: torch.dtype
) -> None:
    """Forward and backward in `dtype` against float64 of the same rounded inputs."""
    case = KERNEL_CASES[name]
    rounded = [
        x.detach().to(dtype).double().requires_grad_()
        for x in random_inputs(case, *heads, width=width, seed=4)
    ]
    expected = output_and_gradients(dense_attention(*rounded, case), rounded, 5)
    inputs = [x.detach().to(device, dtype).requires_grad_() for x in rounded]
    out = varlen_attention(*inputs, case.segments(device), backend)
    assert out.dtype == dtype
    found = output_and_gradients(out, inputs, 5)
    results = ("output", "gradient of q", "gradient of k", "gradient of v")
    for result, a, b in zip(results, found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel() == 0 or b.abs().max() == 0:
            assert not a.any(), (name, heads, result)
            continue
        error = (a.detach().cpu().double() - b).abs().max() / b.abs().max()
        assert error < TOLERANCES[dtype], (name, heads, result, float(error))
    with torch.no_grad():  # single queries go another way where no gradient is wanted
        again = varlen_attention(*inputs, case.segments(device), backend)
    assert again.shape == out.shape
    if again.numel():
        error = (again - out).abs().max() / out.abs().max().clamp_min(1e-6)
        assert error < TOLERANCES[dtype], (name, heads, "without gradients", float(error))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("heads", KERNEL_HEADS, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES)
def test_cpu_attention_equals_dense_attention(
    case: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    check_kernel("sdpa", "cpu", case, heads, width=80, dtype=dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("width", [64, 80, 128])
@pytest.mark.parametrize("backend", ["flash_attn", "torch_varlen", "sdpa"])
def test_gpu_kernels_equal_dense_attention(backend: str, width: int, dtype: torch.dtype) -> None:
    need(backend)
    for case, heads in itertools.product(KERNEL_CASES, KERNEL_HEADS):
        check_kernel(backend, "cuda", case, heads, width, dtype)


@pytest.mark.parametrize("heads", [2, 6])
def test_a_row_reads_the_columns_in_use(heads: int) -> None:
    """The short way of a CPU, and the general one for one row and for several."""
    generator = torch.Generator().manual_seed(11)
    options = dict(generator=generator, dtype=torch.float64)
    q = torch.randn(3, heads, 8, **options)
    buffers = [torch.randn(3, 50, 2, 8, **options) for _ in range(2)]
    k, v = (x[:, :37] for x in buffers)
    wide_k, wide_v = (x.repeat_interleave(heads // 2, dim=2) for x in (k, v))
    scores = torch.einsum("bhd,bnhd->bhn", q, wide_k) / math.sqrt(8)
    expected = torch.einsum("bhn,bnhd->bhd", scores.softmax(-1), wide_v).flatten(1)
    general = attention.one_query_attention(q, k, v, None, torch.zeros(0), "sdpa")
    torch.testing.assert_close(general, expected, rtol=0, atol=1e-12)
    few = attention.FEW_KEYS
    for row in range(3):
        one = q[row : row + 1]
        assert attention.short_way(one, few) and not attention.short_way(one, few + 1)
        found = attention.one_row_attention(one, *(x[row : row + 1] for x in buffers), 37)
        torch.testing.assert_close(found[0], expected[row], rtol=0, atol=1e-12)
    assert not attention.short_way(q, 37) and not attention.short_way(q[:1].half(), 37)
