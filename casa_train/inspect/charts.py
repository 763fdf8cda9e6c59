"""Histograms as geometry: where bars stand and what they say. The page's template draws them.

A drawing is WIDTH x HEIGHT units. Bars are stacked by series, so a chart of all samples also tells
the sources apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 320, 120
BINS = 24
ROUND = (1, 2, 2.5, 5, 10)
GREY = 8  # the series of what belongs to no source


@dataclass(frozen=True)
class Rect:
    """:param series: whose colour it takes; :param strength: opacity."""

    x: float
    y: float
    width: float
    height: float
    series: int
    label: str
    strength: float = 1.0


@dataclass(frozen=True)
class Chart:
    """:param note: beside the title; :param x, y: positions of ticks and their texts."""

    title: str
    note: str
    rects: list[Rect]
    x: list[tuple[float, str]]
    y: list[tuple[float, str]]


def histogram(
    title: str,
    series: Sequence[np.ndarray],
    edges: np.ndarray | None = None,
    percent: bool = False,
    first: int = 0,
) -> Chart:
    """Counts of the values of every series, stacked. Values beyond the last edge join its bar.

    :param edges: of the bars; None: round ones that hold all but the longest half percent.
    :param percent: values are shares.
    :param first: number of the first series; the others follow.
    """
    everything = np.concatenate([np.asarray(values) for values in series])
    if len(everything) == 0:
        return Chart(title, "nothing to count", [], [], [])
    edges = bars_of(everything) if edges is None else edges
    width = edges[1] - edges[0]
    beyond = bool((everything >= edges[-1]).any()) and not percent
    last = edges[-1] - width / 2
    counts = [np.histogram(np.minimum(values, last), edges)[0] for values in series]
    highest = max(1, int(np.sum(counts, axis=0).max()))
    step = WIDTH / (len(edges) - 1)
    rects = []
    for i in range(len(edges) - 1):
        y = float(HEIGHT)
        total = sum(int(c[i]) for c in counts)
        name = _range(edges[i], edges[i + 1], percent, beyond and i == len(edges) - 2)
        for number, count in enumerate(c[i] for c in counts):
            if count:
                height = HEIGHT * float(count) / highest
                y -= height
                label = f"{name}: {total:,} ({total / len(everything):.1%})"
                rects.append(Rect(i * step + 0.5, y, step - 1, height, first + number, label))
    middle, mean, most = (
        f"{value:.1%}" if percent else _short(value)
        for value in (np.median(everything), everything.mean(), everything.max())
    )
    note = f"median {middle}, mean {mean}, most {most}"
    y_ticks = [(HEIGHT - HEIGHT * v / highest, _short(v)) for v in ticks(0, highest, 3)]
    return Chart(title, note, rects, list(_x_ticks(edges, percent, beyond)), y_ticks)


def sizes(title: str, widths: np.ndarray, heights: np.ndarray) -> Chart:
    """Widths against heights of images on logarithmic axes; the darker, the more images."""
    if len(widths) == 0:
        return Chart(title, "no images", [], [], [])
    low, high = float(min(widths.min(), heights.min())), float(max(widths.max(), heights.max()))
    low, high = math.floor(math.log2(low) * 2) / 2, math.ceil(math.log2(high) * 2) / 2
    high = max(high, low + 2)
    cells = round((high - low) * 4)  # four for each doubling
    edges = np.linspace(low, high, cells + 1)
    edges[-1] += 1e-9
    counts, _, _ = np.histogram2d(np.log2(widths), np.log2(heights), [edges, edges])
    most = counts.max()
    rects = []
    for i, j in np.argwhere(counts):
        x, y = WIDTH * i / cells, HEIGHT - HEIGHT * (j + 1) / cells
        label = (
            f"{2 ** edges[i]:.0f}–{2 ** edges[i + 1]:.0f} wide, "
            f"{2 ** edges[j]:.0f}–{2 ** edges[j + 1]:.0f} high: {counts[i, j]:,.0f}"
        )
        strength = 0.4 + 0.6 * math.sqrt(counts[i, j] / most)
        rects.append(Rect(x, y, WIDTH / cells, HEIGHT / cells, GREY, label, strength))
    powers = range(math.ceil(low), math.floor(high) + 1)
    note = (
        f"width → and height ↑ in pixels, median {np.median(widths):.0f}×{np.median(heights):.0f}, "
        f"largest {(widths.astype(np.int64) * heights).max() / 1e6:.2g} megapixels"
    )
    place = [(p, (p - low) / (high - low)) for p in powers]
    return Chart(
        title,
        note,
        rects,
        [(WIDTH * share, f"{2**p:,}") for p, share in place],
        [(HEIGHT - HEIGHT * share, f"{2**p:,}") for p, share in place],
    )


def bars_of(values: np.ndarray) -> np.ndarray:
    """Round edges, a bar for each whole number where there are few of them."""
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    if high - low < BINS:
        return np.arange(math.floor(low), math.floor(high) + 2) - 0.5
    width = _round_up((high - low) / BINS)
    first = math.floor(low / width)
    return np.arange(first, math.floor(high / width) + 2) * width


def ticks(low: float, high: float, most: int) -> list[float]:
    """At most `most` round whole numbers after `low`, up to `high`."""
    step = max(1.0, _round_up((high - low) / most))
    step = step if step == int(step) else 2 * step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _x_ticks(edges: np.ndarray, percent: bool, beyond: bool) -> Iterator[tuple[float, str]]:
    low, high = float(edges[0]), float(edges[-1])
    if percent:
        marks = [(v, f"{v:.0%}") for v in np.linspace(low, high, 5)]
    else:
        marks = [(v, _short(v)) for v in ticks(low, high, 6)]
    for value, text in marks:
        x = WIDTH * (value - low) / (high - low)
        if not (beyond and x > WIDTH - 64):
            yield x, text
    if beyond:
        unit = edges[1] - edges[0] == 1 and edges[0] % 1 == 0.5
        yield WIDTH - 6, f"≥{_short(edges[-2] + 0.5 if unit else edges[-2])}"


def _range(low: float, high: float, percent: bool, beyond: bool) -> str:
    if percent:
        return f"{low:.1%} to {high:.1%}"
    first, last = math.ceil(low), math.ceil(high) - 1
    if beyond:
        return f"{first:,} and more"
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _round_up(value: float) -> float:
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in ROUND if factor * power >= value * (1 - 1e-9))


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{round(value / (1e3 if unit == 'k' else size), 1):g}{unit}"
    return f"{round(float(value), 1):,g}"
