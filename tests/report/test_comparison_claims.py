"""What a comparison's words may claim: labels that stay apart, what chance is, who was read where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report.comparison import Comparison, compare
from casa_train.report.jobs import read_sweep
from casa_train.report.variants import text_only
from casa_train.report.verdicts import chance_said, how_matched, verdict
from tests.helpers.sweep_jobs import config_of, skilled, write_job, write_lines

SOURCES = ("tasks_newest", "tasks_earlier")


def job(
    sweep: Path,
    name: str,
    skill: float,
    seed: int,
    *overrides: str,
    cost: float = 1.0,
    every: int = 10,
) -> Path:
    answers = skilled(dict.fromkeys(SOURCES, skill), seed, questions=60)
    config = config_of(f"fusion={name}", *overrides)
    directory = sweep / f"s,fusion={','.join((name, *overrides))},seed={seed}"
    return write_job(directory, config, seed, answers, cost=cost, every=every)


def compared(sweep: Path, match: str = "tokens", baseline: str | None = None) -> Comparison:
    return compare(read_sweep(sweep), sweep, match, baseline)


def test_labels_with_a_comma_stay_apart(tmp_path: Path) -> None:
    for overrides in (["fusion.every=2"], ["fusion.every=3"]):
        job(tmp_path, "casa", 0.3, 0, *overrides)
    job(tmp_path, "insertion", 0.3, 0)
    result = compared(tmp_path)
    (finding,) = verdict(result)
    assert finding.about == "casa, every=2; casa, every=3"


def test_a_baseline_that_adds_no_parameters_is_said(tmp_path: Path) -> None:
    for name in ("casa", "insertion"):
        job(tmp_path, name, 0.3, 4)
    alone = compared(tmp_path, "params", "casa")
    assert "adds none" not in how_matched(alone)
    result = compared(tmp_path, "params")
    assert result.limit == alone.limit > 0
    assert "The baseline insertion adds none" in how_matched(result)


def test_what_chance_is_of_which_ability(tmp_path: Path) -> None:
    run = job(tmp_path, "casa", 0.3, 2)

    def said(**families: dict[str, float | None]) -> str:
        named = {f"tasks_{name}": found for name, found in families.items()}
        (run / "evaluation.json").write_text(json.dumps({"families": named}))
        return chance_said(compared(tmp_path))

    guessed, blind = {"guess": 0.3, "blind": 0.2}, {"guess": None, "blind": 0.2}
    image = "what the jobs answer with another sample's image"
    assert said(newest=guessed).startswith("Chance: the best answer without an image, by")
    assert said(newest=blind).startswith(f"Chance: {image}, by")
    both = said(newest=guessed, earlier=blind)
    assert both.startswith(f"Chance: the best answer without an image; {image} (earlier), by")


@pytest.mark.parametrize(
    ("ability", "alone"),
    [
        ("text", True),
        ("text_between", True),
        ("abilities_text_between", True),  # the only source, or one of several beginnings
        ("own/text_between", True),
        ("read_text", False),
        ("context_between", False),
        ("textvqa", False),
    ],
)
def test_which_questions_need_no_image(ability: str, alone: bool) -> None:
    assert text_only(ability) == alone
