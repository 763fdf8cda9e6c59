"""What a comparison shows, in words: only what questions and seeds carry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from casa_train.io.numbers import MISSING, count
from casa_train.report.compared_jobs import APART
from casa_train.report.comparison import Comparison
from casa_train.report.read_points import TITLES as AMOUNT_NAMES
from casa_train.report.read_points import written
from casa_train.report.significance import ALPHA, LEVEL, Difference, Interval
from casa_train.report.variants import MEAN, Variant
from casa_train.setup.equal_parameters import TOLERANCE

NONE = "no difference shown"
RISING = 0.02  # of right answers, between two validations: what is said to rise still


def points(share: float) -> str:
    """A difference of shares: 0.0412 as +4.1."""
    return f"{100 * share:+.1f}".replace("-", "−")


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def mean_and_half(cell: Interval) -> str:
    """93.4 ± 2.1; without an interval of one seed."""
    mean = f"{100 * cell.mean:.1f}"
    return mean if cell.seeds == 1 else f"{mean} ± {100 * cell.half:.1f}"


def span(found: Interval) -> str:
    """+1.2 to +5.6, or that there is none."""
    if found.seeds == 1:
        return MISSING
    return f"{points(found.low)} to {points(found.high)}"


def how_matched(result: Comparison) -> str:
    """At what the jobs are read, in a sentence."""
    if result.match == "params":
        return (
            f"Every job is read at its last validation; variants add {result.limit:,.0f} "
            "parameters to the insertion model of their configuration, within "
            f"{100 * TOLERANCE:g} %."
            + (
                f" The baseline {result.baseline.label} adds none: against it they have that many "
                "more."
                if result.limit and not result.baseline.new_parameters
                else ""
            )
        )
    stands = [reading.amounts[result.match] / result.limit for _, reading in result.chosen]
    said = written(result.match, result.limit)
    return (
        f"Every job is read at its last validation up to {said} of training, the most that every "
        f"job reached ({100 * TOLERANCE:g} % more is let pass); the jobs stand at "
        f"{100 * min(stands):.1f} to {100 * max(stands):.1f} % of that."
        + {
            "tokens": " Tokens are the text tokens of the samples and the image tokens of the "
            "vision tower: data that was seen, the same for every mechanism, whether or not its "
            "image tokens enter the stream.",
            "flops": " FLOPs are those of the steps, forward and backward, the vision tower's "
            "among them.",
            "seconds": " Seconds are those of the steps alone, on the machine as it was: a job "
            "beside which others ran took longer.",
        }[result.match]
    )


@dataclass(frozen=True)
class Finding:
    """A sentence of the verdict.

    :param about: the variant that it is about, or the variants, or None.
    """

    about: str | None
    said: str

    def __str__(self) -> str:
        return self.said if self.about is None else f"{self.about}: {self.said}"


def verdict(result: Comparison) -> list[Finding]:
    """The findings, of the best variant first, and of each first what holds over all abilities."""
    base = result.baseline.label
    others = [variant for variant in result.variants if variant is not result.baseline]
    others.sort(key=lambda v: -result.cells[v.label, result.columns[0]].mean)
    found = {variant.label: _of_variant(result, variant) for variant in others}
    lines = [Finding(label, said) for label, said in found.items() if said is not None]
    silent = [v.label for v in others if found[v.label] is None and _compared(result, v)]
    if silent:
        lines.append(Finding("; ".join(silent), f"no difference to {base} shown in any ability."))
    if result.unlearned:
        lines.append(
            Finding(
                None,
                f"Nobody learned {', '.join(result.unlearned)}: no variant is above what guessing "
                "reaches. There nothing is compared.",
            )
        )
    if not others:
        said = f"{base} alone can be read: there is nothing to compare it with."
        lines.append(Finding(None, said))
    return lines


def what_a_claim_is(result: Comparison) -> str:
    """What stands behind the words, and how far they go."""
    total = len(result.differences)
    claimed = sum(difference.claimed for difference in result.differences.values())
    if not total:
        return "Nothing is compared, so nothing is claimed."
    said = (
        "A difference is claimed only if a paired test over the questions (exact sign flips, by "
        f"question over all seeds) is below {ALPHA:g} after Holm's correction for "
        f"the {count(total, 'comparison')} of this page, and the {100 * LEVEL:g} % interval of the "
        "difference over seeds excludes 0."
    )
    if claimed:
        chance = (1 - LEVEL) * total
        said += f" {claimed} of {total} are."
        if chance >= 1:
            said += (
                " The interval is of each by itself: if seeds alone made all the differences, "
                f"about {chance:.0f} of {total} would exclude 0."
            )
    if any(d.over_seeds.seeds == 1 for d in result.differences.values()):
        said += " Of one seed there is no interval: nothing is claimed beyond these questions."
    return said + (
        " Variants are compared with the baseline alone, not with each other: their order, by the "
        "mean of all abilities, each ability counting once, claims nothing. Where no difference is "
        "shown there may be one that so many questions and seeds cannot show."
    )


def _compared(result: Comparison, variant: Variant) -> bool:
    return any(label == variant.label for label, _ in result.differences)


def _of_variant(result: Comparison, variant: Variant) -> str | None:
    """What is better and what is worse of one variant; None where nothing is shown."""
    own = {a: d for (label, a), d in result.differences.items() if label == variant.label}
    claimed = {a: d for a, d in own.items() if d.claimed}
    weaker = {a: d for a, d in own.items() if d.shown and d.over_seeds.seeds == 1}
    chosen = claimed or weaker
    if not chosen:
        return None
    parts = []
    if MEAN in chosen:
        parts.append(
            f"{_direction(chosen[MEAN])} in the mean of all abilities ({_said(chosen[MEAN])})"
        )
    for word in ("better", "worse"):
        found = [
            f"{ability} ({points(difference.over_seeds.mean)})"
            for ability, difference in _largest_first(chosen)
            if ability != MEAN and _direction(difference) == word
        ]
        if found:
            parts.append(f"{word} at {', '.join(found)}")
    rest = [ability for ability in own if ability not in chosen and ability != MEAN]
    if rest:
        parts.append(f"{NONE} at {', '.join(rest)}")
    if said := _read_apart(result, variant, {_direction(d) for d in chosen.values()}):
        parts.append(said)
    beyond = "" if claimed else "on these questions and by one seed alone: "
    return f"{beyond}{'; '.join(parts)}."


def _read_apart(result: Comparison, variant: Variant, directions: set[str]) -> str | None:
    """What is to be said of a direction that a variant's more or less training explains as well."""
    ratio = result.stands(variant) / result.stands(result.baseline)
    favoured = "worse" if ratio < 1 else "better"
    if 1 - APART <= ratio <= 1 / (1 - APART) or favoured not in directions:
        return None
    return (
        f"read after {100 * ratio:.0f} % of the {AMOUNT_NAMES[result.match]} of "
        f"{result.baseline.label}: that alone may be why it is {favoured}"
    )


def _largest_first(found: dict[str, Difference]) -> Sequence[tuple[str, Difference]]:
    return sorted(found.items(), key=lambda item: -abs(item[1].over_seeds.mean))


def _direction(difference: Difference) -> str:
    return "better" if difference.over_seeds.mean > 0 else "worse"


def _said(difference: Difference) -> str:
    found = difference.over_seeds
    inside = "" if found.seeds == 1 else f", {span(found)}"
    return f"{points(found.mean)}{inside}"


def who_still_rises(result: Comparison) -> str | None:
    """Variants that gained since the validation before the one that is read, and most where: what
    more training may change. None where nobody gained much.
    """
    gains: dict[str, tuple[float, str, float]] = {}
    for variant in result.variants:
        pairs = [(t.before, t.chosen) for t in variant.trials if t.before and t.chosen]
        if not pairs:
            continue
        own = {
            ability: sum(
                result.share(now, ability) - result.share(before, ability) for before, now in pairs
            )
            / len(pairs)
            for ability in result.columns
        }
        most = max(result.abilities, key=lambda ability: own[ability])
        if own[result.columns[0]] >= RISING:
            gains[variant.label] = (own[result.columns[0]], most, own[most])
    if not gains:
        return None
    said = "; ".join(
        f"{label} {points(gain)}"
        + (f" ({most} {points(there)})" if len(result.abilities) > 1 else "")
        for label, (gain, most, there) in sorted(gains.items(), key=lambda item: -item[1][0])
    )
    return (
        f"Still rising where they are read, so that more training may change what stands here: in "
        f"points of {result.columns[0]} since the validation before (and where most), {said}."
    )


def chance_said(result: Comparison) -> str:
    """Where chance is from, or how to know it."""
    if result.chance:
        best = [name for name in result.chance if name not in result.blind]
        of = f" ({', '.join(result.blind)})" if best else ""
        said = ["the best answer without an image"] if best else []
        if result.blind:
            said.append(f"what the jobs answer with another sample's image{of}")
        higher = "the higher of " if best and result.blind else ""
        return f"Chance: {higher}{' and of '.join(said)}, by the evaluations of the jobs."
    return (
        "What chance reaches is not known: python -m casa_train.evaluate --sweep measures it. So "
        "nothing is said of abilities that nobody learned."
    )
