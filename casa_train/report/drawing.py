"""What every drawing of the page shares: its style, axes and the SVG that stands in the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from casa_train.io.log import count
from casa_train.report import series, text
from casa_train.report.series import SMOOTH_FROM, Array

LEGEND_WIDTH = 48  # characters
ROUND = (1, 2, 2.5, 5, 10)  # distances of ticks

BLUE, ORANGE, INK, GREY = "#2563eb", "#d9730d", "#1f2328", "#6b7280"
GROUP_COLOURS = (BLUE, ORANGE, "#15803d", "#9333ea", "#be123c", "#0e7490", "#854d0e", "#475569")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the reader's own fonts, small and searchable
    "svg.hashsalt": "casa_train",  # without it, ids would differ from one drawing to the next
    "text.parse_math": False,  # a "$" in a group's name is a dollar
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#c3c8ce",
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.6,
    "xtick.color": "#c3c8ce",
    "ytick.color": "#c3c8ce",
    "xtick.labelcolor": GREY,
    "ytick.labelcolor": GREY,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.solid_capstyle": "round",
}


@dataclass
class Plot:
    """A drawn card."""

    title: str
    note: str
    svg: Markup


def plot(
    title: str, note: str, figure: Figure, curves: Iterable[Array], by: str = " by step"
) -> Plot | None:
    """The card of a figure; None if `curves`, which it shows, have not one finite value.

    :param by: ends the title for those who cannot see the figure.
    """
    if not any(np.isfinite(values).any() for values in curves):
        return None
    return Plot(title, note, svg(figure, title, title + by))


def figure(steps: Array, rows: int = 1, marks: Iterable[float] = ()) -> tuple[Figure, list[Axes]]:
    """A figure of one card with `rows` panels above each other.

    :param marks: steps at which a dashed line stands.
    """
    figure = Figure(figsize=(4.9, 2.6), layout="constrained")
    panels = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6 if rows == 1 else 4, steps=ROUND))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.large(value)))
        mark(axes, marks)
    few = len(steps) < SMOOTH_FROM  # drawn with markers, which the edge would cut
    margin = (0.02 * float(steps[-1] - steps[0]) or 1.0) if few else 0.0
    panels[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
    panels[-1].xaxis.set_major_locator(MaxNLocator(7, steps=ROUND, integer=True))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: text.large(value)))
    panels[-1].set_xlabel("step")
    return figure, panels


def clock_axes(axes: Axes, span: float, unit: str, last: float) -> None:
    """Time to the right and steps upwards, in axes made for steps to the right."""
    axes.tick_params(length=0)
    axes.set_xlim(0, span or 1)
    axes.set_ylim(0, 1.05 * last)
    axes.set_xlabel(unit)
    axes.set_ylabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(7, steps=ROUND))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=ROUND, integer=True))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: text.large(value)))


def mark(axes: Axes, places: Iterable[float]) -> None:
    """Dashed lines from bottom to top."""
    for place in places:
        axes.axvline(place, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def draw(axes: Axes, steps: Array, values: Array, colour: str, label: str) -> None:
    """The values thin and pale, their moving average on top."""
    if len(steps) >= SMOOTH_FROM:
        axes.plot(*series.thin(steps, values), color=colour, linewidth=0.6, alpha=0.35)
        steps, values = series.smooth(steps, values)
    line(axes, steps, values, color=colour, linewidth=1.5, label=label)


def line(axes: Axes, steps: Array, values: Array, **style: Any) -> None:
    # A single step, or one between two gaps, has no line: markers show it.
    few = len(steps) < SMOOTH_FROM
    axes.plot(*series.thin(steps, values), marker="o" if few else None, markersize=3.5, **style)


def legend(axes: Axes) -> None:
    """Above the axes, where it hides nothing, in as many columns as the names allow."""
    handles, names = axes.get_legend_handles_labels()
    if not names:  # matplotlib leaves out names that begin with an underscore
        return
    names = [name if len(name) <= LEGEND_WIDTH else name[:LEGEND_WIDTH] + "…" for name in names]
    columns = LEGEND_WIDTH // (max(map(len, names)) + 5)  # the line before a name counts, too
    axes.legend(
        handles,
        names,
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=max(1, min(4, columns)),
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0,
    )


def log_if_wide(axes: Axes, values: Array) -> str:
    """A logarithmic scale where a linear one would flatten what is usual; returns a note of it."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 5 * np.median(positive):
        return ""
    decades = float(np.log10(positive.max() / positive.min()))
    log_scale(axes, (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 4 else (1.0,))
    return ", logarithmic"


def scale_rates(axes: Axes, curves: Sequence[Array]) -> str:
    """From zero, or logarithmic where the groups' peaks lie far apart; returns a note of it."""
    peaks = [peak for curve in curves if (peak := max(curve[curve > 0], default=0.0)) > 0]
    wide = bool(peaks) and max(peaks) >= 10 * min(peaks)
    if wide:
        # A rate on its way from or to zero would take any number of decades: one is enough.
        log_scale(axes, (1.0, 3.0))
        axes.set_ylim(min(peaks) / 10, 1.5 * max(peaks))
    else:
        axes.set_ylim(0, 1.05 * max(peaks, default=1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.power(value)))
    return ", logarithmic" if wide else ""


def log_scale(axes: Axes, subs: tuple[float, ...], of_x: bool = False) -> None:
    """Of y, or of x."""
    axis = axes.xaxis if of_x else axes.yaxis
    (axes.set_xscale if of_x else axes.set_yscale)("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text.large(value)))


def percent_axis(axes: Axes) -> None:
    """From 0 to 100 %, for values that are percentages."""
    axes.set_ylim(0, 105)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def crop(axes: Axes, values: Array, unit: str) -> None:
    """From zero to the highest usual value; first and stalled steps beyond are told, not drawn."""
    finite = values[np.isfinite(values)]
    usual = finite[finite <= 4 * np.median(finite)] if len(finite) else finite
    if not len(usual) or usual.max() <= 0:
        return
    axes.set_ylim(0, 1.1 * usual.max())
    if beyond := len(finite) - len(usual):
        highest = text.large(float(f"{finite.max():.3g}"))
        told = f"{count(beyond, 'step')} above, up to {highest}{unit}"
        axes.set_title(told, loc="right", fontsize=8, color=GREY, pad=3)


def svg(figure: Figure, title: str, label: str) -> Markup:
    """The figure as an element for HTML: no prolog, no styles of its own, ids of its own."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href=", "href=")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    # Ids follow from content, so two figures may share one, and a page has one name space.
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower())
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
