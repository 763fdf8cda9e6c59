"""Benchmarks that a run was scored on while it trained: curves beside the published rows, a table,
and answers to the same questions over time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

from casa_train.evaluate.benchmarks.published import PublishedRow, rows_beside
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.table import TITLES, figure
from casa_train.metrics.sinks.base import Record
from casa_train.report import drawing
from casa_train.report.drawing import BLUE, GREY, Plot
from casa_train.report.run_data import RunData
from casa_train.report.samples import pictures_of
from casa_train.report.series import column
from casa_train.report.validations import choose_records

UNITS = {"ocrbench": "of 1,000", "mme": "points"}  # others: percent
THIS = "this run"


@dataclass
class Benchmarks:
    """What the page shows of them.

    :param plots: a curve each, of the validations that asked what the last one asked.
    :param names: of the benchmarks; :param table: (a model, its figures in their order).
    :param notes: of each benchmark, what its figures are over.
    :param steps: of the validations whose answers are shown; :param count: how many there were.
    :param rows: one a question: its pictures, and for each of `steps` an answer or None.
    """

    plots: list[Plot]
    names: list[str]
    table: list[tuple[str, list[str]]]
    notes: list[str]
    steps: list[int]
    count: int
    rows: list[dict[str, Any]]


def benchmarks(run: RunData) -> Benchmarks | None:
    """The section's content; None where no benchmark was asked."""
    records = [record for record in run.validations if record.get("benchmarks")]
    if not records:
        return None
    last = records[-1]["benchmarks"]
    names = [name for name in BENCHMARKS if name in last]
    beside = rows_beside(run.backbone)
    table = [(row.name, [figure(name, row.figures.get(name)) for name in names]) for row in beside]
    own = f"{THIS}, step {records[-1]['step']:,}"
    shown = choose_records(records, None)
    return Benchmarks(
        draw_benchmarks(records, run.metrics, beside),
        [TITLES[name] for name in names],
        [*table, (own, [figure(name, last[name]["score"]) for name in names])],
        [_note(name, last[name]) for name in names],
        [record["step"] for record in shown],
        len(records),
        [
            {
                **question,
                "source": name,
                "pictures": pictures_of(run, question["id"]),
                "answers": [_answer(record, name, question["id"]) for record in shown],
            }
            for name in names
            for question in last[name]["answers"]
        ],
    )


def draw_benchmarks(
    records: Sequence[Record], metrics: Sequence[Record], beside: Sequence[PublishedRow]
) -> list[Plot]:
    """A card a benchmark: its score over the steps of the whole run, published figures as lines.

    What an earlier part of the run asked otherwise is no part of the curve.
    """
    ends = [metrics[0]["step"], metrics[-1]["step"], records[-1]["step"]]
    span = np.unique(ends).astype(float)
    last = records[-1]["benchmarks"]
    plots = []
    with matplotlib.rc_context(drawing.STYLE):
        for name in [name for name in BENCHMARKS if name in last]:
            same = [
                (record["step"], found["score"])
                for record in records
                if (found := record["benchmarks"].get(name) or {}).get("digest")
                == last[name]["digest"]
            ]
            scores = column(score for _, score in same)
            drawn, (axes,) = drawing.figure(span)
            levels = [(row.name, row.figures[name]) for row in beside if name in row.figures]
            for model, level in levels:
                style: Any = {"color": GREY, "linewidth": 0.8, "linestyle": (0, (4, 3))}
                drawing.hover(axes.axhline(level, **style), f"{model}: {level:g}")
            steps = column(step for step, _ in same)
            drawing.line(axes, steps, scores, color=BLUE, linewidth=1.8, label=THIS)
            axes.plot([], [], color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), label="published")
            finite = [*scores[np.isfinite(scores)], *(level for _, level in levels)]
            axes.set_ylim(0, 1.08 * max([1.0, *finite]))
            drawing.legend(axes)
            plots.append(drawing.plot(TITLES[name], _unit(name), drawn, [scores]))
    return [plot for plot in plots if plot is not None]


def _unit(name: str) -> str:
    return UNITS.get(name, "percent")


def _note(name: str, found: Record) -> str:
    said = f"{TITLES[name]}: {found['questions']:,} questions, protocol {found['protocol']}"
    said += f", at most {found['max_new_tokens']} new tokens, revision {found['revision']}"
    for key, words in (("unreadable", "pictures unreadable"), ("over_budget", "over a pack")):
        said += f", {found[key]} {words}" if found[key] else ""
    return said


def _answer(record: Record, name: str, key: str) -> dict[str, Any] | None:
    """`answer`, whether it is `correct`, and `partly` its score where that is between."""
    asked = (record["benchmarks"].get(name) or {}).get("answers") or []
    found = next((answer for answer in asked if answer["id"] == key), None)
    if found is None:
        return None
    score = found["score"]
    partly = f"{100 * score:.0f} %" if 0 < score < 1 else ""
    return {"answer": found["answer"], "correct": score == 1, "partly": partly}
