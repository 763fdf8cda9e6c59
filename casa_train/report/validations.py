"""Validations of a run: curves of what they measured, and answers to the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from casa_train.metrics.sinks.base import Record
from casa_train.report import drawing, series
from casa_train.report.drawing import GREY, GROUP_COLOURS, INK, Plot
from casa_train.report.run_data import RunData
from casa_train.report.samples import pictures_of
from casa_train.report.series import Array, column

COLUMNS = 8  # validations whose answers are shown
CURVES = 8  # sources that are drawn, those with the most answers


@dataclass
class Validations:
    """What the page shows of them.

    :param plots: loss and exact match.
    :param steps: of the validations whose answers are shown; :param count: how many there were.
    :param best: the step of the lowest loss, None where no loss was finite.
    :param rows: one a question: its pictures, and for each of `steps` an answer or None.
    """

    plots: list[Plot]
    steps: list[int]
    count: int
    best: int | None
    rows: list[dict[str, Any]]


def validations(run: RunData) -> Validations | None:
    """The section's content; None where no held-out sample was measured."""
    records = [record for record in run.validations if "loss" in record]
    if not records:
        return None
    last = records[-1]
    best = last["best_step"] or None
    shown = choose_records(records, best)
    rows = [
        {
            **question,
            "pictures": pictures_of(run, question["id"]),
            "answers": [_answer(record, question["id"]) for record in shown],
        }
        for question in last["questions"]
    ]
    return Validations(
        draw_validations(records, run.metrics),
        [record["step"] for record in shown],
        len(records),
        best,
        rows,
    )


def draw_validations(records: Sequence[Record], metrics: Sequence[Record]) -> list[Plot]:
    """Loss and exact match over all answers and by source, over the steps of the whole run."""
    steps = column(record["step"] for record in records)
    span = np.unique([metrics[0]["step"], metrics[-1]["step"], records[-1]["step"]]).astype(float)
    sources = _most_answers(records[-1]["sources"])
    plots = []
    with matplotlib.rc_context(drawing.STYLE):
        for field, title in (("loss", "Validation loss"), ("exact_match", "Exact match")):
            share = field == "exact_match"
            figure, (axes,) = drawing.figure(span)
            curves = []
            behind = column([]) if share else _draw_training(axes, metrics, steps[0])
            for colour, name in zip(cycle(GROUP_COLOURS), sources, strict=False):
                curve = column((r["sources"].get(name) or {}).get(field) for r in records)
                curves.append(100 * curve if share else curve)
                drawing.line(axes, steps, curves[-1], color=colour, linewidth=1.2, label=name)
            whole = column(record[field] for record in records)
            curves.append(100 * whole if share else whole)
            drawing.line(axes, steps, curves[-1], color=INK, linewidth=2.2, label="all answers")
            note = "of held-out answers, by source"
            if share:
                drawing.percent_axis(axes)
            else:
                note = "per answer token, by source"
                _fit(axes, np.concatenate([*curves, behind]))
            drawing.legend(axes)
            plots.append(drawing.plot(title, note, figure, curves))
    return [plot for plot in plots if plot is not None]


def _draw_training(axes: Axes, metrics: Sequence[Record], since: float) -> Array:
    """The training loss behind the curves, smoothed; returns its values from step `since` on."""
    steps: Array = column(record["step"] for record in metrics)
    values = column(record.get("loss") for record in metrics)
    if len(steps) >= series.SMOOTH_FROM:
        steps, values = series.smooth(steps, values)
    axes.plot(steps, values, color=GREY, linewidth=1, linestyle=(0, (4, 2)), label="training")
    return values[steps >= since]


def _fit(axes: Axes, values: Array) -> None:
    """Room for these values; the steep beginning of training would take most of it."""
    finite = values[np.isfinite(values)]
    if len(finite):
        low, high = float(finite.min()), float(finite.max())
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(max(0.0, low - margin), high + margin)


def _most_answers(sources: dict[str, Any]) -> list[str]:
    """Names of a few sources in order; none where there is one alone, which is all."""
    if len(sources) < 2:
        return []
    return sorted(sorted(sources, key=lambda name: -sources[name]["answers"])[:CURVES])


def choose_records(records: Sequence[Record], best: int | None) -> list[Record]:
    """A few validations, evenly over the run, the first, the last and the best among them."""
    last = len(records) - 1
    places = np.linspace(0, last, min(COLUMNS, len(records))).round().astype(int).tolist()
    at = next((i for i, record in enumerate(records) if record["step"] == best), last)
    if at not in places:
        inner = places[1:-1]
        places.remove(min(inner, key=lambda place: abs(place - at)))
        places.append(at)
    return [records[i] for i in sorted(places)]


def _answer(record: Record, key: str) -> dict[str, Any] | None:
    return next((q for q in record["questions"] if q["id"] == key), None)
