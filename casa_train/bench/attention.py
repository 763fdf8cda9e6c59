"""Attention over packed segments against one call with a dense mask: time and memory as ratios."""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from casa_train.bench._benchmark import (
    Benchmark,
    Report,
    describe_machine,
    device_and_dtype,
    machine,
)
from casa_train.bench._timing import interleaved, peak_bytes, tensor_bytes
from casa_train.errors import UserError
from casa_train.io.numbers import MIB
from casa_train.io.tables import aligned
from casa_train.modeling.attention import BACKENDS, choose_backend, sdpa_kernels, varlen_attention
from casa_train.modeling.segments import Segments
from casa_train.modeling.windows import Range

METHOD = """\
Linear: the project's varlen_attention, with every backend that runs here. Dense: one call of
scaled_dot_product_attention over the whole pack with a boolean block mask; grouped heads are the
kernel's own on the CPU and repeated on CUDA, where the kernels that take a mask know no groups.
Ratios are dense / linear: above 1 the linear path is better. Outputs and gradients of both are
compared before anything is timed; the difference is relative to the largest of their values.
Time: medians of interleaved calls. Mask and index tables exist before; a model builds them once for
all layers. Memory: the mask or the index tables, plus the most bytes that the tensors of a call
hold at once beyond its inputs (CUDA: the allocator's peak; CPU: every allocation, as torch's
profiler records it). The mask grows with the square of the scale and all else with the scale, so
scaled down the ratios are below those of a whole micro-step.

Layouts, at --scale 1 those of one training micro-step (2,048 text and 20,480 image tokens):
  vision windows   18 images of 952x952 pixels in windows of 112, 16 heads of 80
  casa windows     18 windows, each an image and the text after it, 16/8 heads of 128, causal
  self-attention   8 packed samples of 2,048 text tokens together, 16/8 heads of 128, causal
--scale takes fewer vision windows, and as many windows and samples of fewer tokens. By default it
is 1 on CUDA, and on the CPU 1/32, 1/4 and 1/2 for the three.
"""

IMAGES, IMAGE_TOKENS, TEXT_TOKENS, SAMPLES = 18, 20480, 2048, 8
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
PASSES = ("forward", "forward + backward")


@dataclass(frozen=True)
class Layout:
    """Segments whose queries are the rows 0..Q-1 in order.

    :param heads: query heads, key heads and their width.
    """

    name: str
    queries: list[Range]
    keys: list[list[Range]]
    causal: bool
    heads: tuple[int, int, int]

    @property
    def total_queries(self) -> int:
        return self.queries[-1][1]

    @property
    def total_keys(self) -> int:
        return max(stop for ranges in self.keys for _, stop in ranges)

    def segments(self, device: torch.device) -> Segments:
        return Segments([[q] for q in self.queries], self.keys, causal=self.causal, device=device)

    def mask(self, device: torch.device) -> Tensor:
        """(Q, K) bool, True where attended."""
        mask = torch.zeros(self.total_queries, self.total_keys, dtype=torch.bool, device=device)
        for (a, b), ranges in zip(self.queries, self.keys, strict=True):
            keys = sum(stop - start for start, stop in ranges)
            seen = torch.ones(b - a, keys, dtype=torch.bool, device=device)
            if self.causal:
                seen = seen.tril(keys - (b - a))  # the last query sees every key
            done = 0
            for start, stop in ranges:
                mask[a:b, start:stop] = seen[:, done : done + stop - start]
                done += stop - start
        return mask


def vision_windows(scale: float, generator: np.random.Generator) -> Layout:
    # A 952-pixel image is 34 cells wide: 8 windows of 4 cells and one of 2, in either direction.
    sides = [8] * 8 + [4]  # patches
    one_image = [rows * columns for rows in sides for columns in sides]
    count = max(2, round(scale * IMAGES * len(one_image)))
    lengths = list(itertools.islice(itertools.cycle(one_image), count))
    windows = _consecutive(lengths)
    return Layout("vision windows", windows, [[w] for w in windows], False, (16, 16, 80))


def casa_windows(scale: float, generator: np.random.Generator) -> Layout:
    images, texts = (
        _consecutive(_split(total * scale, IMAGES, generator))
        for total in (IMAGE_TOKENS, TEXT_TOKENS)
    )
    behind = texts[-1][1]  # key rows: text, then images, as the fusion layer has them
    keys = [[(behind + a, behind + b), text] for (a, b), text in zip(images, texts, strict=True)]
    return Layout("casa windows", texts, keys, True, (16, 8, 128))


def self_attention(scale: float, generator: np.random.Generator) -> Layout:
    samples = _consecutive(_split(TEXT_TOKENS * scale, SAMPLES, generator))
    return Layout("self-attention", samples, [[s] for s in samples], True, (16, 8, 128))


# Each layout with its scales on the CPU and on CUDA. Before torch 2.13 the kernels that take a mask
# lose count above 65,536 rows (pytorch issue 187225).
LAYOUTS: dict[Callable[[float, np.random.Generator], Layout], tuple[float, float]] = {
    vision_windows: (1 / 32, 3 / 4),
    casa_windows: (1 / 4, 1.0),
    self_attention: (1 / 2, 1.0),
}


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(Tq, H, D), (Tk, Hkv, D) twice, (Tq, Tk) bool -> (Tq, H, D)."""
    repeat = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    native = repeat > 1 and q.device.type == "cpu"  # the fastest there, and the leanest
    if repeat > 1 and not native:
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    with sdpa_kernels(q.device):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=native)
    return out[0].transpose(0, 1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--scale", type=float, help="share of the micro-step (default: by layout)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls each (default: 3)")


def run(arguments: argparse.Namespace) -> Report:
    """Measures every layout, both passes and every backend.

    :raises UserError: arguments out of range, or a dense mask that does not fit the device.
    """
    if arguments.scale is not None and not 0 < arguments.scale <= 1:
        raise UserError(f"--scale is {arguments.scale}; expected a number above 0 and up to 1.")
    if arguments.repeats < 1:
        raise UserError(f"--repeats is {arguments.repeats}; it must be at least 1.")
    device, dtype = device_and_dtype(arguments)
    rows: list[dict[str, Any]] = []
    for make, scales in tqdm(LAYOUTS.items(), desc="layouts", disable=None):
        scale = arguments.scale or scales[device.type == "cuda"]
        layout = make(scale, np.random.default_rng(arguments.seed))
        try:
            measured = compare(layout, device, dtype, arguments.repeats, arguments.seed)
        except torch.cuda.OutOfMemoryError as error:
            raise UserError(
                f"{layout.name} with a dense mask of {layout.total_queries:,} x "
                f"{layout.total_keys:,} does not fit the device: pass a --scale below {scale}."
            ) from error
        rows += [{"layout": layout.name, "scale": scale, **row} for row in measured]
    facts = machine(device, dtype)
    options = {k: v for k, v in vars(arguments).items() if k not in ("name", "json")}
    text = f"{describe_machine(facts)}\n\n{table(rows)}\n\n{METHOD.partition(chr(10) * 2)[0]}"
    return Report(text, {"machine": facts, "arguments": options, "rows": rows})


def compare(
    layout: Layout, device: torch.device, dtype: torch.dtype, repeats: int, seed: int
) -> list[dict[str, Any]]:
    """The linear path with every backend against the dense mask, on one layout.

    :raises RuntimeError: outputs or gradients that differ.
    """
    heads, kv_heads, width = layout.heads
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.total_queries, heads, width)] + [(layout.total_keys, kv_heads, width)] * 2
    inputs = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for shape in shapes
    ]
    gradient = torch.randn(shapes[0], generator=generator).to(device, dtype)
    segments, mask = layout.segments(device), layout.mask(device)
    attend: dict[str, Callable[..., Tensor]] = {
        backend: functools.partial(varlen_attention, segments=segments, backend=backend)
        for backend in usable_backends(device, dtype)
    }
    attend["dense"] = functools.partial(dense_attention, mask=mask)

    def forward(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, gradient)]

    expected = both(attend["dense"])
    largest = max(float(x.abs().max()) for x in expected)
    differences = {}
    for name, function in attend.items():
        found = both(function)  # also fills the index tables, so that they are counted below
        differences[name] = max(
            float((a - b).abs().max()) / largest for a, b in zip(found, expected, strict=True)
        )
        if not differences[name] <= TOLERANCE[dtype]:
            raise RuntimeError(
                f"{layout.name}: {name} and a dense mask differ by {differences[name]:.1e} of the "
                f"largest value; expected at most {TOLERANCE[dtype]:.0e}"
            )
    del expected, found

    tables = {name: tensor_bytes(vars(segments)) for name in attend} | {"dense": tensor_bytes(mask)}
    rows = []
    for name, call in zip(PASSES, (forward, both), strict=True):
        calls = {path: functools.partial(call, function) for path, function in attend.items()}
        times = interleaved(calls, device, repeats)
        memory = {path: tables[path] + peak_bytes(calls[path], device) for path in calls}
        rows += [
            {
                "segments": len(segments),
                "queries": layout.total_queries,
                "keys": layout.total_keys,
                "pass": name,
                "backend": backend,
                "linear_seconds": times[backend],
                "dense_seconds": times["dense"],
                "time_ratio": times["dense"] / times[backend],
                "linear_bytes": memory[backend],
                "dense_bytes": memory["dense"],
                "memory_ratio": memory["dense"] / memory[backend],
                "difference": differences[backend],
            }
            for backend in attend
            if backend != "dense"
        ]
    return rows


def usable_backends(device: torch.device, dtype: torch.dtype) -> list[str]:
    usable = []
    for backend in BACKENDS:
        try:
            usable.append(choose_backend(backend, device, dtype))
        except ValueError:
            continue
    return list(dict.fromkeys(usable))


def table(rows: list[dict[str, Any]]) -> str:
    head = ["layout", "pass", "backend", "segments", "queries x keys", "linear ms", "dense ms"]
    head += ["time ratio", "linear MiB", "dense MiB", "memory ratio", "difference"]
    cells = [head]
    for row in rows:
        cells.append(
            [
                row["layout"],
                row["pass"],
                row["backend"],
                f"{row['segments']:,}",
                f"{row['queries']:,} x {row['keys']:,}",
                *(f"{row[f'{path}_seconds'] * 1e3:.1f}" for path in ("linear", "dense")),
                f"{row['time_ratio']:.1f}",
                *(f"{row[f'{path}_bytes'] / MIB:,.1f}" for path in ("linear", "dense")),
                f"{row['memory_ratio']:.1f}",
                f"{row['difference']:.0e}",
            ]
        )
    return aligned(cells, left=3)


def _split(total: float, parts: int, generator: np.random.Generator) -> list[int]:
    """About `total` as `parts` whole numbers of different size, each at least 1."""
    weights = generator.uniform(0.5, 1.5, parts)
    return [max(1, round(x)) for x in total * weights / weights.sum()]


def _consecutive(lengths: list[int]) -> list[Range]:
    bounds = np.cumsum([0, *lengths]).tolist()
    return list(itertools.pairwise(bounds))


BENCHMARK = Benchmark(
    measures="time and memory of attention over packed segments, as ratios to a dense mask",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
