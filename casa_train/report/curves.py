"""The curves of a run: one function for each card."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from casa_train.io.numbers import memory_unit, percent, with_unit
from casa_train.metrics.sinks.base import Record
from casa_train.report import drawing, series
from casa_train.report.drawing import BLUE, GROUP_COLOURS, ORANGE, Plot
from casa_train.report.series import Columns

MOST_SOURCES = 6  # curves in one card; the table has all
TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def draw_plots(metrics: Sequence[Record]) -> list[Plot]:
    """The curves of a run; those without a single finite value are left out."""
    run = Columns(metrics)
    with matplotlib.rc_context(drawing.STYLE):
        return [plot for card in CARDS if (plot := card(run)) is not None]


def _figure(run: Columns, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A dashed line stands where the run was started again."""
    return drawing.figure(run.steps, rows, run.restarts)


def _loss(run: Columns) -> Plot | None:
    values = run.column("loss")
    figure, (axes,) = _figure(run)
    drawing.draw(axes, run.steps, values, BLUE, "loss")
    scale = drawing.log_if_wide(axes, values)
    return drawing.plot("Loss", f"per answer token{scale}", figure, [values])


def _source_losses(run: Columns) -> Plot | None:
    sources = run.sources()
    shown = dict(list(sources.items())[:MOST_SOURCES])
    if len(sources) < 2:
        return None
    figure, (axes,) = _figure(run)
    for (name, curve), colour in zip(shown.items(), GROUP_COLOURS, strict=False):
        label = name if len(name) <= 20 else name[:19] + "…"
        steps, losses = np.array(curve.steps), np.array(curve.losses)
        drawing.line(axes, steps, losses, color=colour, linewidth=1.5, label=label)
    scale = drawing.log_if_wide(axes, np.concatenate([c.losses for c in shown.values()]))
    drawing.legend(axes)
    note = "per answer token" if len(sources) == len(shown) else "of those with most answer tokens"
    curves = [np.array(curve.losses) for curve in shown.values()]
    return drawing.plot("Loss by source", note + scale, figure, curves)


def _gradient_norm(run: Columns) -> Plot | None:
    values = run.column("gradient_norm")
    figure, (axes,) = _figure(run)
    drawing.draw(axes, run.steps, values, BLUE, "gradient norm")
    scale = drawing.log_if_wide(axes, values)
    return drawing.plot("Gradient norm", f"before clipping{scale}", figure, [values])


def _rates(run: Columns) -> Plot | None:
    curves = run.rates()
    figure, (axes,) = _figure(run)
    for colour, (label, values) in zip(cycle(GROUP_COLOURS), curves.items(), strict=False):
        drawing.line(axes, run.steps, values, color=colour, linewidth=1.8, label=label)
    scale = drawing.scale_rates(axes, list(curves.values()))
    drawing.legend(axes)
    return drawing.plot("Learning rates", f"by parameter group{scale}", figure, curves.values())


def _throughput(run: Columns) -> Plot | None:
    curves = [run.column(f"{kind}_tokens_per_second") for kind in ("text", "image")]
    labels = "text tokens/s", "image tokens/s"
    figure, panels = _figure(run, rows=2)
    for axes, values, colour, label in zip(panels, curves, (BLUE, ORANGE), labels, strict=True):
        drawing.draw(axes, run.steps, values, colour, label)
        drawing.crop(axes, values, "")
        drawing.legend(axes)
    return drawing.plot("Throughput", "tokens per second over all ranks", figure, curves)


def _work(run: Columns) -> Plot | None:
    """Utilisation where the device's peak is known, otherwise the work alone."""
    mfu, tflops = 100 * run.column("mfu"), run.column("tflops")
    figure, (axes,) = _figure(run)
    if np.isfinite(mfu).any():
        drawing.draw(axes, run.steps, mfu, BLUE, "MFU")
        drawing.crop(axes, mfu, " %")
        axes.yaxis.set_major_formatter(drawing.percents())
        usual = with_unit(1e12 * series.median(tflops), "FLOP/s")
        note = f"of the device's peak; median {usual} a rank"
        return drawing.plot("Model FLOPs utilisation", note, figure, [mfu])
    rate, unit = 1e12 * tflops, "FLOP/s"
    drawing.draw(axes, run.steps, rate, BLUE, unit)
    drawing.crop(axes, rate, f" {unit}")
    return drawing.plot("Work", f"{unit} of a rank", figure, [rate])


def _seconds(run: Columns) -> Plot | None:
    seconds, waits = run.column("seconds"), run.column("data_seconds")
    figure, (axes,) = _figure(run)
    drawing.draw(axes, run.steps, seconds, BLUE, "step")
    drawing.draw(axes, run.steps, waits, ORANGE, "waiting for data")
    drawing.crop(axes, seconds, " s")
    drawing.legend(axes)
    return drawing.plot("Seconds", "of a step", figure, [seconds, waits])


def _ranks(run: Columns) -> Plot | None:
    """How far ranks are apart; nothing to see with one rank."""
    least, most = run.column("rank_seconds_min"), run.column("rank_seconds_max")
    if not (most > least).any():
        return None
    figure, (axes,) = _figure(run)
    drawing.draw(axes, run.steps, most, ORANGE, "slowest rank")
    drawing.draw(axes, run.steps, least, BLUE, "fastest rank")
    drawing.crop(axes, most, " s")
    drawing.legend(axes)
    # A step of one rank has equal times and says nothing of nodes.
    slowest = np.where(most > least, run.column("slowest_rank"), np.nan)
    ranks, times = np.unique(slowest[np.isfinite(slowest)], return_counts=True)
    often = f"rank {ranks[times.argmax()]:.0f} in {percent(times.max() / times.sum())}"
    note = f"seconds by itself: data and forward; slowest: {often} of steps"
    return drawing.plot("Ranks", note, figure, [least, most])


def _memory(run: Columns) -> Plot | None:
    now, peak = (run.column(name) for name in ("memory_bytes", "memory_peak_bytes"))
    size, unit = memory_unit(max(peak[np.isfinite(peak)], default=0.0))
    now, peak = now / size, peak / size
    figure, (axes,) = _figure(run)
    drawing.line(axes, run.steps, peak, color=ORANGE, linewidth=3, label="peak of the step")
    drawing.line(axes, run.steps, now, color=BLUE, linewidth=1.5, label="after it")
    if np.isfinite(peak).any():
        axes.set_ylim(0, 1.1 * np.nanmax(peak))
    drawing.legend(axes)
    return drawing.plot("Memory", f"{unit}, most of any rank", figure, [now, peak])


def _fills(run: Columns) -> Plot | None:
    names = {"fill_text": "text", "fill_image": "image", "pack_efficiency": "the fuller"}
    fills = [100 * run.column(name) for name in names]
    figure, (axes,) = _figure(run)
    for values, colour, label in zip(fills, GROUP_COLOURS, names.values(), strict=False):
        if np.isfinite(values).any():
            drawing.draw(axes, run.steps, values, colour, label)
    drawing.percent_axis(axes)
    drawing.legend(axes)
    return drawing.plot("Pack fill", "share of each budget that is used", figure, fills)


def _lost(run: Columns) -> Plot | None:
    """Samples that were not trained; nothing to see where none was lost."""
    names = {"bad_samples": "unusable", "left_out": "beyond the budgets"}
    lost = {label: run.column(name) for name, label in names.items()}
    lost = {label: values for label, values in lost.items() if np.nanmax([0, *values]) > 0}
    if not lost:
        return None
    figure, (axes,) = _figure(run)
    for (label, values), colour in zip(lost.items(), (ORANGE, BLUE), strict=False):
        drawing.line(axes, run.steps, values, color=colour, linewidth=1.5, label=label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=drawing.ROUND, integer=True))
    drawing.legend(axes)
    return drawing.plot("Samples lost", "so far", figure, lost.values())


def _clock(run: Columns) -> Plot | None:
    """Steps over time: pauses between starts are gaps, and a dashed line ends each."""
    times, starts = run.column("time"), run.column("start")
    if not np.isfinite(times).any():
        return None
    first = np.nanmin(times - np.nan_to_num(run.column("seconds")))
    span = np.nanmax(times) - first
    size, unit = next((s, u) for s, u in TIME_UNITS if span >= 2 * s or s == 1)
    figure, (axes,) = drawing.canvas()
    axes.set_xlim(0, span / size or 1)
    axes.set_ylim(0, 1.05 * run.steps[-1])
    axes.set_xlabel(unit)
    axes.set_ylabel("step")
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=drawing.ROUND, integer=True))
    for number, start in enumerate(np.unique(starts[np.isfinite(starts)])):
        own = starts == start
        drawing.line(axes, (times[own] - first) / size, run.steps[own], color=BLUE, linewidth=1.8)
        if number:
            began = (times[own][0] - run.column("seconds")[own][0] - first) / size
            drawing.mark(axes, [began])
    note = f"{unit} since the first step began"
    return drawing.plot("Steps over time", note, figure, [times], by="")


CARDS: tuple[Callable[[Columns], Plot | None], ...] = (
    _loss,
    _source_losses,
    _gradient_norm,
    _rates,
    _throughput,
    _work,
    _seconds,
    _ranks,
    _memory,
    _fills,
    _lost,
    _clock,
)
