"""Histograms: of lengths, of shares, and of the sizes of images.

Bars are stacked by series, so a chart of all samples also tells the sources apart. Each bar says
what it counts where the mouse rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from casa_train.io.numbers import percent, short
from casa_train.report import drawing
from casa_train.report.drawing import GROUP_COLOURS, WEAK, Plot

BINS = 24
SHARES = np.linspace(0, 1, 41)  # edges of the bars of shares
CELLS = 4  # of a map of sizes, for each doubling


def histogram(
    title: str, series: Sequence[np.ndarray], colours: Sequence[str] = GROUP_COLOURS
) -> Plot | None:
    """Counts of whole numbers, stacked by series; None where there is nothing to count.

    The longest half percent joins the last bar.
    """
    everything = np.concatenate(series)
    if not len(everything):
        return None
    edges = bars_of(everything)
    beyond = bool((everything >= edges[-1]).any())
    names = [_range(low, high) for low, high in zip(edges, edges[1:], strict=False)]
    if beyond:
        names[-1] = f"{math.ceil(edges[-2]):,} and more"
    with matplotlib.rc_context(drawing.STYLE):
        figure, (axes,) = drawing.canvas(size=drawing.SMALL)
        _bars(axes, series, edges, names, colours)
        ticks = MaxNLocator(6, steps=drawing.ROUND, integer=True).tick_values(edges[0], edges[-1])
        ticks = ticks[(ticks >= edges[0]) & (ticks <= edges[-1])]
        if beyond:  # the last bar has a tick of its own, and room for it
            last = float((edges[-2] + edges[-1]) / 2)
            ticks = [*ticks[ticks < edges[0] + 0.82 * (edges[-1] - edges[0])].tolist(), last]
            first = math.ceil(edges[-2])
            words = FuncFormatter(
                lambda value, _: f"≥{short(first, 4)}" if value == last else short(value, 4)
            )
            axes.xaxis.set_major_formatter(words)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        middle, mean = np.median(everything), everything.mean()
        note = f"median {short(middle)}, mean {short(mean)}, most {short(everything.max())}"
        return drawing.plot(title, note, figure, [everything], by="")


def shares(title: str, values: np.ndarray) -> Plot | None:
    """Counts of shares from 0 to 1."""
    names = [f"{percent(a)} to {percent(b)}" for a, b in zip(SHARES, SHARES[1:], strict=False)]
    with matplotlib.rc_context(drawing.STYLE):
        figure, (axes,) = drawing.canvas(size=drawing.SMALL)
        _bars(axes, [values], SHARES, names, [WEAK])
        axes.xaxis.set_major_locator(FixedLocator(np.linspace(0, 1, 5).tolist()))
        axes.xaxis.set_major_formatter(drawing.percents(100))
        middle, mean, most = map(percent, (np.median(values), values.mean(), values.max()))
        note = f"median {middle}, mean {mean}, most {most}"
        return drawing.plot(title, note, figure, [values], by="")


def sizes(title: str, widths: np.ndarray, heights: np.ndarray) -> Plot | None:
    """Widths to the right and heights upwards on logarithmic axes; the darker, the more images."""
    if not len(widths):
        return None
    edges = np.log2([widths.min(), widths.max(), heights.min(), heights.max()])
    low, high = math.floor(edges.min() * 2) / 2, math.ceil(edges.max() * 2) / 2
    high = max(high, low + 2)
    edges = np.linspace(low, high, round((high - low) * CELLS) + 1)
    edges[-1] += 1e-9
    counts, _, _ = np.histogram2d(np.log2(widths), np.log2(heights), [edges, edges])
    pixels = 2**edges
    with matplotlib.rc_context(drawing.STYLE):
        figure, (axes,) = drawing.canvas(size=drawing.SMALL)
        for i, j in np.argwhere(counts):
            strength = 0.4 + 0.6 * math.sqrt(counts[i, j] / counts.max())
            cell = Rectangle(
                (edges[i], edges[j]), 1 / CELLS, 1 / CELLS, facecolor=WEAK, alpha=strength
            )
            drawing.hover(
                cell,
                f"{pixels[i]:.0f}–{pixels[i + 1]:.0f} wide, "
                f"{pixels[j]:.0f}–{pixels[j + 1]:.0f} high: {counts[i, j]:,.0f}",
            )
            _add(axes, cell)
        axes.set(xlim=(low, high), ylim=(low, high))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True))
            axis.set_major_formatter(FuncFormatter(lambda power, _: f"{2**power:,.0f}"))
        note = (
            f"width → and height ↑ in pixels, median {np.median(widths):.0f}×"
            f"{np.median(heights):.0f}, largest "
            f"{(widths.astype(np.int64) * heights).max() / 1e6:.2g} megapixels"
        )
        return drawing.plot(title, note, figure, [widths], by="")


def bars_of(values: np.ndarray) -> np.ndarray:
    """Round edges that hold all but the longest half percent; a bar for each whole number where
    there are few of them.
    """
    low, high = float(values.min()), float(np.quantile(values, 0.995))
    if high - low < BINS:
        return np.arange(math.floor(low), math.floor(high) + 2) - 0.5
    locator = MaxNLocator(BINS, steps=drawing.ROUND, integer=True)
    edges = np.array(locator.tick_values(low, high))
    return edges if edges[-1] > high else np.append(edges, 2 * edges[-1] - edges[-2])


def _bars(
    axes: Axes,
    series: Sequence[np.ndarray],
    edges: np.ndarray,
    names: Sequence[str],
    colours: Sequence[str],
) -> None:
    """:param names: what the bars between the edges are, each for all series together."""
    last = (edges[-2] + edges[-1]) / 2
    counts = np.array([np.histogram(np.minimum(values, last), edges)[0] for values in series])
    totals = counts.sum(axis=0)
    width = edges[1] - edges[0]
    gap = min(0.1 * width, 0.004 * (edges[-1] - edges[0]))
    bottoms = np.cumsum(counts, axis=0) - counts
    for own, below, colour in zip(counts, bottoms, colours, strict=False):
        for i in np.flatnonzero(own).tolist():
            place = edges[i] + gap / 2, below[i]
            bar = Rectangle(place, width - gap, own[i], facecolor=colour, clip_on=False)
            share = totals[i] / totals.sum()
            drawing.hover(bar, f"{names[i]}: {totals[i]:,} ({percent(share)})")
            _add(axes, bar)
    axes.set(xlim=(edges[0], edges[-1]), ylim=(0, 1.02 * totals.max()))
    axes.grid(visible=False, axis="x")
    axes.tick_params(axis="x", pad=5)
    axes.spines["left"].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(3, steps=drawing.ROUND, integer=True))


def _add(axes: Axes, bar: Rectangle) -> None:
    """Limits and layout do not look at single bars, which would take most of the time."""
    bar.set_in_layout(False)
    axes.add_artist(bar)


def _range(low: float, high: float) -> str:
    first, last = math.ceil(low), math.ceil(high) - 1
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"
