"""Reads the runs of a sweep: what each was, how far it came, how good and how fast it was."""

from __future__ import annotations

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from casa_train.config.matched import as_given
from casa_train.config.schema import Config, flatten
from casa_train.cost.full_pack import full_pack
from casa_train.cost.sizes import work_counter
from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.report.sweep_page import Job
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.run.layout import (
    CONFIG_FILE,
    EVALUATION_FILE,
    FAILURE_FILE,
    METRICS_FILE,
    REPORT_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
)
from casa_train.run.starts import read_starts
from casa_train.run.sweep import run_directories
from casa_train.setup.model import meta_model
from casa_train.setup.parts import part_sizes

Sizes = tuple[int, int, int, int]
"""Parameters, those of fusion, those that train, and the work of a full pack."""

# What a file that was cut short, edited or written by another version raises.
BROKEN = (
    UserError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    YAMLError,
    OmegaConfBaseException,
)


def read_sweep(sweep: Path, only: str = "*") -> list[Job]:
    """The jobs of a sweep; what cannot be read of one is said in its notes.

    :raises UserError: no run there.
    """
    configs: dict[str, Config] = {}
    jobs = []
    for run in run_directories(sweep, only):
        job = Job(run.name, run.name)
        jobs.append(job)
        if not (run / CONFIG_FILE).is_file():
            job.state = "not started"
            job.notes += _failure(run, None)
            continue
        with _noted(job, CONFIG_FILE):
            configs[run.name] = load_run_config(run)
    differing = differing_fields(configs)
    labels = job_labels(configs, differing)
    sizes: dict[str, Sizes] = {}
    for job in jobs:
        if job.directory in configs:
            config = job.config = configs[job.directory]
            job.label, job.differs = labels[job.directory], differing[job.directory]
            job.mechanism, job.steps = str(config.fusion["mechanism"]), config.trainer.steps
            _read(job, sweep / job.directory, config, sizes)
    return jobs


def differing_fields(configs: Mapping[str, Config]) -> dict[str, dict[str, Any]]:
    """For each job its values of the fields in which the jobs differ.

    Options of the fusion mechanism are compared among the jobs that share the mechanism, and what
    a start chose to match parameters is left out.
    """
    flat = {job: flatten(as_given(config)) for job, config in configs.items()}
    groups: dict[str, list[str]] = defaultdict(list)
    for job, fields in flat.items():
        groups[str(fields["fusion.mechanism"])].append(job)

    def differ(jobs: Sequence[str], fields: set[str]) -> set[str]:
        return {
            field for field in fields if len({json.dumps(flat[job].get(field)) for job in jobs}) > 1
        }

    every = {field for fields in flat.values() for field in fields} - {"name", "run_dir"}
    options = {field for field in every if field.startswith("fusion.")} - {"fusion.mechanism"}
    common = differ(list(flat), every - options)
    found = {}
    for jobs in groups.values():
        own = common | differ(jobs, options)
        for job in jobs:
            found[job] = {field: flat[job][field] for field in sorted(own) if field in flat[job]}
    return found


def job_labels(
    configs: Mapping[str, Config], differing: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """A short name for each job: its mechanism, and what most other jobs do not have. Of a switch
    that half of them turn on, those say so that do.

    Jobs that would share one are called by their directories.
    """
    usual: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def key(job: str, field: str) -> tuple[str, str]:
        own = field.startswith("fusion.")
        return (configs[job].fusion["mechanism"] if own else "", field)

    for job, fields in differing.items():
        for field, value in fields.items():
            usual[key(job, field)][json.dumps(value)] += 1
    labels = {}
    for job, fields in differing.items():
        parts = [str(configs[job].fusion["mechanism"])]
        for field, value in fields.items():
            counts = usual[key(job, field)]
            same = 2 * counts[json.dumps(value)]
            usually = same > counts.total() or (value is False and same == counts.total())
            if field == "fusion.mechanism" or usually:
                continue
            parts.append(f"{field.removeprefix('fusion.')}={_plain(value)}")
        labels[job] = ", ".join(parts)
    times = Counter(labels.values())
    return {job: label if times[label] == 1 else job for job, label in labels.items()}


def _read(job: Job, run: Path, config: Config, sizes: dict[str, Sizes]) -> None:
    """:param sizes: of the jobs before, by what they follow from."""
    with _noted(job, METRICS_FILE):
        job.metrics = read_metrics(run / METRICS_FILE) if (run / METRICS_FILE).is_file() else []
        job.step = int(job.metrics[-1]["step"]) if job.metrics else 0
    job.report = (run / REPORT_FILE).is_file()
    job.state = "finished" if job.step >= job.steps else "unfinished"
    if job.state == "unfinished":
        failure = _failure(run, run / METRICS_FILE)
        with _noted(job, STARTS_FILE):
            last = read_starts(run / STARTS_FILE)[-1:]
            left = last[0].get("left", "killed, or still running") if last else None
            # What left by an exception says so: its kind, then its message.
            kind, colon, message = (left or "").partition(": ")
            if colon and not failure:
                failure = [message]
            if left and not failure:
                job.notes.append(left)
        if failure:
            job.state, job.notes = "failed", job.notes + failure
    with _noted(job, VALIDATION_FILE):
        _read_validation(job, run / VALIDATION_FILE)
    with _noted(job, EVALUATION_FILE):
        _read_evaluation(job, run / EVALUATION_FILE)
    with _noted(job, "sizes"):
        fields = {k: v for k, v in flatten(config).items() if k not in ("name", "run_dir", "seed")}
        described = load_model_config(run)
        key = json.dumps([fields, described.to_dict()], sort_keys=True, default=str)
        if key not in sizes:
            sizes[key] = _sizes(config, described)
        job.parameters, job.fusion_parameters, job.trained, job.work = sizes[key]


def _read_validation(job: Job, path: Path) -> None:
    """The last loss and exact match that were measured while training."""
    records = read_metrics(path) if path.is_file() else []
    measured = [r for r in records if r.get("exact_match") is not None]
    if records:
        job.held_out_loss = records[-1].get("loss")
    if measured:
        job.exact_match = float(measured[-1]["exact_match"])
        job.measured = f"teacher-forced, at step {measured[-1]['step']}"


def _read_evaluation(job: Job, path: Path) -> None:
    """Scores of an export, which answered by itself; they count more."""
    if path.is_file():
        scores = _json(path)
        if scores["exact_match"] is None:  # live captions alone
            return
        job.exact_match, job.blind = float(scores["exact_match"]), float(scores["blind"])
        at = "" if scores.get("step") is None else f" at step {scores['step']}"
        job.measured = f"{scores['questions']} questions{at}"


def _sizes(config: Config, described: CasaConfig) -> Sizes:
    """From the model on the meta device."""
    model = meta_model(config, described)
    parts = part_sizes(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work = work_counter(config, model)(full_pack(config), config.data.text_tokens)
    return sum(parts.values()), parts["fusion"], trained, work


def _failure(run: Path, metrics: Path | None) -> list[str]:
    """The message with which the job failed last, unless it went on since."""
    path = run / FAILURE_FILE
    try:
        if metrics is not None and metrics.stat().st_mtime_ns > path.stat().st_mtime_ns:
            return []
        return [path.read_text().strip()]
    except OSError:
        return []


@contextlib.contextmanager
def _noted(job: Job, what: str) -> Iterator[None]:
    try:
        yield
    except BROKEN as error:
        job.notes.append(f"{what} cannot be read: {type(error).__name__} {error}")


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _plain(value: Any) -> str:
    """As one would write it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
