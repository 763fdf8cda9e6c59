"""How much answers read from images, layer by layer, as an evaluation measured it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from casa_train.metrics.report import drawing, series
from casa_train.metrics.report.drawing import GREY, GROUP_COLOURS, INK, Plot

SOURCES = len(GROUP_COLOURS)  # lines that can be told apart
TITLES = {
    "image share": ("Attention to the image", "share of the attention of answers, by layer"),
    "image gate": ("Gate to the image", "0 % reads text alone, by layer"),
    "attention gate": ("Gate of cross-attention", "tanh, by layer"),
    "feed-forward gate": ("Gate of the feed-forward network", "tanh, by layer"),
}
SHARES = ("image share", "image gate")


def draw_reads(evaluation: Mapping[str, Any] | None) -> list[Plot]:
    """A plot for each quantity that the evaluation recorded."""
    reads = (evaluation or {}).get("attention") or {"quantities": {}}
    with matplotlib.rc_context(drawing.STYLE):
        plots = [_plot(name, quantity) for name, quantity in reads["quantities"].items()]
    return [plot for plot in plots if plot is not None]


def _plot(name: str, quantity: Mapping[str, Any]) -> Plot | None:
    title, note = TITLES.get(name, (name, "by layer"))
    scale = 100.0 if name in SHARES else 1.0
    layers = np.array(quantity["layers"], dtype=np.float64)
    mean, low, high, blind = (
        scale * series.column(quantity[key]) for key in ("mean", "low", "high", "blind")
    )
    figure, (axes,) = drawing.figure(layers)
    figure.set_size_inches(4.9, 3.2)
    axes.fill_between(layers, low, high, color=INK, alpha=0.08, linewidth=0)
    largest = sorted(quantity["sources"].items(), key=lambda item: -item[1]["questions"])[:SOURCES]
    if len(quantity["sources"]) > 1:
        for colour, (source, values) in zip(GROUP_COLOURS, sorted(largest), strict=False):
            y = scale * series.column(values["mean"])
            drawing.line(axes, layers, y, color=colour, linewidth=1.2, label=source)
    drawing.line(axes, layers, mean, color=INK, linewidth=2.0, label="all")
    axes.plot(layers, blind, color=INK, linewidth=1.2, linestyle=":", label="another image")
    if quantity["uniform"] is not None:
        axes.axhline(scale * quantity["uniform"], color=GREY, linestyle="--", linewidth=1)
        axes.plot([], [], color=GREY, linestyle="--", linewidth=1, label="all keys alike")
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=drawing.ROUND, integer=True))
    if name in SHARES:
        drawing.percent_axis(axes)
    else:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    drawing.legend(axes)
    return drawing.plot(title, note, figure, [mean], by=" by layer")
