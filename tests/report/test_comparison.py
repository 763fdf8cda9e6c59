"""Comparisons of sweeps that are made up on disk: who is read where, and what is said instead."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report.comparison import Comparison, compare, fill
from casa_train.report.comparison_page import write_comparison
from casa_train.report.jobs import read_sweep
from casa_train.report.read_points import reference_parameters
from casa_train.report.significance import holm, interval, paired
from casa_train.report.sweep_page import Job
from casa_train.report.training_costs import count_new_parameters
from casa_train.report.variants import MEAN, Reading, Trial, Variant, abilities_of, group
from casa_train.report.verdicts import verdict, what_a_claim_is
from casa_train.run.directory import record_failure
from casa_train.run.starts import StartLog
from casa_train.setup.equal_parameters import agrees
from casa_train.training.state import Progress
from tests.helpers.once import once
from tests.helpers.sweep_jobs import config_of, skilled, write_job, write_lines

SKILLS = {
    "casa": {"synthetic_newest": 2.0, "synthetic_earlier_2": -1.5, "synthetic_earlier_10": 0.4},
    "insertion": {"synthetic_newest": 0.3, "synthetic_earlier_2": 1.5, "synthetic_earlier_10": 0.4},
    "gated_cross_attention": dict.fromkeys(
        ("synthetic_newest", "synthetic_earlier_2", "synthetic_earlier_10"), 0.4
    ),
}
COSTS = {"casa": 1.0, "insertion": 1.6, "gated_cross_attention": 1.25}
ABILITIES = ["earlier_2", "earlier_10", "newest"]


def job(directory: Path, mechanism: str, seed: int, *overrides: str, **more: Any) -> Path:
    """A job of thirty steps, read every ten."""
    config = config_of(f"fusion={mechanism}", *overrides)
    answers = more.pop("answers", None) or skilled(SKILLS[mechanism], seed)
    return write_job(
        directory / f"s,fusion={mechanism}{''.join(overrides)},seed={seed}",
        config,
        seed,
        answers,
        cost=more.pop("cost", COSTS[mechanism]),
        **more,
    )


def make_sweep(path: Path) -> None:
    for mechanism in SKILLS:
        for seed in (0, 1, 2):
            job(path, mechanism, seed)


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    """Three mechanisms of three seeds, to be changed."""
    shutil.copytree(once(tmp_path_factory, "compared_sweep", make_sweep), tmp_path / "s")
    return tmp_path / "s"


def compared(sweep: Path, match: str = "tokens", baseline: str | None = None) -> Comparison:
    return compare(read_sweep(sweep), sweep, match, baseline)


def said(result: Comparison, *words: str) -> str:
    """The problem that holds all these words."""
    (found,) = [p for p in result.problems if all(word in p for word in words)]
    return found


def labels(variants: Sequence[Variant]) -> list[str]:
    return [variant.label for variant in variants]


# -------------------------------------------------------------------------------- what is compared


def test_jobs_become_variants_of_seeds(sweep: Path) -> None:
    result = compared(sweep)
    assert labels(result.variants) == ["insertion", "casa", "gated_cross_attention"]
    assert result.baseline.label == "insertion"
    assert [variant.seeds for variant in result.variants] == [[0, 1, 2]] * 3
    assert result.abilities == ABILITIES and result.columns == [MEAN, *ABILITIES]
    assert not result.problems and not result.unlearned
    hits = {
        seed: read_metrics(sweep / f"s,fusion=casa,seed={seed}" / "validation.jsonl")[-1]["hits"]
        for seed in (0, 1, 2)
    }
    shares = [
        [own[f"synthetic_{ability}"].count("1") / 100 for ability in ABILITIES]
        for own in hits.values()
    ]
    for i, ability in enumerate(ABILITIES):
        expected = interval([own[i] for own in shares])
        assert result.cells["casa", ability].half == pytest.approx(expected.half)
        assert result.cells["casa", ability].mean == pytest.approx(expected.mean)
    assert result.cells["casa", MEAN].mean == pytest.approx(np.mean(shares))


def test_known_differences_are_found_and_said(sweep: Path) -> None:
    result = compared(sweep)
    assert {key: d.verdict for key, d in result.differences.items() if key[0] == "casa"} == {
        ("casa", MEAN): "no difference shown",
        ("casa", "earlier_2"): "worse",
        ("casa", "earlier_10"): "no difference shown",
        ("casa", "newest"): "better",
    }
    words = {finding.about: finding.said for finding in verdict(result)}
    better, worse, neither = words["casa"].split("; ")
    assert better.startswith("better at newest (+") and worse.startswith("worse at earlier_2 (−")
    assert neither == "no difference shown at earlier_10."
    assert "the 8 comparisons of this page" in what_a_claim_is(result)


def test_the_statistics_can_be_done_again_from_the_csv(sweep: Path) -> None:
    write_comparison(sweep, "*", "tokens", "gated_cross_attention")
    rows = list(csv.DictReader((sweep / "comparison.csv").open()))
    assert len(rows) == 3 * 3 * 3
    answers: dict[tuple[str, str], list[np.ndarray]] = {}
    for row in sorted(rows, key=lambda row: int(row["seed"])):
        hits = np.array([int(c) for c in row["hits"]])
        assert hits.sum() == int(row["correct"]) and len(hits) == int(row["questions"])
        answers.setdefault((row["variant"], row["ability"]), []).append(hits)
    found = json.loads((sweep / "comparison.json").read_text())["differences"]
    p_values = []
    for one in found:
        names = ABILITIES if one["ability"] == MEAN else [one["ability"]]
        first, second = (
            [np.stack(answers[label, name]) for name in names]
            for label in (one["variant"], "gated_cross_attention")
        )
        difference = paired(first, second)
        p_values.append(difference.p)
        assert one["difference"] == pytest.approx(difference.over_seeds.mean)
        assert one["high"] == pytest.approx(difference.over_seeds.high)
    assert [one["p_corrected"] for one in found] == pytest.approx(holm(p_values))


def made_up(hits: dict[str, list[list[int]]], baseline: str) -> Comparison:
    """Of one ability, by variant and seed."""
    variants = []
    for label, seeds in hits.items():
        trials = []
        for seed, answers in enumerate(seeds):
            reading = Reading(1, {}, {"only": np.array(answers)}, "d", {})
            trials.append(Trial(Job(f"{label}{seed}", label), seed, [reading], reading))
        variants.append(Variant(label, {}, trials))
    base = next(variant for variant in variants if variant.label == baseline)
    result = Comparison("s", "params", 0, base, variants, [], {"only": "only"})
    fill(result)
    return result


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.permutations(["a", "b", "c", "d"]), st.permutations(range(3)))
def test_the_order_of_jobs_and_seeds_changes_nothing(
    state: int, order: list[str], seeds: list[int]
) -> None:
    draw = np.random.default_rng(state)
    hits = {label: draw.integers(0, 2, size=(3, 30)).tolist() for label in "abcd"}
    other = {label: [hits[label][seed] for seed in seeds] for label in order}
    one, two = made_up(hits, "b"), made_up(other, "b")
    assert one.cells.keys() == two.cells.keys() and len(one.differences) == 3
    for key, difference in one.differences.items():
        assert two.differences[key].corrected == pytest.approx(difference.corrected)
        assert two.differences[key].over_seeds.low == pytest.approx(difference.over_seeds.low)
        assert two.differences[key].verdict == difference.verdict


def test_what_sets_variants_apart(tmp_path: Path) -> None:
    """Not the seed, paths that follow it, and what only watches; but how a run is spread is."""
    overrides = {
        "a": [],
        "b": ["seed=1", "trainer.log_every=3", "metrics.tensorboard=false"],
        "c": ["fusion.every=2"],
        "d": ["fusion.every=2", "seed=1"],
        "e": ["parallel.compile=on"],
    }
    jobs = []
    for name, own in overrides.items():
        config = config_of("fusion=casa", *own)
        config.model.init_from = f"stage1,seed={config.seed}/export"
        jobs.append(Job(name, name, mechanism="casa", config=config))
    variants = group(jobs, pytest.fail)
    assert [[trial.name for trial in variant.trials] for variant in variants] == [
        ["a", "b"],
        ["c", "d"],
        ["e"],
    ]
    assert [variant.seeds for variant in variants] == [[0, 1], [0, 1], [0]]
    assert labels(variants) == ["casa", "casa, every=2", "casa, parallel.compile=on"]


def test_abilities_are_sources_without_what_all_begin_with() -> None:
    assert abilities_of(["synthetic_a_10", "synthetic_a_9"]) == {
        "a_9": "synthetic_a_9",
        "a_10": "synthetic_a_10",
    }
    assert abilities_of(["x/synthetic_a", "x/synthetic_b"]) == {
        "a": "x/synthetic_a",
        "b": "x/synthetic_b",
    }
    assert abilities_of(["chart", "count"]) == {"chart": "chart", "count": "count"}
    assert abilities_of(["synthetic_a"]) == {"synthetic_a": "synthetic_a"}
    assert abilities_of(["x_", "x_b"]) == {"(x_)": "x_", "b": "x_b"}
    assert abilities_of([MEAN, "b"]) == {"(all abilities)": MEAN, "b": "b"}


# ------------------------------------------------------------------------------------- where it is


@pytest.mark.parametrize(
    ("match", "limit", "steps"),
    [
        ("tokens", 30 * 6000, {"casa": 30, "insertion": 30, "gated_cross_attention": 30}),
        # casa's thirty steps are as much work as 18.75 of insertion's and 24 of gated ones'.
        ("flops", 30e9, {"casa": 30, "insertion": 10, "gated_cross_attention": 20}),
        ("seconds", 37.5, {"casa": 30, "insertion": 10, "gated_cross_attention": 20}),
    ],
)
def test_jobs_are_read_where_training_had_cost_the_same(
    sweep: Path, match: str, limit: float, steps: dict[str, int]
) -> None:
    result = compared(sweep, match)
    assert result.limit == pytest.approx(limit)
    assert {v.label: {t.chosen and t.chosen.step for t in v.trials} for v in result.variants} == {
        label: {step} for label, step in steps.items()
    }
    for _, reading in result.chosen:
        assert reading.amounts[match] <= limit * 1.02
    if match == "tokens":
        assert not result.problems
    else:  # the demo's schedule decays at its end
        assert "insertion at 10 of 30" in said(result, "decay")


def test_seeds_whose_packs_differ_a_little_are_read_at_one_step(sweep: Path) -> None:
    shutil.rmtree(sweep / "s,fusion=casa,seed=1")
    job(sweep, "casa", 1, cost=0.985)
    result = compared(sweep, "flops")
    assert result.limit == pytest.approx(0.985 * 30e9)
    casa = next(v for v in result.variants if v.label == "casa")
    assert [t.chosen and t.chosen.step for t in casa.trials] == [30, 30, 30]
    shutil.rmtree(sweep / "s,fusion=casa,seed=1")
    job(sweep, "casa", 1, cost=0.975)
    casa = next(v for v in compared(sweep, "flops").variants if v.label == "casa")
    assert [t.chosen and t.chosen.step for t in casa.trials] == [20, 30, 20]


def test_parameters_are_matched_within_two_per_cent(sweep: Path) -> None:
    result = compared(sweep, "params", "casa")
    counts = {v.label: v.new_parameters for v in [*result.variants, *result.apart]}
    # Beyond insertion's model: what fusion has, and no mechanism here drops anything.
    assert counts == {job.mechanism: job.fusion_parameters for job in read_sweep(sweep, "*seed=0")}
    assert counts["insertion"] == 0 and result.limit == counts["casa"]
    assert labels(result.variants) == ["casa"]
    assert labels(result.apart) == ["gated_cross_attention", "insertion"]
    assert f"{counts['casa']:,}" in said(result, "gated_cross_attention", "matched")
    # Insertion as the baseline stands beside those that most agree with.
    result = compared(sweep, "params")
    assert labels(result.variants)[0] == "insertion" and len(result.variants) == 2


def test_which_number_of_parameters_is_matched() -> None:
    assert reference_parameters({"a": 0, "b": 100, "c": 101, "d": 300}, 0) == 101
    assert reference_parameters({"a": 7, "b": 100, "c": 101}, 7) == 7
    assert reference_parameters({"a": 0, "b": 0}, 0) == 0
    assert agrees(102, 100) and not agrees(103, 100) and not agrees(97, 100)


def test_dropped_layers_count_as_less(tmp_path: Path) -> None:
    job(tmp_path, "casa", 0, "fusion.placement=replace", "fusion.share_parameters=false")
    (read,) = read_sweep(tmp_path)
    (variant,) = group([read], pytest.fail)
    count_new_parameters([variant], tmp_path, pytest.fail)
    assert read.fusion_parameters is not None and variant.new_parameters is not None
    assert variant.new_parameters < read.fusion_parameters


# ---------------------------------------------------------------------------------- what is refused


def test_a_baseline_that_is_not_there_lists_the_variants(sweep: Path) -> None:
    with pytest.raises(UserError, match="'mamba' is no variant.*'casa', 'gated.*', 'insertion'"):
        compared(sweep, baseline="mamba")


def test_other_questions_are_not_compared(sweep: Path) -> None:
    shutil.rmtree(sweep / "s,fusion=casa,seed=1")
    job(sweep, "casa", 1, digest="07e2")
    result = compared(sweep)
    assert "digest 07e2 against" in said(result, "s,fusion=casa,seed=1", "other questions")
    assert said(result, "casa has no job that counts of seed 1")
    assert result.cells["casa", MEAN].seeds == result.differences["casa", MEAN].over_seeds.seeds
    assert result.cells["casa", MEAN].seeds == 2


def test_as_many_other_questions_are_not_compared(sweep: Path) -> None:
    """The same digest with other counts: an evaluation that asked every turn, say."""
    for seed in (0, 1, 2):
        shutil.rmtree(sweep / f"s,fusion=casa,seed={seed}")
        job(sweep, "casa", seed, answers=skilled(SKILLS["casa"], seed, questions=90))
    result = compared(sweep)
    assert labels(result.variants) == ["insertion", "gated_cross_attention"]
    assert len([p for p in result.problems if "270 questions" in p]) == 3


def test_a_run_of_an_earlier_version_is_named(sweep: Path) -> None:
    path = sweep / "s,fusion=casa,seed=0" / "validation.jsonl"
    old = [{k: v for k, v in r.items() if k != "hits"} for r in read_metrics(path)]
    write_lines(path, old)
    result = compared(sweep)
    assert "an earlier version trained it. Train it again" in said(result, "casa,seed=0 is left")
    assert next(v for v in result.variants if v.label == "casa").seeds == [1, 2]


def test_jobs_that_are_not_done_are_left_out(sweep: Path) -> None:
    for seed in (0, 1):
        shutil.rmtree(sweep / f"s,fusion=casa,seed={seed}")
    job(sweep, "casa", 0, done=20)
    record_failure(job(sweep, "casa", 1, done=10), "5 steps in a row were not finite")
    (sweep / "s,fusion=casa,seed=2" / "config.yaml").write_text("fusion: [")
    result = compared(sweep)
    assert "unfinished at step 20 of 30" in said(result, "casa,seed=0 is left out")
    assert "not finite" in said(result, "casa,seed=1 is left out", "failed at step 10")
    assert said(result, "casa,seed=2 is left out", "unreadable", "config.yaml")
    assert labels(result.variants) == ["insertion", "gated_cross_attention"]


def test_jobs_that_have_not_begun_share_a_line(sweep: Path) -> None:
    for seed in (3, 4):
        (sweep / f"s,fusion=casa,seed={seed}").mkdir()
    (sweep / "s,fusion=hyper_attention,seed=3").mkdir()
    (sweep / "s,fusion=casa,seed=2" / "config.yaml").write_text("fusion: [")
    result = compared(sweep)
    missing = [line for line in result.problems if "not started" in line]
    assert missing == [
        "3 jobs are left out, of each: it is not started (its configuration is missing). They are "
        "s,fusion=casa,seed=3; s,fusion=casa,seed=4; s,fusion=hyper_attention,seed=3."
    ]
    assert said(result, "casa,seed=2 is left out", "unreadable", "config.yaml")


def test_where_no_job_is_done_they_are_read_where_they_came(tmp_path: Path) -> None:
    job(tmp_path, "casa", 0, done=29)
    job(tmp_path, "insertion", 0, done=10)
    result = compared(tmp_path)
    assert {t.name: r.step for t, r in result.chosen} == {
        "s,fusion=casa,seed=0": 10,
        "s,fusion=insertion,seed=0": 10,
    }
    assert said(result, "casa,seed=0 is read where it came", "29 of 30")


def test_of_one_seed_nothing_is_claimed(tmp_path: Path) -> None:
    job(tmp_path, "casa", 0)
    job(tmp_path, "insertion", 0)
    result = compared(tmp_path)
    assert result.differences["casa", "newest"].shown
    assert not any(difference.claimed for difference in result.differences.values())
    about = {finding.about: finding.said for finding in verdict(result)}["casa"]
    assert about.startswith("on these questions and by one seed alone: ")
    assert "better at newest (+" in about
    assert "Of one seed there is no interval" in what_a_claim_is(result)


def test_seeds_are_paired(sweep: Path) -> None:
    shutil.rmtree(sweep / "s,fusion=insertion,seed=0")
    job(sweep, "insertion", 7)
    result = compared(sweep)
    assert said(result, "insertion has no job that counts of seed 0")
    assert said(result, "casa has no job that counts of seed 7")
    assert result.differences["casa", "newest"].over_seeds.seeds == 2
    assert result.cells["casa", "newest"].seeds == 3


def test_variants_without_a_common_seed_are_not_compared(tmp_path: Path) -> None:
    job(tmp_path, "casa", 0)
    job(tmp_path, "insertion", 1)
    result = compared(tmp_path)
    assert not result.differences
    assert said(result, "casa and the baseline have no seed in common")


def test_of_two_jobs_of_a_seed_one_counts(sweep: Path) -> None:
    shutil.copytree(sweep / "s,fusion=casa,seed=1", sweep / "s,fusion=casa,seed=1,again")
    result = compared(sweep)
    assert said(result, "same seed 1", "s,fusion=casa,seed=1,again is left out")
    assert result.cells["casa", MEAN].seeds == 3


def test_unread_answers_leave_the_comparison_of_all(sweep: Path) -> None:
    path = sweep / "s,fusion=casa,seed=0" / "validation.jsonl"
    records = read_metrics(path)
    for record in records:
        record["hits"]["synthetic_newest"] = "--" + record["hits"]["synthetic_newest"][2:]
        record["hits"]["synthetic_earlier_2"] = "-" * 100
    write_lines(path, records)
    result = compared(sweep)
    assert result.abilities == ["earlier_10", "newest"]
    assert "98 questions (s,fusion=casa,seed=0 2)" in said(result, "newest")
    assert said(result, "earlier_2", "0 questions")
    assert result.questions("newest") == 98
    insertion = read_metrics(sweep / "s,fusion=insertion,seed=0" / "validation.jsonl")[-1]["hits"]
    expected = insertion["synthetic_newest"][2:].count("1") / 98
    assert result.shares(result.baseline, "newest")[0] == pytest.approx(expected)


def test_other_steps_and_data_are_named(sweep: Path) -> None:
    shutil.rmtree(sweep / "s,fusion=casa,seed=0")
    for seed in (0, 1, 2):
        job(sweep, "casa", seed, "+data.sources.more.path=more", steps=40, samples_digest="0ther")
    result = compared(sweep)
    assert "30: " in said(result, "trainer.steps differ") and "40: " in said(result, "steps differ")
    assert "data.sources.more.path" in said(result, "the training data differs")
    assert "seed 1: 0ther" in said(result, "other samples in step 1")
    result = compared(sweep, "params", "casa")
    assert labels(result.variants) == ["casa"]


def test_jobs_of_other_lengths_do_not_match_by_parameters(sweep: Path) -> None:
    shutil.rmtree(sweep / "s,fusion=casa,seed=0")
    job(sweep, "casa", 0, steps=40)
    result = compared(sweep, "params", "casa")
    assert any("trainer.steps" in variant.fields for variant in result.apart)
    assert said(result, "at step 40, the baseline's at step 30", "--match tokens")


def test_sums_over_some_steps_are_not_taken_for_all(sweep: Path) -> None:
    path = sweep / "s,fusion=casa,seed=0" / "metrics.jsonl"
    write_lines(path, [r for r in read_metrics(path) if r["step"] != 4])
    result = compared(sweep, "flops")
    assert said(result, "casa,seed=0 is left out", "training FLOPs of every step")
    assert not compared(sweep, "params", "casa").cells["casa", MEAN].seeds < 3


def test_a_first_validation_beyond_the_limit_is_told(sweep: Path) -> None:
    for seed in (0, 1, 2):
        shutil.rmtree(sweep / f"s,fusion=casa,seed={seed}")
        job(sweep, "casa", seed, cost=8.0)
    result = compared(sweep, "flops")
    assert labels(result.apart) == ["casa"]
    assert len([p for p in result.problems if "beyond the 37.5 GFLOP" in p]) == 3


def test_a_sweep_without_validations_is_refused(sweep: Path) -> None:
    for path in sweep.glob("*/validation.jsonl"):
        path.unlink()
    with pytest.raises(UserError, match="no job that can be compared.*evaluation.every"):
        compared(sweep)


def test_a_baseline_that_cannot_be_read_says_which_could(sweep: Path) -> None:
    for path in sweep.glob("*insertion*/validation.jsonl"):
        path.write_text('{"step": 10, "hits": {"synthetic_newest": "01x"}}\n')
    with pytest.raises(UserError, match="'insertion' cannot be compared.*01x.*--baseline.*'casa'"):
        compared(sweep)


def test_seconds_of_several_machines_are_told(sweep: Path) -> None:
    for number, path in enumerate(sorted(sweep.iterdir())):
        log = StartLog(path / "starts.jsonl", {"device": "cpu" if number else "H100"})
        log.begin(Progress(step=0))
        log.close(None)
    found = said(compared(sweep, "seconds"), "different machines", "which are matched, do not")
    assert "H100: s,fusion=casa,seed=0" in found
    assert "speeds and times" in said(compared(sweep), "different machines")


# ----------------------------------------------------------------------------------------- chance


def evaluated(sweep: Path, guess: float | None, blind: float, name: str = "newest") -> None:
    for path in sweep.iterdir():
        families = {f"synthetic_{name}": {"guess": guess, "blind": blind, "exact_match": 0.5}}
        (path / "evaluation.json").write_text(json.dumps({"families": families}))


def test_nothing_is_compared_where_nobody_is_above_chance(sweep: Path) -> None:
    evaluated(sweep, 0.97, 0.2)
    result = compared(sweep)
    assert result.chance == {"newest": 0.97} and result.unlearned == ["newest"]
    assert ("casa", "newest") not in result.differences and len(result.differences) == 6
    assert "Nobody learned newest" in "".join(map(str, verdict(result)))
    for name in ("earlier_2", "earlier_10"):
        for path in sweep.iterdir():
            families = json.loads((path / "evaluation.json").read_text())["families"]
            families[f"synthetic_{name}"] = {"guess": 0.99}
            (path / "evaluation.json").write_text(json.dumps({"families": families}))
    nothing = compared(sweep)
    assert "Nothing is compared" in what_a_claim_is(nothing)
    assert not nothing.differences  # the mean of nothing that was learned is not, either
    evaluated(sweep, None, 0.2)
    result = compared(sweep)
    assert result.chance == {"newest": 0.2} and not result.unlearned
    assert ("casa", "newest") in result.differences


def test_questions_about_text_have_no_chance(sweep: Path) -> None:
    """Without an image they are answered as well; the guess may even know their answers."""
    for path in sweep.glob("*/validation.jsonl"):
        path.write_text(path.read_text().replace("synthetic_newest", "synthetic_text_between"))
    evaluated(sweep, 1.0, 0.9, "text_between")
    result = compared(sweep)
    assert not result.chance and ("casa", "text_between") in result.differences
