"""What the variants of a sweep cost: new parameters, work and time of training, memory."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from casa_train.config.model_schema import LORA
from casa_train.config.schema import Config
from casa_train.io.numbers import MISSING, duration, memory, short, with_unit
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.report import series
from casa_train.report.jobs import BROKEN
from casa_train.report.series import Columns
from casa_train.report.variants import Trial, Variant
from casa_train.run.configuration import load_model_config
from casa_train.run.layout import STARTS_FILE
from casa_train.run.starts import read_starts
from casa_train.setup.model import meta_model
from casa_train.setup.parts import part_sizes

INSERTION = "insertion"


def count_new_parameters(
    variants: Sequence[Variant], sweep: Path, say: Callable[[str], None]
) -> None:
    """Sets what each variant adds beyond the insertion model of the same configuration: fewer than
    none where it drops layers.
    """
    known: dict[str, int] = {}
    for variant in variants:
        job = variant.trials[0].job
        try:
            if job.parameters is None or job.config is None:
                raise ValueError("; ".join(job.notes) or "the model's sizes are not known")
            matched = getattr(job.config.model, "matched", None)
            if matched is not None:  # widened to have so many
                variant.new_parameters = int(matched.reached)
                continue
            plain = load_model_config(sweep / job.directory).to_dict()
            plain["fusion"] = {"mechanism": INSERTION}
            key = json.dumps([plain, job.config.model.backbone.trainable == LORA], default=str)
            if key not in known:
                known[key] = _insertion_parameters(job.config, plain)
            variant.new_parameters = job.parameters - known[key]
        except BROKEN as error:
            say(f"{variant.label}: its new parameters cannot be counted: {error}")


def _insertion_parameters(config: Config, plain: dict[str, Any]) -> int:
    other = copy.deepcopy(config)
    other.fusion = {"mechanism": INSERTION}
    if other.model.backbone.trainable != LORA:
        other.model.backbone.trainable = True  # a model in which nothing trains is refused
    model = meta_model(other, CasaConfig.from_dict(copy.deepcopy(plain)))
    return sum(part_sizes(model).values())


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
