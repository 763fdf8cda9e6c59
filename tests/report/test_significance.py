"""The statistics of comparisons, beside independent computations, and what they claim in the long
run.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from casa_train.report.significance import (
    Difference,
    Interval,
    above_chance,
    holm,
    interval,
    paired,
    sign_flip,
    weights_of,
)

SHARES = st.lists(st.floats(0.01, 0.99), min_size=2, max_size=6)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=6)


# ------------------------------------------------------------------------------------- one number


@given(SHARES)
def test_an_interval_excludes_what_a_t_test_rejects(values: list[float]) -> None:
    found = interval(values)
    assert found.mean == pytest.approx(np.mean(values))
    if np.std(values) < 1e-9:
        assert found.half == pytest.approx(0, abs=1e-6)
        return
    for shift in (0.0, 0.3, 0.7):
        test = stats.ttest_1samp(np.array(values) - shift, 0)
        low, high = test.confidence_interval(0.95)
        moved = interval([value - shift for value in values])
        assert (moved.low, moved.high) == pytest.approx((low, high))
        if abs(test.pvalue - 0.05) > 1e-9:
            assert moved.excludes_zero == (test.pvalue < 0.05)


def test_one_seed_has_no_interval() -> None:
    found = interval([0.25])
    assert (found.mean, found.seeds) == (0.25, 1)
    assert math.isnan(found.low) and math.isnan(found.half) and not found.excludes_zero
    with pytest.raises(ValueError, match="no value"):
        interval([])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=11))
def test_flipping_signs_equals_all_permutations_of_scipy(differences: list[int]) -> None:
    theirs = stats.permutation_test(
        (np.array(differences, dtype=np.float64),),
        lambda x, axis: x.sum(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip(np.array(differences)) == pytest.approx(theirs.pvalue)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_of_one_seed_it_is_the_exact_test_of_mcnemar(better: int, worse: int, same: int) -> None:
    differences = np.array([1] * better + [-1] * worse + [0] * same, dtype=np.int64)
    theirs = stats.binomtest(better, better + worse).pvalue if better + worse else 1.0
    assert sign_flip(differences) == pytest.approx(theirs)
    assert sign_flip(-differences) == sign_flip(differences)


def test_many_weighted_questions_as_drawn_signs_have_it() -> None:
    draw = np.random.default_rng(5)
    differences = draw.integers(-3, 4, size=400) * draw.choice([16, 24, 7], size=400)
    differences[:30] = np.abs(differences[:30])
    signs = draw.choice([-1, 1], size=(20_000, 400))
    drawn = np.mean(np.abs(signs @ differences) >= abs(differences.sum()))
    assert sign_flip(differences) == pytest.approx(drawn, abs=0.015)


@given(P_VALUES)
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """Of each, the most that any family with it in gives; families are tested by Bonferroni."""
    members = range(len(p_values))
    families = [f for n in members for f in itertools.combinations(members, n + 1)]
    expected = [
        max(min(1.0, len(f) * min(p_values[j] for j in f)) for f in families if i in f)
        for i in members
    ]
    assert holm(p_values) == pytest.approx(expected)


def test_nothing_to_correct() -> None:
    assert holm([]) == []


@given(st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_abilities_count_about_alike_whatever_their_size(questions: list[int]) -> None:
    weights = weights_of(questions)
    shares = [w * q for w, q in zip(weights, questions, strict=True)]
    assert max(shares) <= 1.07 * min(shares)
    assert weights_of([77, 77]) == [1, 1]


def test_above_chance_is_what_guessing_seldom_reaches() -> None:
    # Of 100 coins 60 or fewer are heads in 98.2 %, 59 or fewer in 97.2 % of all tries.
    assert stats.binom.cdf(60, 100, 0.5) > 0.975 > stats.binom.cdf(59, 100, 0.5)
    assert not above_chance([0.58, 0.62], 100, 0.5)
    assert above_chance([0.60, 0.61], 100, 0.5)


# -------------------------------------------------------------------------------------- a verdict


def verdict(mean: float, low: float, high: float, corrected: float, seeds: int = 3) -> str:
    return Difference(Interval(mean, low, high, seeds), 50, corrected / 4, corrected).verdict


def test_a_difference_is_claimed_only_if_questions_and_seeds_carry_it() -> None:
    assert verdict(0.1, 0.02, 0.18, 0.01) == "better"
    assert verdict(-0.1, -0.18, -0.02, 0.01) == "worse"
    assert verdict(0.1, 0.02, 0.18, 0.06) == "no difference shown"
    assert verdict(0.1, -0.02, 0.22, 0.01) == "no difference shown"
    alone = (math.nan, math.nan)
    assert verdict(0.1, *alone, 0.01, seeds=1) == "better on these questions, by one seed"
    assert verdict(-0.1, *alone, 0.2, seeds=1) == "no difference shown"


def test_answers_are_paired_by_question_seed_and_ability() -> None:
    draw = np.random.default_rng(2)
    first = [draw.integers(0, 2, size=(3, n)) for n in (20, 30)]
    second = [draw.integers(0, 2, size=(3, n)) for n in (20, 30)]
    found = paired(first, second)
    by_seed = [
        np.mean([a[seed].mean() - b[seed].mean() for a, b in zip(first, second, strict=True)])
        for seed in range(3)
    ]
    expected = interval(by_seed)
    over = found.over_seeds
    assert (over.mean, over.low, over.high) == pytest.approx(
        (expected.mean, expected.low, expected.high)
    )
    assert found.questions == 50
    with pytest.raises(ValueError, match="seeds"):
        paired([first[0], first[1][:2]], [second[0], second[1][:2]])


# ----------------------------------------------------------------------------------- the long run


def simulated(
    draw: np.random.Generator, effect: float, seed_spread: float, variants: int = 5
) -> list[Difference]:
    """The comparisons of a made-up sweep of three seeds with a baseline: questions of their own
    hardness, seeds whose skills differ by chance, and a skill of each variant that is `effect`
    above the baseline's.
    """
    abilities, seeds, questions = 4, 3, 60
    hardness = draw.standard_normal((abilities, 1, questions))

    def answers(skill: float) -> list[np.ndarray]:
        skills = skill + seed_spread * draw.standard_normal((abilities, seeds, 1))
        noise = draw.standard_normal((abilities, seeds, questions))
        return list((skills + noise > hardness).astype(np.int64))

    base = answers(0.0)
    found = [
        paired([own[i]], [base[i]])
        for own in (answers(effect) for _ in range(variants - 1))
        for i in range(abilities)
    ]
    corrected = holm([difference.p for difference in found])
    return [
        Difference(d.over_seeds, d.questions, d.p, p) for d, p in zip(found, corrected, strict=True)
    ]


@pytest.mark.parametrize("seed_spread", [0.0, 0.2, 1.5])
def test_equals_are_seldom_claimed_to_differ(seed_spread: float) -> None:
    """Where questions alone vary, in less than a twentieth of the sweeps; where seeds do, too, as
    seldom of all comparisons.
    """
    draw = np.random.default_rng(11)
    sweeps = [simulated(draw, 0.0, seed_spread) for _ in range(100)]
    claims = np.array([[difference.claimed for difference in sweep] for sweep in sweeps])
    assert claims.mean() <= 0.05
    if seed_spread == 0:
        assert claims.any(axis=1).mean() <= 0.05
    else:
        shown = np.mean([[difference.shown for difference in sweep] for sweep in sweeps])
        assert claims.mean() < shown or not shown  # the test over questions knows nothing of seeds


def test_seeds_that_differ_much_would_fool_the_test_over_questions() -> None:
    """Why it takes both."""
    draw = np.random.default_rng(12)
    shown = [d.shown for _ in range(40) for d in simulated(draw, 0.0, 1.5)]
    assert np.mean(shown) > 0.2


def test_large_differences_are_found() -> None:
    draw = np.random.default_rng(13)
    found = [difference for _ in range(40) for difference in simulated(draw, 1.2, 0.1)]
    assert np.mean([difference.verdict == "better" for difference in found]) > 0.7
    assert not any(difference.verdict == "worse" for difference in found)
