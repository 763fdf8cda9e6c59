"""Draws the page of a run: one HTML file with curves, results and samples that loads nothing.

Whatever comes from data (questions, answers, keys, reasons) is escaped by the template, and the
page's content security policy forbids scripts and requests. The same run gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from casa_train.errors import UserError
from casa_train.files import write_atomic
from casa_train.metrics.sinks import Record

Array = np.ndarray[Any, np.dtype[np.float64]]

SAMPLES = 24  # rows of the table of answers
PICTURE_SIDE = 112  # CSS pixels; twice as many are embedded for dense screens
LONGEST_TEXT = 600  # characters of a question or an answer that are shown
CURVE_POINTS = 1200  # more would only make the file larger
SMOOTH_FROM = 20  # fewer steps are drawn as they are
LEGEND_WIDTH = 48  # characters
MISSING = "–"
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
class RunData:
    """What a run left behind.

    :param metrics: step records in order, as `read_metrics` gives them.
    :param config_yaml: the run's configuration, shown as it is.
    :param environment: versions, commit and host.
    :param evaluation: scores as shares from 0 to 1, over all questions and by family; all answers.
    :param pictures: encoded image files by answer id; `choose_answers` says which ids are shown.
    :param quarantine: samples that could not be used: source, key, reason, detail.
    """

    name: str
    metrics: list[Record]
    config_yaml: str
    environment: dict[str, Any]
    evaluation: dict[str, Any] | None
    pictures: dict[str, list[bytes]]
    quarantine: list[dict[str, Any]]


@dataclass
class Fact:
    """A number of the header."""

    label: str
    value: str
    note: str = ""


@dataclass
class Plot:
    """A drawn card."""

    title: str
    note: str
    svg: Markup


def write_report(run: RunData, path: Path) -> None:
    """Writes the page of a run, whole or not at all.

    :raises UserError: there is no step to show, or the file cannot be written.
    """
    if not run.metrics:
        raise UserError(
            f"run {run.name!r} has no metrics: no step has been reported yet. Check the run's name "
            "and that its metrics.jsonl has at least one line, or train it first."
        )
    html = _template().render(
        name=run.name,
        facts=_facts(run),
        plots=draw_plots(run.metrics),
        evaluation=run.evaluation,
        smoothed=len(run.metrics) >= SMOOTH_FROM,
        samples=_samples(run),
        picture_side=PICTURE_SIDE,
        bad=_bad_samples(run.quarantine),
        failures=len(run.quarantine),
        config_yaml=run.config_yaml,
        environment=list(_flatten(run.environment)),
    )
    # Texts may hold lone surrogates (JSON can), which UTF-8 cannot.
    html = html.encode("utf-8", "replace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html)
    except OSError as error:
        raise UserError(f"report {path} cannot be written: {error}") from error


def choose_answers(answers: Sequence[dict[str, Any]], limit: int = SAMPLES) -> list[dict[str, Any]]:
    """A mixture over all sources, right and wrong in turn; the same for the same answers.

    The order within a source follows a digest, so that questions about one picture do not crowd.
    """
    by_source: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for answer in sorted(answers, key=_shuffle_key):
        wrong_right = by_source.setdefault(str(answer["source"]), ([], []))
        wrong_right[bool(answer["correct"])].append(answer)
    queues = [
        [answer for pair in zip_longest(right, wrong) for answer in pair if answer is not None]
        for _, (wrong, right) in sorted(by_source.items())
    ]
    taken = [answer for row in zip_longest(*queues) for answer in row if answer is not None][:limit]
    return sorted(taken, key=lambda answer: str(answer["source"]))  # stable: sources side by side


def draw_plots(metrics: Sequence[Record]) -> list[Plot]:
    """The curves of a run; those without a single finite value are left out."""
    steps = np.array([record["step"] for record in metrics], dtype=np.float64)
    column = {
        name: _column(record.get(name) for record in metrics)
        for name in (
            "loss",
            "gradient_norm",
            "text_tokens_per_second",
            "image_tokens_per_second",
            "seconds",
            "data_seconds",
            "fill_text",
            "fill_image",
        )
    }
    rates = _rates(metrics)
    plots = []

    def add(title: str, note: str, curves: Iterable[Array], figure: Figure) -> None:
        if any(np.isfinite(values).any() for values in curves):
            plots.append(Plot(title, note, _svg(figure, title)))

    with matplotlib.rc_context(STYLE):
        loss, norm = column["loss"], column["gradient_norm"]
        figure, (axes,) = _figure(steps)
        _draw(axes, steps, loss, BLUE, "loss")
        scale = _log_if_wide(axes, loss)
        add("Loss", f"per answer token{scale}", [loss], figure)

        figure, (axes,) = _figure(steps)
        _draw(axes, steps, norm, BLUE, "gradient norm")
        scale = _log_if_wide(axes, norm)
        add("Gradient norm", f"before clipping{scale}", [norm], figure)

        figure, (axes,) = _figure(steps)
        for colour, (label, values) in zip(cycle(GROUP_COLOURS), rates.items(), strict=False):
            _line(axes, steps, values, color=colour, linewidth=1.8, label=label)
        scale = _scale_rates(axes, list(rates.values()))
        if rates:
            _legend(axes)
        add("Learning rates", f"by parameter group{scale}", rates.values(), figure)

        text, image = column["text_tokens_per_second"], column["image_tokens_per_second"]
        figure, panels = _figure(steps, rows=2)
        for axes, values, colour, label in zip(
            panels, (text, image), (BLUE, ORANGE), ("text tokens/s", "image tokens/s"), strict=True
        ):
            _draw(axes, steps, values, colour, label)
            _crop(axes, values, "")
            _legend(axes)
        add("Throughput", "tokens per second over all ranks", [text, image], figure)

        seconds, waits = column["seconds"], column["data_seconds"]
        figure, (axes,) = _figure(steps)
        _draw(axes, steps, seconds, BLUE, "step")
        _draw(axes, steps, waits, ORANGE, "waiting for data")
        _crop(axes, seconds, " s")
        _legend(axes)
        add("Seconds", "of a step", [seconds, waits], figure)

        fills = [100 * column["fill_text"], 100 * column["fill_image"]]
        figure, (axes,) = _figure(steps)
        for values, colour, label in zip(fills, (BLUE, ORANGE), ("text", "image"), strict=True):
            _draw(axes, steps, values, colour, label)
        axes.set_ylim(0, 105)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        _legend(axes)
        add("Pack fill", "share of each budget that is used", fills, figure)
    return plots


def _template() -> jinja2.Template:
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=_percent, width=_width, short=_short, count=_count)
    return environment.from_string(source)


def _facts(run: RunData) -> list[Fact]:
    """The essentials at the top."""
    last, count = run.metrics[-1], len(run.metrics)
    loss = _column(record.get("loss") for record in run.metrics)
    seconds = _column(record.get("seconds") for record in run.metrics)
    waits = _column(record.get("data_seconds") for record in run.metrics)
    samples = np.nansum(_column(record.get("samples") for record in run.metrics))
    facts = [
        Fact("steps", f"{last['step']:,}", f"{samples:,.0f} samples" if samples else ""),
        Fact("last loss", _number(loss[-1], 4), ""),
    ]
    if count >= SMOOTH_FROM:
        facts[-1].note = f"smoothed {_number(_smooth(np.arange(1.0, count + 1), loss)[1][-1], 4)}"
    if run.evaluation is not None:
        scores = run.evaluation
        blind, guess = _percent(scores["blind"]), _percent(scores["guess"])
        note = f"of {_count(scores['questions'], 'question')}"
        facts += [
            Fact("exact match", _percent(scores["exact_match"]), note),
            Fact("blind", blind, "another sample's image"),
            Fact("image-free guess", guess, "from the question alone"),
        ]
    total, waiting = np.nansum(seconds), np.nansum(waits)
    facts += [
        Fact(
            "median step",
            _number(_median(seconds), 3, " s"),
            f"{_percent(waiting / total)} waiting for data" if total else "",
        ),
    ]
    for kind in ("text", "image"):
        rate = _median(_column(record.get(f"{kind}_tokens_per_second") for record in run.metrics))
        tokens = np.nansum(_column(record.get(f"{kind}_tokens") for record in run.metrics))
        note = f"{_large(tokens)} in all" if tokens else ""
        facts.append(Fact(f"{kind} tokens/s", f"{rate:,.0f}" if rate == rate else MISSING, note))
    return facts


def _samples(run: RunData) -> list[dict[str, Any]]:
    """The chosen answers with their pictures as data URIs; None stands for an unreadable one."""
    if run.evaluation is None:
        return []
    return [
        {
            **answer,
            "pictures": [_thumbnail(data) for data in run.pictures.get(answer["id"], [])],
            "same": answer["answer"] == answer["blind_answer"],
        }
        for answer in choose_answers(run.evaluation["answers"])
    ]


def _bad_samples(quarantine: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each source and reason, the most frequent first."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for entry in quarantine:
        groups[str(entry["source"]), str(entry["reason"])].append(entry)
    rows = [
        {
            "source": source,
            "reason": reason,
            "failures": len(entries),
            # The same sample fails again in every epoch.
            "samples": len({entry["key"] for entry in entries}),
            "key": entries[0]["key"],
            "detail": entries[0]["detail"],
        }
        for (source, reason), entries in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row["failures"], row["source"], row["reason"]))


def _thumbnail(data: bytes) -> str | None:
    """A small JPEG on white as a data URI; None if the picture cannot be read."""
    side = 2 * PICTURE_SIDE
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
            layered = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    layered.thumbnail((side, side))
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered)
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=90, subsampling=0)  # sharp edges: drawings and text are common
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _shuffle_key(answer: Mapping[str, Any]) -> str:
    text = f"{answer['id']}\n{answer['question']}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of a nested mapping; lists read as a command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            yield f"{prefix}{key}", MISSING if value is None else str(value)


# Numbers and texts


def _column(values: Iterable[Any]) -> Array:
    """Floats; whatever is missing or not finite becomes a gap."""
    floats = [math.nan if value is None else float(value) for value in values]
    array = np.array(floats, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _rates(metrics: Sequence[Record]) -> dict[str, Array]:
    """Curves by name of the group; groups that always have the same rate share a curve."""
    names = dict.fromkeys(name for record in metrics for name in record.get("rates") or ())
    groups: dict[bytes, list[str]] = {}
    curves: dict[bytes, Array] = {}
    for name in names:
        values = _column((record.get("rates") or {}).get(name) for record in metrics)
        groups.setdefault(values.tobytes(), []).append(str(name))
        curves[values.tobytes()] = values
    return {", ".join(group): curves[key] for key, group in groups.items()}


def _median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _smooth(steps: Array, values: Array) -> tuple[Array, Array]:
    """A moving interquartile mean at no more than `CURVE_POINTS` steps: stalls do not bend it.

    The window narrows towards the first step, where curves are steep, but not towards the last, so
    that the last value stands for the end of the run.
    """
    count = len(values)
    half = max(2, round(count / 40))
    places = np.unique(np.linspace(0, count - 1, min(count, CURVE_POINTS)).round().astype(int))
    windows = (values[max(0, i - half) : i + min(i, half) + 1] for i in places)
    return steps[places], np.array([_middle_mean(window) for window in windows])


def _middle_mean(values: Array) -> float:
    """The mean without the lowest and the highest quarter."""
    finite = np.sort(values[np.isfinite(values)])
    quarter = len(finite) // 4
    return float(finite[quarter : len(finite) - quarter].mean()) if len(finite) else math.nan


def _thin(steps: Array, values: Array) -> tuple[Array, Array]:
    """At most `CURVE_POINTS` points: of each stretch the lowest and the highest, so spikes stay."""
    if len(steps) <= CURVE_POINTS:
        return steps, values
    keep: set[int] = set()
    for stretch in np.array_split(np.arange(len(steps)), CURVE_POINTS // 2):
        finite = stretch[np.isfinite(values[stretch])]
        if len(finite):
            keep |= {int(finite[values[finite].argmin()]), int(finite[values[finite].argmax()])}
        else:
            keep.add(int(stretch[0]))  # a gap stays a gap
    index = np.array(sorted(keep))
    return steps[index], values[index]


def _percent(share: float | None) -> str:
    return MISSING if share is None or not math.isfinite(share) else f"{100 * share:.1f} %"


def _width(share: float | None) -> str:
    """A share as a CSS width."""
    if share is None or not math.isfinite(share):
        return "0%"
    return f"{100 * min(max(share, 0.0), 1.0):.1f}%"


def _number(value: float, digits: int, unit: str = "") -> str:
    return f"{value:.{digits}g}{unit}" if math.isfinite(value) else MISSING


def _large(value: float) -> str:
    """1,234 as 1.2k, and so on."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{round(value / size, 1):g}{unit}"
    return f"{value:g}"


def _power(value: float) -> str:
    """0.00015 as 1.5e-4: no padded exponents, no row of zeros."""
    if value <= 0:
        return "0"
    exponent = math.floor(math.log10(value) + 1e-9)
    return f"{round(value / 10.0**exponent, 2):g}e{exponent}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _short(value: Any) -> str:
    text = str(value).strip()
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


# Curves


def _figure(steps: Array, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure of one card with `rows` panels above each other."""
    figure = Figure(figsize=(4.9, 2.6), layout="constrained")
    panels = list(figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    for axes in panels:
        axes.tick_params(length=0)
        axes.yaxis.set_major_locator(MaxNLocator(6 if rows == 1 else 4, steps=ROUND))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _large(value)))
    margin = 0 if len(steps) > 1 else 1
    panels[-1].set_xlim(steps[0] - margin, steps[-1] + margin)
    panels[-1].xaxis.set_major_locator(MaxNLocator(7, steps=ROUND, integer=True))
    panels[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _large(value)))
    panels[-1].set_xlabel("step")
    return figure, panels


def _draw(axes: Axes, steps: Array, values: Array, colour: str, label: str) -> None:
    """The values thin and pale, their moving average on top."""
    if len(steps) >= SMOOTH_FROM:
        axes.plot(*_thin(steps, values), color=colour, linewidth=0.6, alpha=0.35)
        steps, values = _smooth(steps, values)
    _line(axes, steps, values, color=colour, linewidth=1.5, label=label)


def _line(axes: Axes, steps: Array, values: Array, **style: Any) -> None:
    # A single step, or one between two gaps, has no line: markers show it.
    few = len(steps) < SMOOTH_FROM
    axes.plot(*_thin(steps, values), marker="o" if few else None, markersize=3.5, **style)


def _legend(axes: Axes) -> None:
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


def _log_if_wide(axes: Axes, values: Array) -> str:
    """A logarithmic scale where a linear one would flatten what is usual; returns a note of it."""
    positive = values[values > 0]
    if not len(positive) or positive.max() < 5 * np.median(positive):
        return ""
    decades = float(np.log10(positive.max() / positive.min()))
    _log_scale(axes, (1.0, 2.0, 5.0) if decades < 2 else (1.0, 3.0) if decades < 4 else (1.0,))
    return ", logarithmic"


def _scale_rates(axes: Axes, curves: Sequence[Array]) -> str:
    """From zero, or logarithmic where the groups' peaks lie far apart; returns a note of it."""
    peaks = [peak for curve in curves if (peak := max(curve[curve > 0], default=0.0)) > 0]
    wide = bool(peaks) and max(peaks) >= 10 * min(peaks)
    if wide:
        # A rate on its way from or to zero would take any number of decades: one is enough.
        _log_scale(axes, (1.0, 3.0))
        axes.set_ylim(min(peaks) / 10, 1.5 * max(peaks))
    else:
        axes.set_ylim(0, 1.05 * max(peaks, default=1.0))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    return ", logarithmic" if wide else ""


def _log_scale(axes: Axes, subs: tuple[float, ...]) -> None:
    axes.set_yscale("log", nonpositive="mask")
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _large(value)))


def _crop(axes: Axes, values: Array, unit: str) -> None:
    """From zero to the highest usual value; first and stalled steps beyond are told, not drawn."""
    finite = values[np.isfinite(values)]
    usual = finite[finite <= 4 * np.median(finite)] if len(finite) else finite
    if not len(usual) or usual.max() <= 0:
        return
    axes.set_ylim(0, 1.1 * usual.max())
    if beyond := len(finite) - len(usual):
        text = f"{_count(beyond, 'step')} above, up to {_large(float(f'{finite.max():.3g}'))}{unit}"
        axes.set_title(text, loc="right", fontsize=8, color=GREY, pad=3)


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element for HTML: no prolog, no styles of its own, ids of its own."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href=", "href=")
    svg = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", svg, count=1, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg, count=2)
    # Ids follow from content, so two figures may share one, and a page has one name space.
    prefix = title.lower().replace(" ", "-")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title} by step"', 1))
