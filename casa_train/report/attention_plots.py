"""How much answers attend to images, layer by layer, as an evaluation measured it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from casa_train.modeling.image_attention import (
    ATTENTION_GATE,
    FFN_GATE,
    IMAGE_GATE,
    IMAGE_SHARE,
)
from casa_train.report import drawing, series
from casa_train.report.drawing import GREY, GROUP_COLOURS, INK, Plot
from casa_train.report.series import Array

SOURCES = len(GROUP_COLOURS)  # lines that can be told apart
TITLES = {
    IMAGE_SHARE: ("Attention to the image", "share of the attention of answers, by layer"),
    IMAGE_GATE: ("Gate to the image", "0 % reads text alone, by layer"),
    ATTENTION_GATE: ("Gate of cross-attention", "tanh, by layer: 0 is closed"),
    FFN_GATE: ("Gate of the feed-forward network", "tanh, by layer: 0 is closed"),
}
SHARES = (IMAGE_SHARE, IMAGE_GATE)


def draw_image_attention(evaluation: Mapping[str, Any] | None) -> list[Plot]:
    """A plot for each quantity that the evaluation recorded."""
    quantities = ((evaluation or {}).get("attention") or {}).get("quantities", {})
    with matplotlib.rc_context(drawing.STYLE):
        plots = [_plot(name, quantity) for name, quantity in quantities.items()]
    return [plot for plot in plots if plot is not None]


def _plot(name: str, quantity: Mapping[str, Any]) -> Plot | None:
    title, note = TITLES.get(name, (name, "by layer"))
    scale = 100.0 if name in SHARES else 1.0
    layers = np.array(quantity["layers"], dtype=np.float64)
    mean, low, high, blind = (
        scale * series.column(quantity[key]) for key in ("mean", "low", "high", "blind")
    )
    figure, (axes,) = drawing.figure(layers)
    figure.set_figheight(3.2)
    if name in SHARES:
        axes.fill_between(layers, low, high, color=INK, alpha=0.08, linewidth=0)
        _by_source(axes, layers, quantity["sources"], scale)
        axes.plot(layers, blind, color=INK, linewidth=1.2, linestyle=":", label="another image")
    drawing.line(axes, layers, mean, color=INK, linewidth=2.0, label="all")
    if quantity["uniform"] is not None:
        axes.axhline(scale * quantity["uniform"], color=GREY, linestyle="--", linewidth=1)
        axes.plot([], [], color=GREY, linestyle="--", linewidth=1, label="all keys alike")
    axes.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(12, steps=drawing.ROUND, integer=True))
    if name in SHARES:
        drawing.percent_axis(axes)
    else:
        axes.axhline(0, color=GREY, linewidth=0.8)
    if name in SHARES:
        drawing.legend(axes)
    return drawing.plot(title, note, figure, [mean], by=" by layer")


def _by_source(axes: Axes, layers: Array, sources: Mapping[str, Any], scale: float) -> None:
    """A line for each of the sources with the most questions, if there are several."""
    if len(sources) == 1:
        return
    largest = sorted(sources, key=lambda source: (-sources[source]["questions"], source))
    for colour, source in zip(GROUP_COLOURS, sorted(largest[:SOURCES]), strict=False):
        y = scale * series.column(sources[source]["mean"])
        drawing.line(axes, layers, y, color=colour, linewidth=1.2, label=source)
