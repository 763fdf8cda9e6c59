"""The records of a run as curves: columns with gaps, thinned and smoothed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from casa_train.metrics.sinks.base import Record

Array = np.ndarray[Any, np.dtype[np.float64]]

CURVE_POINTS = 1200  # more would only make the file larger
SMOOTH_FROM = 20  # fewer steps are drawn as they are


def column(values: Iterable[Any]) -> Array:
    """Floats; whatever is missing or not finite becomes a gap."""
    floats = [math.nan if value is None else float(value) for value in values]
    array = np.array(floats, dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


class Columns:
    """The fields of all records by name, over the steps.

    Whatever a record lacks (an older run, a step without finite numbers) is a gap.
    """

    def __init__(self, metrics: Sequence[Record]) -> None:
        self.metrics = metrics
        self.steps: Array = np.array([record["step"] for record in metrics], dtype=np.float64)

    def column(self, name: str) -> Array:
        return column(record.get(name) for record in self.metrics)

    @property
    def restarts(self) -> Array:
        """Between the steps where the run was started again."""
        starts = self.column("start")
        again = np.flatnonzero(np.diff(starts) > 0) + 1
        return self.steps[again] - 0.5

    def sources(self) -> dict[str, SourceCurve]:
        """Losses by source, those with the most answer tokens first."""
        curves: dict[str, SourceCurve] = defaultdict(SourceCurve)
        for record in self.metrics:
            for name, entry in (record.get("sources") or {}).items():
                curves[str(name)].add(record["step"], entry)
        return dict(sorted(curves.items(), key=lambda item: (-item[1].tokens, item[0])))

    def rates(self) -> dict[str, Array]:
        """Curves by name of the group; groups that always have the same rate share a curve."""
        names = dict.fromkeys(name for r in self.metrics for name in r.get("rates") or ())
        groups: dict[bytes, list[str]] = {}
        curves: dict[bytes, Array] = {}
        for name in names:
            values = column((r.get("rates") or {}).get(name) for r in self.metrics)
            groups.setdefault(values.tobytes(), []).append(str(name))
            curves[values.tobytes()] = values
        return {", ".join(group): curves[key] for key, group in groups.items()}


@dataclass
class SourceCurve:
    """The loss of one source, each value over the steps since the one before.

    :param tokens: answer tokens behind all of it.
    """

    steps: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: int = 0

    def add(self, step: int, entry: Mapping[str, Any]) -> None:
        """:param entry: `loss` and `answer_tokens` of a record's source."""
        tokens, loss = entry.get("answer_tokens") or 0, entry.get("loss")
        if tokens and loss is not None and math.isfinite(loss):
            self.steps.append(float(step))
            self.losses.append(float(loss))
            self.tokens += int(tokens)


def median(values: Array) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def smooth(steps: Array, values: Array) -> tuple[Array, Array]:
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


def thin(steps: Array, values: Array) -> tuple[Array, Array]:
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
