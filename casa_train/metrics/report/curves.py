"""The curves of a run: one function for each card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import matplotlib

from casa_train.metrics.report import drawing
from casa_train.metrics.report.drawing import BLUE, GROUP_COLOURS, ORANGE, Plot
from casa_train.metrics.report.series import Columns
from casa_train.metrics.sinks import Record


def draw_plots(metrics: Sequence[Record]) -> list[Plot]:
    """The curves of a run; those without a single finite value are left out."""
    run = Columns(metrics)
    with matplotlib.rc_context(drawing.STYLE):
        return [plot for card in CARDS if (plot := card(run)) is not None]


def _loss(run: Columns) -> Plot | None:
    values = run.column("loss")
    figure, (axes,) = drawing.figure(run.steps)
    drawing.draw(axes, run.steps, values, BLUE, "loss")
    scale = drawing.log_if_wide(axes, values)
    return drawing.plot("Loss", f"per answer token{scale}", figure, [values])


def _gradient_norm(run: Columns) -> Plot | None:
    values = run.column("gradient_norm")
    figure, (axes,) = drawing.figure(run.steps)
    drawing.draw(axes, run.steps, values, BLUE, "gradient norm")
    scale = drawing.log_if_wide(axes, values)
    return drawing.plot("Gradient norm", f"before clipping{scale}", figure, [values])


def _rates(run: Columns) -> Plot | None:
    curves = run.rates()
    figure, (axes,) = drawing.figure(run.steps)
    for colour, (label, values) in zip(cycle(GROUP_COLOURS), curves.items(), strict=False):
        drawing.line(axes, run.steps, values, color=colour, linewidth=1.8, label=label)
    scale = drawing.scale_rates(axes, list(curves.values()))
    drawing.legend(axes)
    return drawing.plot("Learning rates", f"by parameter group{scale}", figure, curves.values())


def _throughput(run: Columns) -> Plot | None:
    curves = [run.column(f"{kind}_tokens_per_second") for kind in ("text", "image")]
    labels = "text tokens/s", "image tokens/s"
    figure, panels = drawing.figure(run.steps, rows=2)
    for axes, values, colour, label in zip(panels, curves, (BLUE, ORANGE), labels, strict=True):
        drawing.draw(axes, run.steps, values, colour, label)
        drawing.crop(axes, values, "")
        drawing.legend(axes)
    return drawing.plot("Throughput", "tokens per second over all ranks", figure, curves)


def _seconds(run: Columns) -> Plot | None:
    seconds, waits = run.column("seconds"), run.column("data_seconds")
    figure, (axes,) = drawing.figure(run.steps)
    drawing.draw(axes, run.steps, seconds, BLUE, "step")
    drawing.draw(axes, run.steps, waits, ORANGE, "waiting for data")
    drawing.crop(axes, seconds, " s")
    drawing.legend(axes)
    return drawing.plot("Seconds", "of a step", figure, [seconds, waits])


def _fills(run: Columns) -> Plot | None:
    fills = [100 * run.column("fill_text"), 100 * run.column("fill_image")]
    figure, (axes,) = drawing.figure(run.steps)
    for values, colour, label in zip(fills, (BLUE, ORANGE), ("text", "image"), strict=True):
        drawing.draw(axes, run.steps, values, colour, label)
    drawing.percent_axis(axes)
    drawing.legend(axes)
    return drawing.plot("Pack fill", "share of each budget that is used", figure, fills)


CARDS: tuple[Callable[[Columns], Plot | None], ...] = (
    _loss,
    _gradient_norm,
    _rates,
    _throughput,
    _seconds,
    _fills,
)
