"""The statistics of a comparison: intervals over seeds, a paired test over questions, and what of
both carries a claim.

Two things vary: the questions, of which a held-out set is a sample, and the seeds, of which a sweep
trains a few. The test asks whether a difference could come of these questions alone, the interval
over seeds whether it could come of these seeds alone. A difference is claimed where neither could.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

Array = np.ndarray[Any, np.dtype[np.float64]]
Integers = np.ndarray[Any, np.dtype[np.int64]]

LEVEL = 0.95  # of intervals
ALPHA = 0.05  # of a corrected test
FINEST = 16  # whole-number weights of questions: that of the largest group's, at least


@dataclass(frozen=True)
class Interval:
    """A mean over seeds with its interval at `LEVEL` by Student's t.

    :param low: NaN of a single seed, as `high` is.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def half(self) -> float:
        """What stands behind ±."""
        return (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def interval(values: Sequence[float]) -> Interval:
    """The mean of one value a seed, and its interval.

    :raises ValueError: no value.
    """
    if not len(values):
        raise ValueError("an interval of no value")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, math.nan, math.nan, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * error
    return Interval(mean, mean - half, mean + half, len(values))


def sign_flip(differences: Integers) -> float:
    """The two-sided p-value of a paired permutation test, which flips the sign of every question's
    difference: exact, without drawing permutations.

    Of each size of a difference the number of positive ones is binomial, so that the distribution
    of the sum is a convolution of as many binomials as there are sizes. With one seed the test is
    McNemar's exact one.

    :param differences: (Q,) int64, of each question the sum over seeds, times the question's weight
        where weights differ.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    sums = np.ones(1)  # of -total, -total + 2, ...: probabilities so far
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        wider = np.zeros(len(sums) + count * size)
        for positive, share in enumerate(stats.binom.pmf(np.arange(count + 1), count, 0.5)):
            wider[positive * size : positive * size + len(sums)] += share * sums
        sums = wider
    total = len(sums) - 1
    reached = np.abs(2 * np.arange(len(sums)) - total) >= abs(int(differences.sum()))
    return min(1.0, float(sums[reached].sum()))


def weights_of(questions: Sequence[int]) -> list[int]:
    """Whole-number weights under which groups of so many questions count about alike; 1 each where
    they are of one size.
    """
    if len(set(questions)) == 1:
        return [1] * len(questions)
    return [round(FINEST * max(questions) / count) for count in questions]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all of them together."""
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(p_values), 0, -1) * np.array(p_values, dtype=np.float64)[order]
    corrected = np.empty(len(p_values))
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(p_values) else steps
    return [float(p) for p in corrected]


@dataclass(frozen=True)
class Difference:
    """A variant less the baseline, in one ability or in the mean of all.

    :param over_seeds: of the difference of each seed that both have.
    :param p: of the test over questions; :param corrected: by Holm, over all of the page.
    """

    over_seeds: Interval
    questions: int
    p: float
    corrected: float = math.nan

    @property
    def shown(self) -> bool:
        """Whether the questions carry it."""
        return self.corrected < ALPHA

    @property
    def claimed(self) -> bool:
        """Whether questions and seeds carry it, and in the same direction."""
        return self.shown and self.over_seeds.excludes_zero

    @property
    def verdict(self) -> str:
        """better, worse, or what is to be said instead."""
        better = "better" if self.over_seeds.mean > 0 else "worse"
        if self.claimed:
            return better
        if self.shown and self.over_seeds.seeds == 1:
            return f"{better} on these questions, by one seed"
        return "no difference shown"


def paired(first: Sequence[Sequence[Integers]], second: Sequence[Sequence[Integers]]) -> Difference:
    """Compares the answers of two variants to the same questions.

    :param first: by ability, of each seed (Q,) 1 for a right answer and 0 for a wrong one;
        :param second: the baseline's, of the same seeds in the same order.
    :raises ValueError: abilities, seeds or questions that do not pair.
    """
    groups = [
        np.stack(a).astype(np.int64) - np.stack(b) for a, b in zip(first, second, strict=True)
    ]
    if len({len(group) for group in groups}) != 1 or any(g.shape[1] == 0 for g in groups):
        raise ValueError("abilities of different seeds, or without a question")
    weights = weights_of([group.shape[1] for group in groups])
    by_seed = np.mean([group.mean(axis=1) for group in groups], axis=0)
    flips = [w * group.sum(axis=0) for w, group in zip(weights, groups, strict=True)]
    questions = sum(group.shape[1] for group in groups)
    return Difference(interval(by_seed.tolist()), questions, sign_flip(np.concatenate(flips)))


def above_chance(shares: Sequence[float], questions: int, chance: float) -> bool:
    """Whether a variant's mean lies above what guessing reaches in 39 of 40 tries.

    :param shares: of right answers, one a seed; :param questions: of each.
    """
    most = float(stats.binom.ppf((1 + LEVEL) / 2, questions, chance)) / questions
    return float(np.mean(shares)) > most
