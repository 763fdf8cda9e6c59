"""A sweep's comparison: which jobs count, where each is read, and what their differences carry.

Whatever keeps a job from being compared is said, never averaged away.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from casa_train.errors import UserError
from casa_train.io.numbers import count
from casa_train.report.compared_jobs import (
    find_baseline,
    same_questions,
    say_what_differs,
    say_what_is_early,
    say_who_stands_apart,
    with_validations,
)
from casa_train.report.jobs import BROKEN
from casa_train.report.made_by import environments, made_by, say_whose_code_differs
from casa_train.report.read_points import match_amount, match_parameters
from casa_train.report.significance import (
    Difference,
    Integers,
    Interval,
    above_chance,
    holm,
    interval,
    paired,
)
from casa_train.report.sweep_page import Job
from casa_train.report.training_costs import count_new_parameters
from casa_train.report.variants import (
    MEAN,
    Reading,
    Trial,
    Variant,
    abilities_of,
    group,
    text_only,
)
from casa_train.run.layout import EVALUATION_FILE


@dataclass
class Comparison:
    """What the page shows.

    :param match: params, tokens, flops or seconds; :param limit: of that amount, or the number of
        new parameters.
    :param variants: those with a job that is read; :param apart: those that are only told.
    :param sources: by ability, its source.
    :param common: by ability, the places of the questions that every job could read.
    :param cells: by (variant, ability), over seeds; MEAN is an ability, too, if there are several.
    :param chance: by ability, where an evaluation of the jobs says it.
    :param blind: abilities whose chance is that of jobs which see another image; of the others it
        is the best guess without one.
    :param unlearned: abilities in which no variant is above chance.
    :param differences: by (variant, ability), from the baseline.
    :param problems: what a reader must know, a line each.
    :param jobs: of the sweep, also those of which nothing can be read.
    :param made_by: code, packages, machine and the like, as names and values.
    """

    name: str
    match: str
    limit: float
    baseline: Variant
    variants: list[Variant]
    apart: list[Variant]
    sources: dict[str, str]
    common: dict[str, Integers] = field(default_factory=dict)
    cells: dict[tuple[str, str], Interval] = field(default_factory=dict)
    chance: dict[str, float] = field(default_factory=dict)
    blind: list[str] = field(default_factory=list)
    unlearned: list[str] = field(default_factory=list)
    differences: dict[tuple[str, str], Difference] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    jobs: Sequence[Job] = ()
    made_by: Sequence[tuple[str, str]] = ()

    @property
    def abilities(self) -> list[str]:
        return list(self.sources)

    @property
    def columns(self) -> list[str]:
        """Abilities of the tables, their mean first if there are several."""
        return [MEAN, *self.sources] if len(self.sources) > 1 else list(self.sources)

    @property
    def chosen(self) -> list[tuple[Trial, Reading]]:
        """The trials of the tables, and where each is read."""
        trials = (trial for variant in self.variants for trial in variant.trials)
        return [(trial, trial.chosen) for trial in trials if trial.chosen is not None]

    def questions(self, ability: str) -> int:
        """As many as every job could read."""
        return len(self.common[ability])

    def answers(self, reading: Reading, ability: str) -> Integers:
        """To the questions that every job could read where it is read."""
        return reading.hits[self.sources[ability]][self.common[ability]]

    def share(self, reading: Reading, ability: str) -> float:
        """Of right answers; the mean of all abilities for MEAN. NaN where none was read."""
        if ability == MEAN:
            return float(np.mean([self.share(reading, name) for name in self.sources]))
        answers = self.answers(reading, ability)
        answers = answers[answers >= 0]
        return float(answers.mean()) if len(answers) else math.nan

    def stands(self, variant: Variant) -> float:
        """Where a variant is read, as a share of the matched amount: the mean over its seeds."""
        if self.match == "params":
            return 1.0
        found = [t.chosen.amounts[self.match] for t in variant.trials if t.chosen is not None]
        return float(np.mean(found)) / self.limit

    def shares(self, variant: Variant, ability: str) -> list[float]:
        """One a seed."""
        return [self.share(t.chosen, ability) for t in variant.trials if t.chosen is not None]


def compare(
    jobs: Sequence[Job], sweep: Path, match: str, baseline: str | None = None
) -> Comparison:
    """Compares the jobs of a sweep.

    :param match: one of `MATCHES`.
    :param baseline: a variant's label; None: insertion if there is one, else the first.
    :raises UserError: no variant of that name, or nothing that can be compared.
    """
    problems: list[str] = []
    say = problems.append
    everything = group(jobs, say)
    reference = find_baseline(everything, baseline)
    variants = with_validations(everything, sweep, say)
    _refuse_nothing(variants, reference, sweep, problems)
    variants = same_questions(variants, reference, say)
    count_new_parameters(variants, sweep, say)
    if match == "params":
        limit: float | None = match_parameters(variants, reference, say)
    else:
        limit = match_amount(variants, match, say)
    read: list[Variant] = []
    apart: list[Variant] = []
    for variant in variants:
        chosen = [trial for trial in variant.trials if trial.chosen is not None]
        (read if chosen else apart).append(variant)
        variant.trials = chosen or variant.trials
    _refuse_nothing(read, reference, sweep, problems)
    assert limit is not None
    say_what_differs(read, match, sweep, say)
    recorded = environments((trial for variant in read for trial in variant.trials), sweep)
    say_whose_code_differs(recorded, say)
    say_what_is_early(read, say)
    if match != "params":
        say_who_stands_apart(read, match, limit, say)
    read.sort(key=lambda variant: variant is not reference)  # the others keep their order
    first = next(r for v in read for t in v.trials if (r := t.chosen) is not None)
    sources = abilities_of(list(first.hits))
    names = {job.config.name for job in jobs if job.config is not None}
    name = names.pop() if len(names) == 1 else sweep.name
    result = Comparison(name, match, limit, reference, read, apart, sources)
    result.problems, result.jobs = problems, jobs
    result.made_by = made_by([trial for trial, _ in result.chosen], recorded, sweep)
    result.chance, result.blind = read_chance(result, sweep)
    fill(result)
    return result


def fill(result: Comparison) -> None:
    """The statistics of jobs that are read: cells, what nobody learned, differences.

    :raises UserError: no question that every job could read.
    """
    _find_common(result)
    for variant in result.variants:
        for ability in result.columns:
            result.cells[variant.label, ability] = interval(result.shares(variant, ability))
    result.unlearned = _unlearned(result)
    _fill_differences(result)


def _refuse_nothing(
    variants: Sequence[Variant], baseline: Variant, sweep: Path, problems: Sequence[str]
) -> None:
    """:raises UserError: nothing, or no baseline, is left to compare."""
    reasons = " ".join(problems)
    if not variants:
        raise UserError(f"{sweep} holds no job that can be compared. {reasons}".strip())
    if baseline not in variants:
        others = ", ".join(repr(variant.label) for variant in variants)
        raise UserError(
            f"the baseline {baseline.label!r} cannot be compared. {reasons} "
            f"Choose another: --baseline with one of {others}."
        )


def _find_common(result: Comparison) -> None:
    """Sets the questions that every job could read; abilities without one are left out."""
    for ability, source in list(result.sources.items()):
        unread = {trial.name: reading.hits[source] < 0 for trial, reading in result.chosen}
        common = np.flatnonzero(~np.any(list(unread.values()), axis=0))
        if any(missing.any() for missing in unread.values()):
            said = ", ".join(f"{name} {n.sum()}" for name, n in unread.items() if n.any())
            result.problems.append(
                f"{ability}: answers that could not be read are no part of the comparison, which "
                f"leaves {count(len(common), 'question')} ({said})."
            )
        result.common[ability] = common
        if not len(common):
            del result.sources[ability]
    if not result.sources:
        raise UserError(f"nothing can be compared. {' '.join(result.problems)}")


def read_chance(result: Comparison, sweep: Path) -> tuple[dict[str, float], list[str]]:
    """By ability what is reached without the right image, by evaluations of the jobs: the higher of
    what the best answer without an image would reach, and of the mean of the jobs that were asked
    with another sample's image. The former may know less than the jobs: it answers nothing where
    each question is worded anew.

    Questions about text alone have none: who needs no image may know all of their answers.

    :return: beside them the abilities whose chance is such a mean.
    """
    guesses: dict[str, list[float]] = {}
    blind: dict[str, list[float]] = {}
    for trial in [trial for variant in result.variants for trial in variant.trials]:
        try:
            families = json.loads((sweep / trial.name / EVALUATION_FILE).read_text())["families"]
            for ability, source in result.sources.items():
                found = {} if text_only(ability) else families.get(source) or {}
                for name, shares in (("guess", guesses), ("blind", blind)):
                    if found.get(name) is not None:
                        shares.setdefault(ability, []).append(float(found[name]))
        except BROKEN:
            continue  # not evaluated: the page does without
    means = {name: float(np.mean(shares)) for name, shares in blind.items()}
    best = {name: max(shares) for name, shares in guesses.items()}
    chance = {name: max(means.get(name, 0.0), best.get(name, 0.0)) for name in means | best}
    return chance, [n for n in result.sources if n in chance and chance[n] != best.get(n)]


def _unlearned(result: Comparison) -> list[str]:
    """Abilities of a known chance in which no variant is above it."""
    return [
        ability
        for ability, chance in result.chance.items()
        if ability in result.sources
        and not any(
            above_chance(result.shares(variant, ability), result.questions(ability), chance)
            for variant in result.variants
        )
    ]


def reading(variant: Variant, seed: int) -> Reading:
    """Where the job of a seed is read."""
    chosen = variant.of(seed).chosen
    assert chosen is not None
    return chosen


def _fill_differences(result: Comparison) -> None:
    """All comparisons of the page, corrected together."""
    base = result.baseline
    found: dict[tuple[str, str], Difference] = {}
    for variant in result.variants:
        seeds = [seed for seed in variant.seeds if seed in base.seeds]
        if variant is base or not seeds:
            if variant is not base:
                result.problems.append(
                    f"{variant.label} and the baseline have no seed in common: not compared."
                )
            continue
        for ability in result.columns:
            if ability in result.unlearned or set(result.abilities) <= set(result.unlearned):
                continue
            names = result.abilities if ability == MEAN else [ability]
            sides = [
                [[result.answers(reading(side, seed), name) for seed in seeds] for name in names]
                for side in (variant, base)
            ]
            found[variant.label, ability] = paired(*sides)
    corrected = holm([difference.p for difference in found.values()])
    for (key, difference), p in zip(found.items(), corrected, strict=True):
        result.differences[key] = replace(difference, corrected=p)
