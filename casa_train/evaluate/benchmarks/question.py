"""A question of a benchmark, whichever benchmark it is of."""

from __future__ import annotations

from dataclasses import dataclass

from casa_train.config.schema import BENCHMARKS

__all__ = ["BENCHMARKS", "BenchmarkQuestion"]


@dataclass(frozen=True)
class BenchmarkQuestion:
    """A question with its answers, as published; its picture is kept apart.

    :param id: unique in its benchmark.
    :param text: the question, nothing added.
    :param references: the answers that count as right, at least one; of a question with `options`
        the index of the right one, counted from 0.
    :param options: what may be chosen, in order; empty where the answer is free.
    :param category: the part of the benchmark it belongs to: ChartQA's `type` (human_test or
        augmented_test), OCRBench's `question_type`, MME's `category`.
    :param dataset: OCRBench's `dataset`: where the picture comes from; spaces do not count in
        HME100k's formulas.
    :param pair: MME's `question_id`: two questions about a picture share it and count together.
    """

    id: str
    text: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()
    category: str = ""
    dataset: str = ""
    pair: str = ""
