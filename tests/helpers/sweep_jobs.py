"""Directories of sweeps as trainings leave them, with answers that are made up."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.cost.sizes import size_model
from tests.helpers.commands import TINY
from tests.helpers.report_pages import fake_record


def config_of(*overrides: str) -> Config:
    return copy.deepcopy(_composed(overrides))


@functools.cache
def _composed(overrides: tuple[str, ...]) -> Config:
    return compose_config(["+experiment=demo", *TINY, "model.tokenizer=none", *overrides])


def make_job(directory: Path, *overrides: str, steps: int = 0) -> Path:
    """A run's directory as a training leaves it, with this many records."""
    config = config_of("trainer.steps=30", *overrides)
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (directory / "model_config.json").write_text(size_model(config, []).to_json_string())
    if steps:
        lines = [json.dumps(fake_record(step)) for step in range(1, steps + 1)]
        (directory / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return directory


Answers = Callable[[int], Mapping[str, Sequence[int]]]
"""Of a step, by source: 1 for a right answer, 0 for a wrong one, -1 for one that was not read."""


def write_job(
    directory: Path,
    config: Config,
    seed: int,
    answers: Answers,
    steps: int = 30,
    every: int = 10,
    done: int | None = None,
    digest: str = "5ea1",
    cost: float = 1.0,
    attention: Callable[[int], dict[str, Any]] | None = None,
    **fields: Any,
) -> Path:
    """A job's directory.

    :param config: of any seed; :param done: the step that it came to, None: the last.
    :param cost: operations of a step, as a multiple of 10^9; its seconds are a thousandth of that.
    :param fields: of every record of the metrics.
    """
    config = copy.deepcopy(config)
    config.seed, config.trainer.steps = seed, steps
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    (directory / "model_config.json").write_text(size_model(config, []).to_json_string())
    own = {"operations": round(1e9 * cost), "seconds": 1.25 * cost, "samples_digest": f"{seed:x}"}
    last = steps if done is None else done
    records = [fake_record(step, **{**own, **fields}) for step in range(1, last + 1)]
    write_lines(directory / "metrics.jsonl", records)
    validations = []
    for step in range(every, last + 1, every):
        validations.append(validation_record(step, answers(step), digest))
        if attention is not None:
            validations[-1]["attention"] = attention(step)
    write_lines(directory / "validation.jsonl", validations)
    return directory


def write_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def validation_record(
    step: int, answers: Mapping[str, Sequence[int]], digest: str
) -> dict[str, Any]:
    hits = {s: "".join("-" if a < 0 else str(int(a)) for a in own) for s, own in answers.items()}
    share = float(np.mean([a for own in answers.values() for a in own if a >= 0]))
    total = sum(len(own) for own in answers.values())
    return {
        "step": step,
        "loss": 3.0 - 2 * share,
        "exact_match": share,
        "answers": total,
        "hits": hits,
        "samples_digest": digest,
        "best_step": step,
        "questions": [],
        "seconds": 2.0,
    }


def skilled(
    skills: Mapping[str, float],
    seed: int,
    questions: int = 100,
    spread: float = 0.2,
    steps: int = 30,
) -> Answers:
    """Answers that become right as training goes on; those of all variants and seeds find the same
    questions hard.

    :param skills: by source, in units of the questions' own spread; 0: half of them in the end.
    :param spread: of a seed's skills around these.
    """
    draw = np.random.default_rng([seed, *(round(1e6 * (9 + s)) for s in skills.values())])
    own = {source: skill + spread * draw.standard_normal() for source, skill in skills.items()}
    noise = {source: draw.standard_normal(questions) for source in skills}

    def answers(step: int) -> dict[str, list[int]]:
        found = {}
        for number, (source, skill) in enumerate(own.items()):
            hard = np.random.default_rng([7, number]).standard_normal(questions)
            late = 3.0 * (1 - min(1.0, step / (0.7 * steps)))
            right = skill - late + 0.3 * noise[source] > hard
            found[source] = [int(x) for x in right]
        return found

    return answers
