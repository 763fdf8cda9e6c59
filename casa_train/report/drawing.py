"""What every drawing of a page shares: its style, axes and the SVG that stands in the page."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from casa_train.io.numbers import count, rate, short
from casa_train.pages.html import COLOURS, SERIES
from casa_train.report import series
from casa_train.report.series import SMOOTH_FROM, Array

# Where the home directory takes no files it says so twice, and works without.
logging.getLogger("matplotlib").setLevel(logging.ERROR)

LEGEND_WIDTH = 48  # characters
ROUND = (1, 2, 2.5, 5, 10)  # distances of ticks
CARD, SMALL = (4.9, 2.6), (3.4, 1.5)  # inches of a card, and of one of four in a row
HOVER = "hover: "  # ids that begin so become titles, which a browser shows under the mouse

LIGHT = {name: light for name, (light, _) in COLOURS.items()}
INK, GREY, WEAK = LIGHT["ink"], LIGHT["muted"], LIGHT["weak"]
GROUP_COLOURS = tuple(LIGHT[name] for name in SERIES)
BLUE, ORANGE = GROUP_COLOURS[:2]
VARIABLES = {light: f"var(--{name})" for name, light in LIGHT.items()}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: the reader's own fonts, small and searchable
    "svg.hashsalt": "casa_train",  # without it, ids would differ from one drawing to the next
    "text.parse_math": False,  # a "$" in a group's name is a dollar
    "font.sans-serif": ["DejaVu Sans"],  # what widths are measured with; each text repeats the list
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LIGHT["faint"],
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["line"],
    "grid.linewidth": 0.6,
    "xtick.color": LIGHT["faint"],
    "ytick.color": LIGHT["faint"],
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


def canvas(rows: int = 1, size: tuple[float, float] = CARD) -> tuple[Figure, list[Axes]]:
    """A figure with `rows` panels above each other, with short round numbers at both axes."""
    figure = Figure(figsize=size, layout="constrained", frameon=False)
    panels = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.patch.set_visible(False)
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6 if rows == 1 else 4, steps=ROUND))
        axes.xaxis.set_major_locator(MaxNLocator(7, steps=ROUND))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(numbers())
    return figure, panels


def numbers() -> FuncFormatter:
    """Ticks are round: four digits leave none of them out."""
    return FuncFormatter(lambda value, _: short(value, 4))


def percents(scale: float = 1) -> FuncFormatter:
    """Ticks in percent, of values that are percentages once they are multiplied by `scale`."""
    return FuncFormatter(lambda value, _: f"{scale * value:g} %")


def figure(steps: Array, rows: int = 1, marks: Iterable[float] = ()) -> tuple[Figure, list[Axes]]:
    """A figure over steps.

    :param marks: steps at which a dashed line stands.
    """
    figure, panels = canvas(rows)
    for axes in panels:
        mark(axes, marks)
    few = len(steps) < SMOOTH_FROM  # drawn with markers, which the edge would cut
    margin = (0.02 * float(steps[-1] - steps[0]) or 1.0) if few else 0.0
    panels[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
    panels[-1].xaxis.set_major_locator(MaxNLocator(7, steps=ROUND, integer=True))
    panels[-1].set_xlabel("step")
    return figure, panels


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
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
    return ", logarithmic" if wide else ""


def log_scale(axes: Axes, subs: tuple[float, ...], of_x: bool = False) -> None:
    """Of y, or of x."""
    axis = axes.xaxis if of_x else axes.yaxis
    (axes.set_xscale if of_x else axes.set_yscale)("log", nonpositive="mask")
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(numbers())


def percent_axis(axes: Axes) -> None:
    """From 0 to 100 %, for values that are percentages."""
    axes.set_ylim(0, 105)
    axes.yaxis.set_major_formatter(percents())


def crop(axes: Axes, values: Array, unit: str) -> None:
    """From zero to the highest usual value; first and stalled steps beyond are told, not drawn."""
    finite = values[np.isfinite(values)]
    usual = finite[finite <= 4 * np.median(finite)] if len(finite) else finite
    if not len(usual) or usual.max() <= 0:
        return
    axes.set_ylim(0, 1.1 * usual.max())
    if beyond := len(finite) - len(usual):
        highest = short(finite.max())
        told = f"{count(beyond, 'step')} above, up to {highest}{unit}"
        axes.set_title(told, loc="right", fontsize=8, color=GREY, pad=3)


def hover(artist: Artist, words: str) -> None:
    """What a browser shows where the mouse rests on it."""
    artist.set_gid(HOVER + words)


def svg(figure: Figure, title: str, label: str) -> Markup:
    """The figure as an element for HTML: no prolog, no styles of its own, ids of its own, colours
    that follow the page's, and no digits that nobody sees.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    # Not savefig, which would draw everything once more to find sizes that are known.
    FigureCanvasSVG(figure).print_svg(file, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href=", "href=")
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)  # they repeat what texts say
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    svg = re.sub(rf'<g id="{HOVER}([^"]*)">', r"<g><title>\g<1></title>", svg)
    # Ids follow from content, so two figures may share one, and a page has one name space.
    prefix = re.sub(r"[^a-z0-9]+", "-", title.lower())
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda own: own[0] if own[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r' (d|x|y|width|height|transform|style)="[^"]*"', _tidy, svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r">\s+<", "><", svg).replace("<g/>", "")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return Markup(svg)


def _tidy(attribute: re.Match[str]) -> str:
    """An attribute's numbers with two decimals at most, its colours as variables of the page."""
    words = re.sub(r"-?\d+\.\d{3,}", lambda n: f"{round(float(n[0]), 2):g}", attribute[0])
    words = re.sub(r"#[0-9a-f]{6}", lambda c: VARIABLES.get(c[0], c[0]), words)
    return re.sub(r"\s*\n\s*|(?<=[;\"]) ?font-family:[^;]*;|(?<=[;:]) ", "", words)
