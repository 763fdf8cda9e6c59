"""What the variants of a sweep cost: new parameters, work and time of training, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from casa_train.io.numbers import MISSING, duration, memory, short, with_unit
from casa_train.report import series
from casa_train.report.jobs import BROKEN
from casa_train.report.series import Columns
from casa_train.report.variants import Trial, Variant
from casa_train.run.configuration import load_model_config
from casa_train.run.layout import STARTS_FILE
from casa_train.run.starts import read_starts
from casa_train.setup.equal_parameters import new_parameters

INSERTION = "insertion"


def count_new_parameters(
    variants: Sequence[Variant], sweep: Path, say: Callable[[str], None]
) -> None:
    """Sets what each variant adds beyond the insertion model of the same configuration: fewer than
    none where it drops layers.
    """
    for variant in variants:
        job = variant.trials[0].job
        try:
            if job.config is None:
                raise ValueError("; ".join(job.notes) or "its configuration is missing")
            described = load_model_config(sweep / job.directory)
            variant.new_parameters = new_parameters(job.config, described)
        except BROKEN as error:
            say(f"{variant.label}: its new parameters cannot be counted: {error}")


@dataclass(frozen=True)
class CostColumn:
    """:param value: of a trial; NaN: not known."""

    key: str
    title: str
    value: Callable[[Trial], float]
    write: Callable[[float], str]


def _median(name: str) -> Callable[[Trial], float]:
    return lambda trial: series.median(Columns(trial.job.metrics).column(name))


def _spent(name: str) -> Callable[[Trial], float]:
    return lambda t: t.chosen.amounts[name] if t.chosen is not None else math.nan


def _memory(trial: Trial) -> float:
    return math.nan if trial.job.memory is None else trial.job.memory


def _speed(trial: Trial) -> float:
    speeds = [trial.job.speed(kind) for kind in ("text", "image")]
    return math.nan if None in speeds else math.fsum(s for s in speeds if s is not None)


COLUMNS = (
    CostColumn(
        "operations_a_step", "FLOP a step", _median("operations"), lambda x: with_unit(x, "FLOP")
    ),
    CostColumn("tokens_per_second", "tokens/s", _speed, lambda x: f"{x:,.0f}"),
    CostColumn("flops", "FLOPs of training", _spent("flops"), lambda x: with_unit(x, "FLOP")),
    CostColumn("tokens", "tokens of training", _spent("tokens"), lambda x: short(x, 4)),
    CostColumn("seconds", "time of training", _spent("seconds"), duration),
    CostColumn("peak_memory_bytes", "peak memory", _memory, memory),
)


def cost_of(variant: Variant, column: CostColumn) -> float:
    """The mean over the seeds for which it is known; NaN: for none."""
    values = np.array([column.value(trial) for trial in variant.trials])
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def cost_rows(variants: Sequence[Variant]) -> tuple[list[str], list[list[str]]]:
    """Titles and, by variant, what stands under them."""
    rows = []
    for variant in variants:
        new = MISSING if variant.new_parameters is None else f"{variant.new_parameters:,}"
        values = [(column, cost_of(variant, column)) for column in COLUMNS]
        rows.append([new, *(c.write(x) if math.isfinite(x) else MISSING for c, x in values)])
    return ["new parameters", *(column.title for column in COLUMNS)], rows


def machines_of(trials: Iterable[Trial], sweep: Path) -> dict[str, list[str]]:
    """By machine (host, ranks and device) the jobs that trained there."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        try:
            starts = read_starts(sweep / trial.name / STARTS_FILE)
        except BROKEN:
            continue
        for start in starts:
            place = [str(start[name]) for name in ("host", "device") if start.get(name)]
            if place and trial.name not in found.setdefault(", ".join(place), []):
                found[", ".join(place)].append(trial.name)
    return found
