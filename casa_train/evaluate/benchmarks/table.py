"""Scores beside the published ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from casa_train.evaluate.benchmarks.published import rows_beside
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.io.numbers import MISSING
from casa_train.io.tables import aligned

THIS = "this export"
TITLES = {
    "chartqa": "ChartQA",
    "docvqa": "DocVQA",
    "infovqa": "InfoVQA",
    "ocrbench": "OCRBench",
    "textvqa": "TextVQA",
    "realworldqa": "RealWorldQA",
    "ai2d": "AI2D",
    "gqa": "GQA",
    "mme": "MME",
}
COUNTED = "scored of published"
WHOLE = ("ocrbench", "mme")
"""Points; the others are percentages."""


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: published models beside this one's kind of backbone, then this one;
    `scores` by benchmark.
    """
    scores = {name: entry["score"] for name, entry in result["benchmarks"].items()}
    published = [
        {"model": row.name, "published": True, "scores": dict(row.figures)}
        for row in rows_beside(result["backbone"])
    ]
    return [*published, {"model": THIS, "published": False, "scores": scores}]


def figure(name: str, score: float | None) -> str:
    """A score as the tables print it."""
    if score is None or not math.isfinite(score):
        return MISSING
    return f"{score:.0f}" if name in WHOLE else f"{score:.1f}"


def benchmarks_table(result: Mapping[str, Any]) -> str:
    """The table for a terminal, the benchmarks that were asked alone."""
    names = [name for name in BENCHMARKS if name in result["benchmarks"]]
    lines = [("model", *(TITLES[name] for name in names))]
    for row in result["table"]:
        lines.append((row["model"], *(figure(name, row["scores"].get(name)) for name in names)))
    lines.append((COUNTED, *(counted(result["benchmarks"][name]) for name in names)))
    return aligned(lines)


def counted(entry: Mapping[str, Any]) -> str:
    """How many questions a score is over, of how many the published ones are."""
    return f"{entry['questions'] - entry['unreadable']:,}/{entry['published']:,}"
