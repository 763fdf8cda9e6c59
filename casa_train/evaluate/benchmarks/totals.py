"""The figures of a benchmark from the scores of its questions: the published one, then its parts.

Each total takes the questions and their scores, 0 to 1, in one order, of the whole benchmark or of
a part of it. `score` is the published figure. Shares are percentages.

:raises ValueError: there is nothing to count: no question, or in MME no whole pair.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from casa_train.evaluate.benchmarks.question import BenchmarkQuestion
from casa_train.evaluate.benchmarks.sources import MME_PERCEPTION

Questions = Sequence[BenchmarkQuestion]

CHARTQA_SPLITS = {"human_test": "human", "augmented_test": "augmented"}


def percentage(questions: Questions, scores: Sequence[float]) -> dict[str, float]:
    """The mean score in percent."""
    return {"score": 100 * _mean(scores)}


def chartqa(questions: Questions, scores: Sequence[float]) -> dict[str, float]:
    """`score`, and of the questions that people and a model wrote: `human`, `augmented`."""
    parts = _by_category(questions, scores)
    return percentage(questions, scores) | {
        name: 100 * _mean(parts[split]) for split, name in CHARTQA_SPLITS.items() if split in parts
    }


def ocrbench(questions: Questions, scores: Sequence[float]) -> dict[str, float]:
    """`score` of 1,000, which is how many questions the whole benchmark has, and the percentage of
    each type.
    """
    parts = _by_category(questions, scores)
    return {"score": 1000 * _mean(scores)} | {
        kind: 100 * _mean(parts[kind]) for kind in sorted(parts)
    }


def mme(questions: Questions, scores: Sequence[float]) -> dict[str, float]:
    """`score` = `perception` + `cognition`, each the sum of its categories, which stand behind.

    A category has 200 points: the percentage of right questions and that of pictures whose two
    questions are right. A question whose partner is not among `questions` does not count.
    """
    pairs: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question, score in zip(questions, scores, strict=True):
        pairs[question.category, question.pair].append(score)
    points: dict[str, list[float]] = defaultdict(list)
    for (category, _), pair in sorted(pairs.items()):
        if len(pair) == 2:
            points[category].append(50 * sum(pair) + 100 * (sum(pair) == 2))
    if not points:
        raise ValueError("MME counts pairs of questions, and none is whole")
    categories = {category: _mean(points[category]) for category in points}
    parts = {"perception": 0.0, "cognition": 0.0}
    for category, value in categories.items():
        parts["perception" if category in MME_PERCEPTION else "cognition"] += value
    return {"score": sum(parts.values())} | parts | categories


def _by_category(questions: Questions, scores: Sequence[float]) -> dict[str, list[float]]:
    parts: dict[str, list[float]] = defaultdict(list)
    for question, score in zip(questions, scores, strict=True):
        parts[question.category].append(score)
    return parts


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise ValueError("no question was scored")
    return sum(scores) / len(scores)
