"""A comparison as tables: cells of the page, Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from casa_train.io.numbers import count, percent
from casa_train.io.tables import markdown_table
from casa_train.report.ability_attention import (
    GATE_TITLES,
    Gate,
    gate_rows,
)
from casa_train.report.comparison import Comparison
from casa_train.report.significance import Difference
from casa_train.report.training_costs import COLUMNS, cost_of, cost_rows
from casa_train.report.variants import AMOUNTS, Reading, Trial, Variant
from casa_train.report.verdicts import (
    how_matched,
    mean_and_half,
    p_value,
    points,
    span,
    verdict,
    what_a_claim_is,
    who_still_rises,
)

CLAIMED = {True: "▲", False: "▼"}  # better, worse
WEAKER = {True: "△", False: "▽"}  # on these questions, by one seed
CSV_FIELDS = (
    *("variant", "seed", "directory", "ability", "source", "compared", "step", *AMOUNTS),
    *("questions", "correct", "exact_match", "unread", "samples_digest", "hits"),
)


@dataclass(frozen=True)
class Cell:
    """A cell of the heat table.

    :param share: that its colour tells; :param title: what the mouse reads.
    """

    mean: str
    half: str
    share: float
    mark: str
    better: bool
    title: str


def mark_of(difference: Difference | None) -> str:
    """What a table says of a difference: nothing where none is shown."""
    if difference is None:
        return ""
    better = difference.over_seeds.mean > 0
    if difference.claimed:
        return CLAIMED[better]
    return WEAKER[better] if difference.shown and difference.over_seeds.seeds == 1 else ""


def cell(result: Comparison, variant: Variant, ability: str) -> Cell:
    found = result.cells[variant.label, ability]
    difference = result.differences.get((variant.label, ability))
    title = f"{variant.label}, {ability}: {mean_and_half(found)} %"
    if difference is not None:
        title += (
            f"; {points(difference.over_seeds.mean)} against {result.baseline.label}, over seeds "
            f"{span(difference.over_seeds)}, p {p_value(difference.corrected)} corrected"
        )
    title += f"; read at {steps_of(variant)}"
    return Cell(
        f"{100 * found.mean:.1f}",
        "" if found.seeds == 1 else f"{100 * found.half:.1f}",
        found.mean,
        mark_of(difference),
        difference is not None and difference.over_seeds.mean > 0,
        title,
    )


def steps_of(variant: Variant) -> str:
    """At which step each job was read: step 550, or of each seed."""
    steps = {trial.seed: trial.chosen.step for trial in variant.trials if trial.chosen is not None}
    if not steps:
        return "no step"
    if len(set(steps.values())) == 1:
        return f"step {next(iter(steps.values())):,}"
    return ", ".join(f"step {step:,} (seed {seed})" for seed, step in steps.items())


def seeds_of(variant: Variant) -> str:
    named = ", ".join(map(str, variant.seeds))
    return f"seed {named}" if len(variant.seeds) == 1 else f"seeds {named}"


def difference_rows(result: Comparison) -> list[list[str]]:
    """Variant, ability, difference, interval, p, corrected p, verdict."""
    return [
        [
            label,
            ability,
            points(found.over_seeds.mean),
            span(found.over_seeds),
            p_value(found.p),
            p_value(found.corrected),
            found.verdict,
        ]
        for (label, ability), found in result.differences.items()
    ]


def markdown(result: Comparison, problems: Sequence[str], gates: Sequence[Gate]) -> list[str]:
    """The comparison as Markdown: findings, the table, costs and what must be known."""
    shown = [v for v in result.variants]
    head = ["ability", *(v.label for v in shown)]
    rows = []
    for ability in result.columns:
        cells = []
        for variant in shown:
            found = result.differences.get((variant.label, ability))
            text = f"{mean_and_half(result.cells[variant.label, ability])} {mark_of(found)}"
            cells.append(text.strip())
        note = " (nobody above chance)" if ability in result.unlearned else ""
        rows.append([ability + note, *cells])
    rows.append(["read at", *(steps_of(variant) for variant in shown)])
    rows.append(["seeds", *(", ".join(map(str, variant.seeds)) for variant in shown)])
    if result.chance:
        head.append("chance")
        for row, ability in zip(rows, [*result.columns, "", ""], strict=True):
            row.append(percent(result.chance.get(ability)))
    titles, costs = cost_rows([*result.variants, *result.apart])
    labels = [variant.label for variant in [*result.variants, *result.apart]]
    costs = [[label, *row] for label, row in zip(labels, costs, strict=True)]
    return [
        f"# {result.name}: {count(len(labels), 'variant')}, matched by {result.match}",
        "",
        how_matched(result),
        "",
        *(f"- {finding}" for finding in verdict(result)),
        "",
        what_a_claim_is(result),
        "",
        f"Exact match in percent, mean ± half of the 95 % interval over seeds; "
        f"{CLAIMED[True]} better, {CLAIMED[False]} worse than {result.baseline.label}; "
        f"{WEAKER[True]} {WEAKER[False]} on these questions, by one seed:",
        "",
        *markdown_table([head, *rows]),
        "",
        *([rising, ""] if (rising := who_still_rises(result)) else []),
        *markdown_table([["variant", *titles], *costs]),
        *_gates(gates),
        *(["", *(f"{name}: {value}" for name, value in result.made_by)] if result.made_by else []),
        *(["", "To know:", "", *(f"- {problem}" for problem in problems)] if problems else []),
    ]


def _gates(gates: Sequence[Gate]) -> list[str]:
    if not gates:
        return []
    rows = [[g.label, *row] for g, row in zip(gates, gate_rows(gates), strict=True)]
    return [
        "",
        "What images are given where answers are predicted, mean over layers: a share of "
        "attention, or what a mechanism's own gate lets through:",
        "",
        *markdown_table([["variant", *GATE_TITLES], *rows]),
    ]


def as_csv(result: Comparison) -> str:
    """One row a job and ability: enough to do the statistics again."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_FIELDS, lineterminator="\n")
    writer.writeheader()
    for variant in [*result.variants, *result.apart]:
        for trial in variant.trials:
            at = trial.chosen or trial.readings[-1]
            for ability in result.abilities:
                writer.writerow(_csv_row(result, variant, trial, at, ability))
    return file.getvalue()


def _csv_row(
    result: Comparison, variant: Variant, trial: Trial, at: Reading, ability: str
) -> dict[str, Any]:
    answers = result.answers(at, ability)
    hits = at.hits[result.sources[ability]]
    return {
        "variant": variant.label,
        "seed": trial.seed,
        "directory": trial.name,
        "ability": ability,
        "source": result.sources[ability],
        "compared": "yes" if trial.chosen is not None else "no",
        "step": at.step,
        **{name: _number(at.amounts[name]) for name in AMOUNTS},
        "questions": len(answers),
        "correct": int((answers == 1).sum()),
        "exact_match": result.share(at, ability),
        "unread": int((hits < 0).sum()),
        "samples_digest": at.digest,
        "hits": "".join("-" if hit < 0 else str(hit) for hit in hits),
    }


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    return int(value) if value == int(value) else value


def as_json(result: Comparison, problems: Sequence[str], gates: Sequence[Gate]) -> dict[str, Any]:
    """Every number of the page by name."""
    return {
        "match": result.match,
        "limit": result.limit,
        "baseline": result.baseline.label,
        "made_by": dict(result.made_by),
        "verdict": [str(finding) for finding in verdict(result)],
        "problems": list(problems),
        "chance": result.chance,
        "unlearned": result.unlearned,
        "attention": [_gate_record(gate) for gate in gates],
        "variants": [
            _variant_record(result, variant) for variant in [*result.variants, *result.apart]
        ],
        "differences": [
            {
                "variant": label,
                "ability": ability,
                "difference": found.over_seeds.mean,
                "low": _number(found.over_seeds.low),
                "high": _number(found.over_seeds.high),
                "seeds": found.over_seeds.seeds,
                "questions": found.questions,
                "p": found.p,
                "p_corrected": found.corrected,
                "verdict": found.verdict,
            }
            for (label, ability), found in result.differences.items()
        ],
    }


def _gate_record(gate: Gate) -> dict[str, Any]:
    text, others = gate.equal or (None, None)
    return {
        "variant": gate.label,
        "step": gate.step,
        "text_answers": gate.text,
        "text_answers_equal": text,
        "other_answers": gate.others,
        "other_answers_equal": others,
        "difference": gate.gap.mean,
        "low": _number(gate.gap.low),
        "high": _number(gate.gap.high),
        "finding": gate.finding,
    }


def _variant_record(result: Comparison, variant: Variant) -> dict[str, Any]:
    compared = variant in result.variants
    cells = {a: result.cells[variant.label, a] for a in result.columns} if compared else {}
    return {
        "variant": variant.label,
        "fields": variant.fields,
        "compared": compared,
        "seeds": variant.seeds,
        "new_parameters": variant.new_parameters,
        "steps": {t.name: t.chosen.step for t in variant.trials if t.chosen is not None},
        "costs": {column.key: _number(cost_of(variant, column)) for column in COLUMNS},
        "exact_match": {
            ability: {"mean": own.mean, "low": _number(own.low), "high": _number(own.high)}
            for ability, own in cells.items()
        },
        "curves": {
            trial.name: [
                {
                    "step": at.step,
                    **{name: _number(at.amounts[name]) for name in AMOUNTS},
                    "exact_match": {
                        a: _number(result.share(at, a)) for a in result.columns if compared
                    },
                }
                for at in trial.readings
            ]
            for trial in variant.trials
        },
    }
