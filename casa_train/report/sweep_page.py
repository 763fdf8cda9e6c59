"""The page of a sweep: its jobs side by side in a table, their curves, quality against cost."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.io.numbers import MISSING, memory, memory_unit, percent, short
from casa_train.io.tables import markdown_table
from casa_train.metrics.sinks.base import Record
from casa_train.pages import html
from casa_train.report import drawing, series
from casa_train.report.drawing import GROUP_COLOURS, Plot
from casa_train.report.series import Array, Columns

PAGE_FILE, DATA_FILE = "sweep.html", "sweep.json"
WARM_UP = 5  # steps that no speed is taken from: caches fill, kernels compile
DASHES = ("-", "--", ":", "-.")


@dataclass
class Job:
    """A job of a sweep; None where something is not known.

    :param directory: its name below the sweep's directory.
    :param label: names it in tables and plots.
    :param differs: its values of the fields in which jobs differ.
    :param state: finished, unfinished, failed, not started or unreadable.
    :param notes: why, and which files could not be read.
    :param config: None where it could not be read.
    :param measured: what the exact match is of.
    :param report: whether there is a page of the job.
    :param trained: parameters that train; `fusion_parameters`: that the mechanism adds.
    :param work: operations of a full pack, forward and backward.
    """

    directory: str
    label: str
    mechanism: str = ""
    differs: dict[str, Any] = field(default_factory=dict)
    state: str = "unreadable"
    notes: list[str] = field(default_factory=list)
    step: int = 0
    steps: int = 0
    config: Config | None = None
    metrics: list[Record] = field(default_factory=list)
    exact_match: float | None = None
    blind: float | None = None
    held_out_loss: float | None = None
    measured: str = ""
    report: bool = False
    parameters: int | None = None
    trained: int | None = None
    fusion_parameters: int | None = None
    work: int | None = None

    @property
    def loss(self) -> float | None:
        """At the end, smoothed."""
        columns = Columns(self.metrics)
        if not self.metrics:
            return None
        return _finite(series.smooth(columns.steps, columns.column("loss"))[1][-1])

    def speed(self, kind: str) -> float | None:
        """Median of the text or image tokens per second after the first steps."""
        rates = Columns(self.metrics).column(f"{kind}_tokens_per_second")
        return _finite(series.median(rates[WARM_UP:] if len(rates) > 2 * WARM_UP else rates))

    @property
    def memory(self) -> float | None:
        """Highest of any step and rank, bytes."""
        peaks = Columns(self.metrics).column("memory_peak_bytes")
        peaks = peaks[np.isfinite(peaks)]
        return float(peaks.max()) if len(peaks) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Column:
    """One number of every job.

    :param key: in sweep.json; :param title: in tables.
    :param lower: whether less is better; None: neither.
    """

    key: str
    title: str
    value: Callable[[Job], float | None]
    write: Callable[[float], str]
    lower: bool | None = None


COLUMNS = (
    Column("exact_match", "exact match", lambda job: job.exact_match, percent, lower=False),
    Column("blind", "blind", lambda job: job.blind, percent),
    Column("loss", "loss", lambda job: job.loss, lambda x: f"{x:.4f}", lower=True),
    Column(
        "held_out_loss",
        "held-out loss",
        lambda job: job.held_out_loss,
        lambda x: f"{x:.4f}",
        lower=True,
    ),
    Column(
        "text_tokens_per_second",
        "text tokens/s",
        lambda job: job.speed("text"),
        lambda x: f"{x:,.0f}",
        lower=False,
    ),
    Column(
        "image_tokens_per_second",
        "image tokens/s",
        lambda job: job.speed("image"),
        lambda x: f"{x:,.0f}",
        lower=False,
    ),
    Column(
        "peak_memory_bytes",
        "peak memory",
        lambda job: job.memory,
        memory,
        lower=True,
    ),
    Column("parameters", "parameters", lambda job: job.parameters, short),
    Column("trained_parameters", "trained", lambda job: job.trained, short),
    Column("fusion_parameters", "of fusion", lambda job: job.fusion_parameters, short),
    Column("operations_per_pack", "FLOP a pack", lambda job: job.work, short, lower=True),
)


def write_sweep(jobs: Sequence[Job], name: str, directory: Path) -> Path:
    """Writes sweep.json and sweep.html into the sweep's directory; returns the page's path.

    :raises UserError: they cannot be written.
    """
    page = html.render(
        "sweep.html.j2",
        __package__,
        name=name,
        columns=shown_columns(jobs),
        jobs=jobs,
        progress=progress,
        best=_best(jobs),
        plots=draw_sweep(jobs),
    )
    try:
        write_atomic(directory / DATA_FILE, json.dumps(as_json(jobs), indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{directory / DATA_FILE} cannot be written: {error}. Free or mend the directory."
        ) from error
    html.write(page, directory / PAGE_FILE, ". Free or mend the directory.")
    return directory / PAGE_FILE


def as_json(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Every number of every job by name."""
    return [
        {
            "directory": job.directory,
            "label": job.label,
            "mechanism": job.mechanism,
            "differs": job.differs,
            "state": job.state,
            "step": job.step,
            "steps": job.steps,
            "notes": job.notes,
            "measured": job.measured,
            **{column.key: column.value(job) for column in COLUMNS},
        }
        for job in jobs
    ]


def shown_columns(jobs: Sequence[Job]) -> list[Column]:
    """Those that any job has a number for."""
    return [c for c in COLUMNS if any(c.value(job) is not None for job in jobs)]


def markdown(jobs: Sequence[Job]) -> list[str]:
    """The table as Markdown, aligned for a terminal."""
    columns = shown_columns(jobs)
    rows = [["job", "state", *(column.title for column in columns)]]
    for job in jobs:
        numbers = [column.value(job) for column in columns]
        rows.append(
            [
                job.label,
                progress(job),
                *(
                    MISSING if number is None else column.write(number)
                    for column, number in zip(columns, numbers, strict=True)
                ),
            ]
        )
    return markdown_table(rows, left=2)


def progress(job: Job) -> str:
    """How far the job came."""
    if job.state in ("finished", "not started", "unreadable"):
        return job.state
    return f"{job.state} at {job.step:,} of {job.steps:,}"


def draw_sweep(jobs: Sequence[Job]) -> list[Plot]:
    """Curves of all jobs, then quality against what it costs; plots without a point are left
    out.
    """
    with matplotlib.rc_context(drawing.STYLE):
        plots = [_losses(jobs, over_time=False), _losses(jobs, over_time=True)]
        for key in ("text_tokens_per_second", "peak_memory_bytes", "operations_per_pack"):
            plots.append(_quality(jobs, next(c for c in COLUMNS if c.key == key)))
    return [plot for plot in plots if plot is not None]


def _losses(jobs: Sequence[Job], over_time: bool) -> Plot | None:
    """Smoothed losses over steps, or over the time that the steps took."""
    figure, axes = _wide_figure(legend=len(jobs))
    longest = max((float(_elapsed(job)[-1]) for job in jobs if job.metrics), default=0.0)
    unit, size = ("hours", 3600) if longest > 3 * 3600 else ("minutes", 60)
    curves = []
    for job, style in zip(jobs, _styles(), strict=False):
        columns = Columns(job.metrics)
        if not job.metrics:
            continue
        x = columns.steps
        if over_time:
            x = _elapsed(job) / size
        x, values = series.smooth(x, columns.column("loss"))
        axes.plot(x, values, linewidth=1.5, label=job.label, **style)
        curves.append(values)
    if not curves:
        return None
    scale = drawing.log_if_wide(axes, np.concatenate(curves))
    axes.set_xlabel(unit if over_time else "step")
    drawing.legend(axes)
    if over_time:
        return drawing.plot("Loss over time", f"{unit} of training{scale}", figure, curves, by="")
    return drawing.plot("Loss", f"per answer token, smoothed{scale}", figure, curves)


def _elapsed(job: Job) -> Array:
    """Seconds of all steps so far."""
    return np.nan_to_num(Columns(job.metrics).column("seconds")).cumsum()


def _quality(jobs: Sequence[Job], cost: Column) -> Plot | None:
    """A point a job: exact match (or loss, where none has one) against what it costs."""
    by_loss = all(job.exact_match is None for job in jobs)
    points = []
    for job, style in zip(jobs, _styles(), strict=False):
        quality, price = job.loss if by_loss else job.exact_match, cost.value(job)
        if quality is not None and price is not None:
            points.append((price, quality if by_loss else 100 * quality, job.label, style["color"]))
    if not points:
        return None
    figure, axes = _wide_figure()
    prices, qualities = np.array([point[:2] for point in points]).T
    # Round numbers of bytes are not round numbers of MiB.
    unit = memory_unit(prices.max())[0] if cost.write is memory else 1
    prices = prices / unit
    if prices.max() > 8 * prices.min() > 0:
        drawing.log_scale(axes, (1.0, 3.0), of_x=True)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=drawing.ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost.write(value * unit)))
    above = (0.0, math.inf)
    for price, quality, label, colour in sorted(points, key=lambda point: -point[1]):
        place = (price / unit, quality)
        axes.plot(*place, "o", markersize=6, color=colour, clip_on=False)
        # Where the label of the point above would be too near: to the left, or below.
        near = above[1] - quality < 0.1 * np.ptp(qualities)
        near = near and abs(above[0] - place[0]) <= 0.2 * np.ptp(prices)
        left = near and place[0] < above[0]
        offset = (-6, -3) if left else (6, -11) if near else (6, 4)
        side = "right" if left else "left"
        axes.annotate(label, place, offset, textcoords="offset points", fontsize=8, ha=side)
        above = place
    axes.margins(x=0.25, y=0.15)
    _spread(axes.get_xlim, axes.set_xlim, 0.2 * prices.max())
    axes.set_xlabel(cost.title)
    if not by_loss:
        _spread(axes.get_ylim, axes.set_ylim, 5)
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))
        axes.yaxis.set_major_formatter(drawing.percents())
    title = f"{'Loss' if by_loss else 'Exact match'} against {cost.title}"
    note = "lower is better" if by_loss else "higher is better"
    return drawing.plot(title, note, figure, [qualities], by="")


def _spread(
    get: Callable[[], tuple[float, float]], put: Callable[[float, float], Any], least: float
) -> None:
    """Widens the limits of an axis to `least`: equals should not look far apart."""
    low, high = get()
    if high - low < least:
        middle = (low + high) / 2
        put(middle - least / 2, middle + least / 2)


def _wide_figure(legend: int = 0) -> tuple[Figure, Axes]:
    """:param legend: lines that it takes."""
    figure, (axes,) = drawing.canvas(size=(4.9, 3.2 + 0.17 * legend))
    return figure, axes


def _styles() -> Any:
    """A colour for each job; dashes tell apart those that share one."""
    colours = len(GROUP_COLOURS)
    for i in cycle(range(colours * len(DASHES))):
        yield {"color": GROUP_COLOURS[i % colours], "linestyle": DASHES[i // colours]}


def _best(jobs: Sequence[Job]) -> dict[str, str]:
    """The best number of each column, as written, where finished jobs differ in it."""
    best = {}
    finished = [job for job in jobs if job.state == "finished"]
    for column in COLUMNS:
        numbers = [n for job in finished if (n := column.value(job)) is not None]
        if column.lower is not None and len(set(map(column.write, numbers))) > 1:
            best[column.key] = column.write(min(numbers) if column.lower else max(numbers))
    return best
