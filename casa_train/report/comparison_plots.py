"""The drawings of a comparison: quality against what training cost, differences over all
abilities, attention to images over training. A variant has one colour everywhere, a mechanism one
dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from casa_train.evaluate.attention_while_training import CLASSES
from casa_train.io.numbers import memory_unit
from casa_train.pages.html import MORE_SERIES
from casa_train.report import drawing
from casa_train.report.ability_attention import AttentionOverTime
from casa_train.report.comparison import Comparison
from casa_train.report.drawing import BLUE, GREY, GROUP_COLOURS, INK, LIGHT, ORANGE, Plot
from casa_train.report.series import Array
from casa_train.report.variants import AMOUNTS, Variant
from casa_train.report.verdicts import points, span

PALETTE = (*GROUP_COLOURS, *(LIGHT[name] for name in MORE_SERIES))
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 1.5, 1.5, 1.5), (3, 1), (8, 3))
WIDE, PANEL = (4.9, 3.3), (3.4, 1.9)  # inches
CLASS_COLOURS = dict(zip(CLASSES, (BLUE, ORANGE, GROUP_COLOURS[2]), strict=True))
Curve = tuple[Array, Array, Array, Array]  # x, mean, lowest and highest over seeds


@dataclass(frozen=True)
class Look:
    """How a variant is drawn.

    :param colour: as in a light page; :param dash: in points, () for a whole line.
    """

    colour: str
    dash: tuple[float, ...]
    width: float

    @property
    def variable(self) -> str:
        """The colour as the page names it."""
        return drawing.VARIABLES[self.colour]

    @property
    def line(self) -> dict[str, Any]:
        style = (0, self.dash) if self.dash else "-"
        return {"color": self.colour, "linestyle": style, "linewidth": self.width}


def looks(result: Comparison) -> dict[str, Look]:
    """By variant; the baseline is drawn in ink."""
    shown = [*result.variants, *result.apart]
    others = [variant for variant in shown if variant is not result.baseline]
    families = list(dict.fromkeys(variant.mechanism for variant in [*others, result.baseline]))
    found, used = {}, 0
    for variant in shown:
        dash = DASHES[families.index(variant.mechanism) % len(DASHES)]
        if variant is result.baseline:
            found[variant.label] = Look(INK, dash, 2.0)
        else:
            found[variant.label] = Look(PALETTE[used % len(PALETTE)], dash, 1.5)
            used += 1
    return found


def curve(result: Comparison, variant: Variant, amount: str, ability: str) -> Curve | None:
    """Quality in percent over an amount, at the validations that all seeds have; None where the
    amount was not recorded.
    """
    by_step = [{r.step: r for r in trial.readings} for trial in variant.trials]
    steps = sorted(set.intersection(*(set(own) for own in by_step)))
    x = np.array([[own[step].amounts[amount] for step in steps] for own in by_step]).mean(axis=0)
    y = np.array([[100 * result.share(own[step], ability) for step in steps] for own in by_step])
    if not steps or not np.isfinite(x).all() or not np.isfinite(y).any():
        return None
    return x, y.mean(axis=0), y.min(axis=0), y.max(axis=0)


def draw_curves(result: Comparison, look: Mapping[str, Look]) -> list[Plot]:
    """The mean of all abilities against each amount."""
    plots = []
    ability = result.columns[0]
    with matplotlib.rc_context(drawing.STYLE):
        for amount in AMOUNTS:
            figure, (axes,) = drawing.canvas(size=WIDE)
            ends, curves = _lines(axes, result, look, amount, ability)
            if not curves:
                continue
            _amount_axis(axes, amount, result)
            axes.set_ylim(0, min(104, max(10, 1.08 * axes.get_ylim()[1])))
            _direct_labels(axes, ends, look)
            title = f"{ability[0].upper()}{ability[1:]} against {TITLES[amount]}"
            plots.append(drawing.plot(title, "exact match", figure, curves, by=""))
    return [plot for plot in plots if plot is not None]


TITLES = {"tokens": "training tokens", "flops": "training FLOPs", "seconds": "training time"}


def draw_abilities(result: Comparison, look: Mapping[str, Look]) -> list[Plot]:
    """A small panel an ability, against the amount that is matched (FLOPs where none is)."""
    amount = result.match if result.match in AMOUNTS else "flops"
    plots = []
    with matplotlib.rc_context(drawing.STYLE):
        for ability in result.abilities:
            figure, (axes,) = drawing.canvas(size=PANEL)
            _, curves = _lines(axes, result, look, amount, ability)
            if not curves:
                continue
            if ability in result.chance:
                axes.axhline(
                    100 * result.chance[ability], color=GREY, linewidth=0.9, linestyle=(0, (2, 2))
                )
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=drawing.ROUND))
            _amount_axis(axes, amount, result, ticks=4)
            axes.set_xlabel("")
            axes.set_ylim(0, 104)
            note = "nobody above chance" if ability in result.unlearned else ""
            plots.append(drawing.plot(ability, note, figure, curves, by=f" against {amount}"))
    return [plot for plot in plots if plot is not None]


def _lines(
    axes: Axes, result: Comparison, look: Mapping[str, Look], amount: str, ability: str
) -> tuple[dict[str, tuple[float, float]], list[Array]]:
    """Draws each variant's line and band; returns where lines end, and what was drawn."""
    ends, drawn = {}, []
    for variant in result.variants:
        found = curve(result, variant, amount, ability)
        if found is None:
            continue
        x, mean, low, high = found
        own = look[variant.label]
        axes.fill_between(x, low, high, color=own.colour, alpha=0.1, linewidth=0)
        (line,) = axes.plot(x, mean, marker="o" if len(x) == 1 else None, markersize=4, **own.line)
        drawing.hover(line, f"{variant.label}: {mean[-1]:.1f} %")
        ends[variant.label] = (float(x[-1]), float(mean[-1]))
        drawn.append(mean)
    return ends, drawn


def _amount_axis(axes: Axes, amount: str, result: Comparison, ticks: int = 6) -> None:
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(drawing.percents())
    if amount == "seconds":
        size, unit = _time_unit(axes.get_xlim()[1])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / size:g}"))
        _round_ticks(axes.xaxis, size, axes.get_xlim()[1], ticks)
        axes.set_xlabel(unit)
    else:
        axes.set_xlabel("FLOPs" if amount == "flops" else "text and image tokens of the data")
    if amount == result.match:
        drawing.mark(axes, [result.limit])


def _time_unit(longest: float) -> tuple[float, str]:
    units = ((3 * 3600.0, 3600.0, "hours"), (180.0, 60.0, "minutes"))
    return next(((size, name) for least, size, name in units if longest > least), (1.0, "seconds"))


def _round_ticks(axis: Axis, size: float, most: float, count: int) -> None:
    """Round numbers of minutes or MiB are not round numbers of seconds or bytes."""
    ticks = MaxNLocator(count, steps=drawing.ROUND).tick_values(0, most / size)
    axis.set_ticks([size * tick for tick in ticks if 0 <= size * tick <= most])


def _direct_labels(
    axes: Axes, ends: Mapping[str, tuple[float, float]], look: Mapping[str, Look]
) -> None:
    """Names behind the lines' ends, apart from each other, with thin lines to those that moved."""
    low, high = axes.get_ylim()
    right = axes.get_xlim()[1]
    room = (high - low) / 19  # of a line of text
    wanted = sorted(ends, key=lambda label: ends[label][1])
    places = apart([ends[label][1] for label in wanted], room, low, high)
    for label, place in zip(wanted, places, strict=True):
        x, y = ends[label]
        axes.annotate(
            label if len(label) <= 30 else label[:29] + "…",
            (x, y),
            (right * 1.03, place),
            color=look[label].colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": look[label].colour,
                "linewidth": 0.5,
                "alpha": 0.6,
                "shrinkA": 1,
                "shrinkB": 1,
            },
        )


def apart(values: Sequence[float], room: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as it takes to lie `room` apart within low and high."""
    blocks: list[list[float]] = []  # the middle of each, and how many
    for value in values:
        blocks.append([value, 1.0])
        while (
            len(blocks) > 1
            and blocks[-1][0] - blocks[-2][0] < room * (blocks[-1][1] + blocks[-2][1]) / 2
        ):
            middle, size = blocks.pop()
            before, more = blocks.pop()
            blocks.append([(middle * size + before * more) / (size + more), size + more])
            half = room * (size + more - 1) / 2
            blocks[-1][0] = min(max(blocks[-1][0], low + half), max(high - half, low + half))
    return [
        middle + room * (i - (size - 1) / 2) for middle, size in blocks for i in range(int(size))
    ]


def draw_differences(result: Comparison, look: Mapping[str, Look]) -> Plot | None:
    """Each variant less the baseline over all abilities, with its interval over seeds."""
    ability = result.columns[0]
    rows = [v for v in result.variants if (v.label, ability) in result.differences]
    if not rows:
        return None
    rows.sort(key=lambda v: result.differences[v.label, ability].over_seeds.mean)
    with matplotlib.rc_context(drawing.STYLE):
        figure, (axes,) = drawing.canvas(size=(4.9, 0.9 + 0.24 * len(rows)))
        axes.axvline(0, color=INK, linewidth=1)
        means = []
        for y, variant in enumerate(rows):
            found = result.differences[variant.label, ability]
            colour, over = look[variant.label].colour, found.over_seeds
            means.append(100 * over.mean)
            if math.isfinite(over.low):
                (line,) = axes.plot([100 * over.low, 100 * over.high], [y, y], color=colour)
                drawing.hover(line, f"{variant.label}: {points(over.mean)}, {span(over)}")
            fill = colour if found.claimed else LIGHT["card"]
            axes.plot(means[-1], y, "o", markersize=7, color=colour, markerfacecolor=fill)
        axes.set_yticks(range(len(rows)), [variant.label for variant in rows], fontsize=8)
        for tick, variant in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_color(look[variant.label].colour)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(rows[int(y)].label)))
        axes.grid(False, axis="y")
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _signed(x)))
        axes.set_xlabel("percentage points")
        title = f"Difference from {result.baseline.label}"
        note = f"{ability}; filled: claimed, line: 95 % over seeds"
        return drawing.plot(title, note, figure, [np.array(means)], by="")


def _signed(value: float) -> str:
    return f"{value:+g}".replace("-", "−") if value else "0"


def _short(label: str) -> str:
    return label if len(label) <= 38 else label[:37] + "…"


def draw_attention(over: AttentionOverTime, abilities: Sequence[str]) -> list[Plot]:
    """A small panel an ability: thin lines are layers, thick ones their mean, of each class of
    tokens; dashed, what equal attention would give.
    """
    plots = []
    steps = np.array(over.steps, dtype=np.float64)
    most = max(float(np.nanmax(values)) for values in over.values.values())
    with matplotlib.rc_context(drawing.STYLE):
        for ability in abilities:
            own = {k: over.values[ability, k] for k in CLASSES if (ability, k) in over.values}
            if not own:
                continue
            figure, (axes,) = drawing.figure(steps)
            figure.set_size_inches(*PANEL)
            curves = []
            for kind, values in own.items():
                colour = CLASS_COLOURS[kind]
                layers = 100 * values.mean(axis=0)
                axes.plot(steps, layers, color=colour, linewidth=0.5, alpha=0.45)
                of_seeds = 100 * values.mean(axis=-1)
                low, high = of_seeds.min(axis=0), of_seeds.max(axis=0)
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                few = "o" if len(steps) == 1 else None
                mean = of_seeds.mean(axis=0)
                axes.plot(steps, mean, color=colour, linewidth=2, marker=few, markersize=4)
                curves.append(mean)
            if ability in over.uniform:
                axes.axhline(
                    100 * over.uniform[ability], color=GREY, linewidth=0.9, linestyle=(0, (4, 2))
                )
            axes.set_ylim(0, 106 * max(most, *over.uniform.values(), 0.0))
            axes.yaxis.set_major_formatter(drawing.percents())
            axes.xaxis.set_major_locator(MaxNLocator(4, steps=drawing.ROUND, integer=True))
            axes.set_xlabel("")
            title = f"{ability}: {over.variant.label}"
            plot = drawing.plot(title, "", figure, curves)
            if plot is not None:
                plot.title = ability
                plots.append(plot)
    return plots


def draw_streaming(
    values: Mapping[tuple[str, str, int], float],
    columns: Sequence[Any],
    images: Sequence[int],
    look: Mapping[str, Look],
) -> list[Plot]:
    """A panel a quantity, over the images that came in."""
    plots = []
    with matplotlib.rc_context(drawing.STYLE):
        for column in columns:
            figure, (axes,) = drawing.canvas(size=PANEL)
            curves = []
            for label, own in look.items():
                y = np.array([values.get((label, column.key, n), math.nan) for n in images])
                if np.isfinite(y).any():
                    (line,) = axes.plot(images, y, marker="o", markersize=3, **own.line)
                    drawing.hover(line, label)
                    curves.append(y)
            if not curves:
                continue
            axes.set_xscale("log", base=4)
            axes.set_xticks(images, [f"{n:,}" for n in images])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(bottom=0)
            top = axes.get_ylim()[1]
            size = memory_unit(top)[0] if column.key.endswith("_bytes") else 1.0
            _round_ticks(axes.yaxis, size, top, 4)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _, c=column: _tick(c, y)))
            plots.append(drawing.plot(column.title, "by images seen", figure, curves, by=""))
    return [plot for plot in plots if plot is not None]


def _tick(column: Any, value: float) -> str:
    return "0" if value == 0 else str(column.write(value))
