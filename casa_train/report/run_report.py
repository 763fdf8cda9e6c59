"""What a run left in its directory, read and drawn as one self-contained HTML page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from casa_train.config.schema import Config
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.rows import BadRow
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.reading import read_benchmark
from casa_train.evaluate.exact_match import read_question
from casa_train.io.log import read_json_lines
from casa_train.metrics.sinks.base import Record
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.modeling.image_processing_casa import ImageError
from casa_train.report.run_data import RunData
from casa_train.report.run_page import write_report
from casa_train.report.samples import choose_answers
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.run.layout import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    QUARANTINE_FILE,
    REPORT_FILE,
    STARTS_FILE,
    VALIDATION_FILE,
)
from casa_train.run.starts import read_starts


def report(run: Path) -> tuple[Path, dict[str, Any] | None]:
    """Writes RUN/report.html; returns its path and the evaluation, if there is one.

    :raises UserError: not a run directory, or one without metrics.
    """
    config = load_run_config(run)
    metrics = run / METRICS_FILE
    if not metrics.is_file():
        raise UserError(f"{metrics} is missing: the run has not finished a step yet.")
    evaluation: dict[str, Any] | None = None
    if (run / EVALUATION_FILE).is_file():
        evaluation = _json(run / EVALUATION_FILE)
    environment = run / ENVIRONMENT_FILE
    validations: list[Record] = []
    if (run / VALIDATION_FILE).is_file():
        validations = read_metrics(run / VALIDATION_FILE)
    data = RunData(
        name=config.name,
        metrics=read_metrics(metrics),
        config_yaml=(run / CONFIG_FILE).read_text(),
        environment=_json(environment) if environment.is_file() else {},
        evaluation=evaluation,
        pictures={
            **_pictures(config, evaluation),
            **_asked(config, validations),
            **_of_benchmarks(config, validations),
        },
        quarantine=_quarantine(run),
        validations=validations,
        starts=read_starts(run / STARTS_FILE),
        backbone=_backbone(run),
    )
    path = run / REPORT_FILE
    write_report(data, path)
    return path, evaluation


def _backbone(run: Path) -> str:
    """The type of its text model; empty where the run does not say."""
    with contextlib.suppress(UserError, AttributeError):
        text: Any = load_model_config(run).text_config
        return str(text.model_type)
    return ""


def _pictures(config: Config, evaluation: dict[str, Any] | None) -> dict[str, list[bytes]]:
    """The images of the evaluated questions, by id; none where the data has gone."""
    if evaluation is None:
        return {}
    places = {n: s.path for n, s in config.data.validation.items()}
    places |= evaluation.get("validation", {})  # it may have asked other splits
    pictures: dict[str, list[bytes]] = {}
    for answer in choose_answers(evaluation["answers"]):
        name, _, key = answer["id"].partition("/")
        with contextlib.suppress(UserError, BadRow, ImageError, KeyError):
            split = Split(Path(places[name]), check=False)
            row = pc.index(split.index.column("key"), key).as_py()
            last = bool(answer.get("history"))  # of one turn, it is the first one, too
            question = None if row < 0 else read_question(split, name, row, last)
            if question is not None:  # the data may be another now
                pictures[question.id] = list(question.images)
    return pictures


def _asked(config: Config, validations: Sequence[Record]) -> dict[str, list[bytes]]:
    """The images of the questions of the last validation, by id; none where the data has gone."""
    pictures: dict[str, list[bytes]] = {}
    for asked in validations[-1]["questions"] if validations else []:
        name = asked["split"]
        with contextlib.suppress(UserError, BadRow, ImageError, KeyError, IndexError):
            split = Split(Path(config.data.validation[name].path), check=False)
            question = read_question(split, name, asked["row"], bool(asked.get("history")))
            if question is not None and question.id == asked["id"]:  # the data may be another now
                pictures[question.id] = list(question.images)
    return pictures


def _of_benchmarks(config: Config, validations: Sequence[Record]) -> dict[str, list[bytes]]:
    """The images of the last validation's questions of benchmarks, by id; none where the data has
    gone, or is another now.
    """
    pictures: dict[str, list[bytes]] = {}
    found = (validations[-1].get("benchmarks") or {}) if validations else {}
    for name, measured in found.items():
        asked = config.evaluation.benchmarks.get(name)
        if asked is None or not measured["answers"]:
            continue
        with contextlib.suppress(UserError):
            whole = read_benchmark(name, None if asked.source is None else Path(asked.source))
            places = {row: index for index, row in enumerate(whole.rows)}
            for answer in measured["answers"]:
                index = places.get(answer["index"])
                if index is not None and whole.questions[index].text == answer["question"]:
                    with contextlib.suppress(ImageError):
                        pictures[answer["id"]] = [whole.picture(index)]
    return pictures


def _quarantine(run: Path) -> list[dict[str, Any]]:
    """What all ranks quarantined, each sample once: a resume may meet it again."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(run.glob(QUARANTINE_FILE.format(rank="*"))):
        for line in read_json_lines(path):
            found.setdefault(json.dumps(line, sort_keys=True), line)
    return list(found.values())


def _json(path: Path) -> dict[str, Any]:
    """:raises UserError: it is cut short or edited."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected the JSON that a run or an evaluation "
            "wrote. Restore it, or remove it to report without it."
        ) from error
    return content
