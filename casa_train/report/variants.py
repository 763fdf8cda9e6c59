"""The jobs of a sweep as variants x seeds, each with the validations that can be compared.

A variant is all fields in which jobs differ but the seed. Fields that only watch a run (where
numbers go, when it is saved) set no variant apart, those of `parallel` do: they cost differently.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from casa_train.config.resume_marks import Free
from casa_train.config.schema import Config, resume_mark
from casa_train.metrics.sinks.base import Record
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report.jobs import BROKEN, differing_fields, job_labels
from casa_train.report.series import Columns
from casa_train.report.significance import Integers
from casa_train.report.sweep_page import Job
from casa_train.run.layout import VALIDATION_FILE
from casa_train.run.sweep import natural

AMOUNTS = ("tokens", "flops", "seconds")
"""What training costs, summed over its steps: text and image tokens of the data, floating-point
operations, and seconds of steps (validations and saves not among them)."""
MEAN = "all abilities"  # their plain mean
UNREAD = "-"  # a sample that could not be read
Key = tuple[str, tuple[tuple[str, int], ...]]


@dataclass
class Reading:
    """A validation of a job.

    :param amounts: what training had cost by then, by the names of `AMOUNTS`; NaN: not recorded.
    :param hits: by source, (Q,) 1 for a right answer, 0 for a wrong one, -1 for one not read.
    :param digest: identifies the held-out samples.
    :param attention: what the record says of it, or {}.
    """

    step: int
    amounts: dict[str, float]
    hits: dict[str, Integers]
    digest: str
    attention: dict[str, Any]

    @property
    def key(self) -> Key:
        """What two validations share that asked the same questions."""
        return self.digest, tuple(sorted((name, len(hits)) for name, hits in self.hits.items()))


@dataclass
class Trial:
    """One job that counts.

    :param readings: its validations, by step.
    :param chosen: the one that the tables are of.
    """

    job: Job
    seed: int
    readings: list[Reading] = field(default_factory=list)
    chosen: Reading | None = None

    @property
    def name(self) -> str:
        return self.job.directory

    @property
    def before(self) -> Reading | None:
        """The validation before the chosen one."""
        if self.chosen is None:
            return None
        earlier = [reading for reading in self.readings if reading.step < self.chosen.step]
        return earlier[-1] if earlier else None


@dataclass
class Variant:
    """Jobs that differ in nothing but their seeds.

    :param fields: its values of the fields in which variants differ.
    """

    label: str
    fields: dict[str, Any]
    trials: list[Trial]
    new_parameters: int | None = None

    @property
    def mechanism(self) -> str:
        return self.trials[0].job.mechanism

    @property
    def seeds(self) -> list[int]:
        return [trial.seed for trial in self.trials]

    def of(self, seed: int) -> Trial:
        return next(trial for trial in self.trials if trial.seed == seed)


def group(jobs: Sequence[Job], say: Callable[[str], None]) -> list[Variant]:
    """Variants in the order of their first jobs.

    :param say: takes a line of each job that is left out, or counts only in part.
    """
    configs = {job.directory: job.config for job in jobs if job.config is not None}
    _say_which_have_none([job for job in jobs if job.config is None], say)
    fields = _apart(configs)
    grouped: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        if job.config is not None:
            grouped[json.dumps(fields[job.directory], sort_keys=True)].append(job)
    first = {members[0].directory: key for key, members in grouped.items()}
    labels = job_labels(
        {name: configs[name] for name in first}, {name: fields[name] for name in first}
    )
    variants = []
    for name, key in first.items():
        label = re.sub(r",?\bseed=\d+", "", labels[name]) if labels[name] == name else labels[name]
        trials = _one_a_seed(label, grouped[key], say)
        variants.append(Variant(label, fields[name], trials))
    times = Counter(variant.label for variant in variants)
    for variant in variants:
        if times[variant.label] > 1:
            variant.label = variant.trials[0].name
    return variants


def _say_which_have_none(jobs: Sequence[Job], say: Callable[[str], None]) -> None:
    """A line for all jobs that lack a configuration for the same reason."""
    alike: dict[str, list[str]] = defaultdict(list)
    for job in jobs:
        why = "; ".join(job.notes) or "its configuration is missing"
        alike[f"it is {job.state} ({why})"].append(job.directory)
    for state, names in alike.items():
        if len(names) == 1:
            say(f"{names[0]} is left out: {state}.")
        else:
            say(f"{len(names)} jobs are left out, of each: {state}. They are {'; '.join(names)}.")


def _apart(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """For each job its values of the fields that set variants apart."""
    found = {}
    for name, fields in differing_fields(configs).items():
        seed = configs[name].seed
        found[name] = {
            key: _without_seed(value, seed)
            for key, value in fields.items()
            if key != "seed"
            and (key.startswith("parallel.") or not isinstance(resume_mark(key), Free))
        }
    return found


def _without_seed(value: Any, seed: int) -> Any:
    """A path that follows the seed, such as an earlier stage's, is the same path."""
    if isinstance(value, str):
        return re.sub(rf"\bseed={seed}\b", "seed=*", value)
    return value


def _one_a_seed(label: str, jobs: Sequence[Job], say: Callable[[str], None]) -> list[Trial]:
    """The trials of a variant by seed; of jobs that share one, the job that came furthest."""
    by_seed: dict[int, list[Job]] = defaultdict(list)
    for job in jobs:
        assert job.config is not None
        by_seed[job.config.seed].append(job)
    trials = []
    for seed, same in sorted(by_seed.items()):
        best = max(same, key=lambda job: job.step)  # the first of those that came as far
        for job in same:
            if job is not best:
                say(
                    f"{label}: {job.directory} and {best.directory} have the same seed {seed} and "
                    f"configuration; {best.directory} counts, {job.directory} is left out."
                )
        trials.append(Trial(best, seed))
    return trials


def read_validations(trial: Trial, sweep: Path) -> str | None:
    """Reads what can be compared of a trial; returns why nothing can, if so."""
    path = sweep / trial.name / VALIDATION_FILE
    if not path.is_file():
        return "it has no validation (evaluation.every and data.validation of the sweep)"
    try:
        records = read_metrics(path)
        metrics = [r for r in trial.job.metrics if r["step"] <= trial.job.step]
        sums = {name: np.cumsum(values) for name, values in _spent(metrics).items()}
        steps = [record["step"] for record in metrics]
        if steps != list(range(1, len(steps) + 1)):
            # Sums over a part of the steps would be too small, and nobody would see it.
            sums = {name: np.full(len(steps), np.nan) for name in sums}
        readings = [_reading(record, steps, sums) for record in records if record.get("hits")]
    except BROKEN as error:
        return f"{VALIDATION_FILE} cannot be read: {type(error).__name__} {error}"
    trial.readings = [reading for reading in readings if reading is not None]
    if not trial.readings and records:
        return (
            "its validations do not say which answers were right (no `hits` in "
            f"{VALIDATION_FILE}): an earlier version trained it. Train it again with this one, "
            "into another directory, or leave it out by --only"
        )
    if not trial.readings:
        return "it has no validation yet"
    return None


def _spent(metrics: Sequence[Record]) -> dict[str, np.ndarray]:
    """What each step took."""
    columns = Columns(metrics)
    return {
        "tokens": columns.column("text_tokens") + columns.column("image_tokens"),
        "flops": columns.column("operations"),
        "seconds": columns.column("seconds"),
    }


def _reading(
    record: Record, steps: Sequence[int], sums: Mapping[str, np.ndarray]
) -> Reading | None:
    """None of a validation whose step is not in the metrics: the run repeats it after a resume."""
    if not steps or record["step"] > steps[-1]:
        return None
    at = int(np.searchsorted(steps, record["step"], side="right")) - 1
    return Reading(
        record["step"],
        {name: float(sums[name][at]) if at >= 0 else 0.0 for name in AMOUNTS},
        {str(source): _answers(text) for source, text in sorted(record["hits"].items())},
        str(record.get("samples_digest")),
        record.get("attention") or {},
    )


def _answers(text: str) -> Integers:
    """:raises ValueError: characters that no answer has."""
    if set(text) - {"0", "1", UNREAD}:
        raise ValueError(f"`hits` hold {text[:20]!r}; expected 0, 1 and {UNREAD}")
    return np.array([-1 if c == UNREAD else int(c) for c in text], dtype=np.int64)


def abilities_of(sources: Sequence[str]) -> dict[str, str]:
    """By ability its source, in natural order: a source's name without the first word, up to a _,
    where all share that, and whole where nothing else or the mean's name would be left.
    """
    common = os.path.commonprefix(list(sources)) if len(sources) > 1 else ""
    start = common.rfind("/") + 1
    cut = common.find("_", start) + 1 or start
    names = {source[cut:]: source for source in sorted(sources, key=natural)}
    return {name if name not in ("", MEAN) else f"({s})": s for name, s in names.items()}


def text_only(ability: str) -> bool:
    """Whether its questions can be answered without an image: text, text_between and the like.

    The ability of a source that shares no first word with others still has its own.
    """
    own = f"_{ability}".replace("/", "_")
    return ability == "text" or ability.startswith("text_") or "_text_between_" in f"{own}_"
