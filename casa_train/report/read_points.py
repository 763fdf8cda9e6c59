"""At which validation each job of a comparison is read: where training had cost all the same."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence

from casa_train.io.numbers import duration, short, with_unit
from casa_train.report.variants import Reading, Variant
from casa_train.setup.equal_parameters import TOLERANCE, agrees

MATCHES = ("params", "tokens", "flops", "seconds")
TITLES = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "training seconds"}


def written(amount: str, value: float) -> str:
    """An amount of `AMOUNTS` for people."""
    if not math.isfinite(value):
        return "unknown"
    if amount == "flops":
        return with_unit(value, "FLOP")
    return duration(value) if amount == "seconds" else f"{short(value, 4)} tokens"


def match_amount(
    variants: Sequence[Variant], amount: str, say: Callable[[str], None]
) -> float | None:
    """Chooses of every trial the last validation not beyond what all trials reached of an amount;
    returns that limit, None where no trial can be read.

    Trials that cannot be read there are left out: `chosen` stays None.
    """
    trials = [trial for variant in variants for trial in variant.trials]
    known = [trial for trial in trials if math.isfinite(trial.readings[-1].amounts[amount])]
    for trial in trials:
        if trial not in known:
            say(
                f"{trial.name} is left out: its metrics.jsonl does not say the {TITLES[amount]} of "
                "every step up to its last validation (lines are missing, or an earlier version "
                "wrote them)."
            )
    if not known:
        return None
    limit = min(trial.readings[-1].amounts[amount] for trial in known)
    for trial in known:
        trial.chosen = last_within(trial.readings, amount, limit)
        if trial.chosen is None:
            say(
                f"{trial.name} is left out: its first validation came after "
                f"{written(amount, trial.readings[0].amounts[amount])}, beyond the "
                f"{written(amount, limit)} that every job reached (evaluation.every)."
            )
    return limit


def last_within(readings: Sequence[Reading], amount: str, limit: float) -> Reading | None:
    """The last validation before more than `limit` was spent, by more than `TOLERANCE`: packs of
    other seeds are not as full to the last token.
    """
    within = [r for r in readings if r.amounts[amount] <= limit * (1 + TOLERANCE)]
    return within[-1] if within else None


def match_parameters(
    variants: Sequence[Variant], baseline: Variant, say: Callable[[str], None]
) -> int | None:
    """Chooses the last validation of the trials whose variants add as many parameters, within
    `TOLERANCE`; returns how many that is, None where nothing can be told.

    A baseline that adds none, as token insertion, stands beside them whatever they add.
    """
    counts = {v.label: v.new_parameters for v in variants if v.new_parameters is not None}
    reference = reference_parameters(counts, counts.get(baseline.label, 0))
    agreeing = []
    for variant in variants:
        own = counts.get(variant.label)
        if own is None:
            say(f"{variant.label} is left out: its parameters could not be counted.")
        elif agrees(own, reference) or (variant is baseline and own == 0):
            agreeing.append(variant)
        else:
            less = 100 * (own / reference - 1) if reference else math.inf
            say(
                f"{variant.label} is not in the matched tables: it adds {own:,} parameters, "
                f"{less:+.1f} % of the {reference:,} that are matched "
                f"(expected within {100 * TOLERANCE:g} %)."
            )
    _choose_last(agreeing, baseline, say)
    return reference if agreeing else None


def reference_parameters(counts: dict[str, int], baseline: int) -> int:
    """What the baseline adds; where that is nothing, what the most variants agree with."""
    if baseline or not any(counts.values()):
        return baseline
    return max(
        (own for own in counts.values() if own),
        key=lambda own: (sum(agrees(other, own) for other in counts.values()), own),
    )


def _choose_last(
    variants: Sequence[Variant], baseline: Variant, say: Callable[[str], None]
) -> None:
    """The last validation of each trial that came as far as most of the baseline's."""
    ends = Counter(trial.readings[-1].step for trial in baseline.trials)
    usual = max(ends, key=lambda step: (ends[step], step))
    for trial in [trial for variant in variants for trial in variant.trials]:
        last = trial.readings[-1]
        if last.step == usual:
            trial.chosen = last
        else:
            say(
                f"{trial.name} is left out: its last validation was at step {last.step:,}, the "
                f"baseline's at step {usual:,}. --match tokens, flops or seconds compares runs of "
                "different lengths."
            )
