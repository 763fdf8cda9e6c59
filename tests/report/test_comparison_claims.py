"""What a comparison's words may claim: labels stay apart, what chance is, who was read where."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report.comparison import Comparison, compare
from casa_train.report.comparison_page import write_comparison
from casa_train.report.jobs import read_sweep
from casa_train.report.variants import text_only
from casa_train.report.verdicts import chance_said, how_matched, verdict, who_still_rises
from tests.helpers.report_pages import Page
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
    higher = "Chance: the higher of the best answer without an image and of"
    assert both.startswith(f"{higher} {image} (earlier), by")
    # A guess that knows less than jobs that see another image is no chance.
    fewer = said(newest=guessed, earlier={"guess": 0.0, "blind": 0.2})
    assert fewer.startswith(f"{higher} {image} (earlier), by")
    assert compared(tmp_path).chance == {"newest": 0.3, "earlier": 0.2}


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


def test_who_is_read_after_less_training_is_said(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        job(tmp_path, "insertion", 2.0, seed)
        job(tmp_path, "casa", 0.2, seed, cost=1.6)
        job(tmp_path, "cross_attention", 0.2, seed, cost=1.01)
    result = compared(tmp_path, "flops")
    (said,) = [p for p in result.problems if "no validation nearer" in p]
    assert "casa at 53 %" in said and "insertion at 100 %" in said
    words = {finding.about: finding.said for finding in verdict(result)}
    told = (
        "; read after 53 % of the training FLOPs of insertion: that alone may be why it is worse."
    )
    assert words["casa"].endswith(told)
    assert "worse" in words["cross_attention"] and "read after" not in words["cross_attention"]
    # The other way round it is the baseline that had less.
    words = {
        finding.about: finding.said for finding in verdict(compared(tmp_path, "flops", "casa"))
    }
    assert words["insertion"].endswith(
        "read after 188 % of the training FLOPs of casa: that alone may be why it is better."
    )
    # By tokens all stand at the same.
    result = compared(tmp_path, "tokens")
    assert not result.problems and "read after" not in "".join(map(str, verdict(result)))


def test_seeds_that_are_read_apart_are_said(tmp_path: Path) -> None:
    for seed in (0, 1):
        job(tmp_path, "casa", 1.0, seed, cost=1.1 if seed else 1.0)
    (said,) = [p for p in compared(tmp_path, "flops").problems if "no validation nearer" in p]
    assert "casa at 73 to 100 %" in said


def test_a_finished_job_whose_validations_end_before_draws_nobody_back(tmp_path: Path) -> None:
    for name in ("casa", "insertion"):
        for seed in (0, 1):
            job(tmp_path, name, 1.0, seed)
    path = tmp_path / "s,fusion=casa,seed=1" / "validation.jsonl"
    write_lines(path, [r for r in read_metrics(path) if r["step"] == 10])
    result = compared(tmp_path)
    (said,) = [p for p in result.problems if "is left out" in p]
    assert said.startswith("s,fusion=casa,seed=1") and "at step 10 (" in said
    assert {reading.step for _, reading in result.chosen} == {30}
    assert [variant.seeds for variant in result.variants] == [[0, 1], [0]]
    # Where all end there, that is where they are read.
    for path in tmp_path.glob("*/validation.jsonl"):
        write_lines(path, [r for r in read_metrics(path) if r["step"] == 10])
    assert len(compared(tmp_path).chosen) == 4


def test_what_is_better_after_less_needs_no_excuse(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        job(tmp_path, "insertion", -3.0, seed)
        job(tmp_path, "casa", 4.0, seed, cost=1.4)
    result = compared(tmp_path, "flops")
    words = {finding.about: finding.said for finding in verdict(result)}
    assert any("casa at 93 %" in problem for problem in result.problems)
    assert "better" in words["casa"] and "read after" not in words["casa"]


def test_every_job_that_must_be_known_stands_on_the_page(tmp_path: Path) -> None:
    for seed in range(7):
        name = f"s,{'long' * 25},seed={seed}"
        config, answers = config_of("fusion=casa"), skilled({"one": 1.0}, seed)
        run = write_job(tmp_path / name, config, seed, answers)
        place = {"time": 1.0, "start": 0, "host": f"h{seed % 2}", "device": "cpu"}
        write_lines(run / "starts.jsonl", [place])
    lines, path = write_comparison(tmp_path, "*", "seconds")
    (told,) = [line.removeprefix("- ") for line in lines if "different machines" in line]
    assert len(told) > 600 and told in Page(path.read_text()).text


def test_an_ability_that_is_named_as_their_mean_is_not_the_mean(tmp_path: Path) -> None:
    for name in ("casa", "insertion"):
        answers = skilled({"all abilities": 3.0, "b": -3.0}, 1)
        write_job(tmp_path / f"s,{name}", config_of(f"fusion={name}"), 1, answers)
    result = compared(tmp_path)
    assert len(result.columns) == len(set(result.columns)) == 3
    cells = [result.cells["casa", column].mean for column in result.columns]
    assert cells[0] == pytest.approx((cells[1] + cells[2]) / 2) and cells[1] != cells[2]


def made(sweep: Path, commit: str | None, torch: str = "2.9.1", only: str = "*") -> None:
    for path in sweep.glob(only):
        recorded = {
            "casa_train": "0.7.3",
            "git_commit": commit,
            "python": "3.12.4",
            "packages": {"torch": torch, "transformers": None},
            "command": ["/x/__main__.py", "seed=4", "+sweep=s", "run_dir='/x/y'", "name=a b"],
        }
        (path / "environment.json").write_text(json.dumps(recorded))


def test_the_page_says_what_made_it(tmp_path: Path) -> None:
    for name in ("insertion", "casa"):
        job(tmp_path, name, 0.3, 4)
    assert [name for name, _ in compared(tmp_path).made_by] == ["steps", "seeds"]
    made(tmp_path, "5f" * 20)
    result = compared(tmp_path)
    assert not result.problems
    assert dict(result.made_by) == {
        "code": "casa_train 0.7.3, commit 5f5f5f5f5f5f",
        "packages": "Python 3.12.4, torch 2.9.1",
        "steps": "30",
        "seeds": "4",
        "one job": "python -m casa_train seed=4 +sweep=s 'name=a b'",
    }
    lines, page = write_comparison(tmp_path, "*", "tokens")
    assert "casa_train 0.7.3, commit 5f5f5f5f5f5f" in Page(page.read_text()).text
    assert "packages: Python 3.12.4, torch 2.9.1" in lines
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert content["made_by"]["seeds"] == "4"


def test_jobs_of_other_code_are_named(tmp_path: Path) -> None:
    for name in ("insertion", "casa"):
        job(tmp_path, name, 0.3, 4)
    made(tmp_path, "5f" * 20)
    made(tmp_path, "5f" * 20 + "+dirty", only="*casa*")
    code, changed = compared(tmp_path).problems
    assert "commit 5f5f5f5f5f5f with changes: s,fusion=casa,seed=4" in code
    assert "commit 5f5f5f5f5f5f: s,fusion=insertion,seed=4" in code
    assert "trained 1 job had changes that no commit holds" in changed
    made(tmp_path, None, torch="2.8", only="*casa*")
    code, packages = compared(tmp_path).problems
    assert "casa_train 0.7.3: s,fusion=casa,seed=4" in code
    assert "different packages" in packages and "torch 2.8: s,fusion=casa" in packages
    for broken in ("[1]", "{", '{"packages": 3, "command": 7}'):
        next(tmp_path.glob("*casa*/environment.json")).write_text(broken)
        found = "; ".join(compared(tmp_path).problems)
        assert ("not recorded: s,fusion=casa,seed=4" in found) == ("packages" in broken)


def test_who_still_rises_is_said(tmp_path: Path) -> None:
    def growing(last: float) -> Callable[[int], dict[str, list[int]]]:
        def answers(step: int) -> dict[str, list[int]]:
            right = round(100 * (last if step == 30 else 0.5))
            return {
                SOURCES[0]: [1] * 50 + [0] * 50,
                SOURCES[1]: [1] * right + [0] * (100 - right),
            }

        return answers

    for name, last in (("insertion", 0.51), ("casa", 0.7), ("cross_attention", 0.9)):
        directory = tmp_path / f"s,fusion={name},seed=5"
        write_job(directory, config_of(f"fusion={name}"), 5, growing(last))
    said = str(who_still_rises(compared(tmp_path)))
    assert said.endswith(
        "in points of all abilities since the validation before (and where most), "
        "cross_attention +20.0 (earlier +40.0); casa +10.0 (earlier +20.0)."
    )
    lines, page = write_comparison(tmp_path, "*", "tokens")
    assert said in lines and said in " ".join(Page(page.read_text()).text.split())
    # Nobody does where the first validation is the one that is read, or nobody gained.
    for path in tmp_path.glob("*/validation.jsonl"):
        write_lines(path, read_metrics(path)[:2])
    assert who_still_rises(compared(tmp_path)) is None
