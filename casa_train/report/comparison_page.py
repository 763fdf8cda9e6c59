"""The page of a comparison, and the files beside it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.pages import html
from casa_train.report.ability_attention import (
    GATE_TITLES,
    AttentionOverTime,
    Gate,
    attention_over_time,
    gate_of,
    gate_rows,
)
from casa_train.report.comparison import Comparison, compare
from casa_train.report.comparison_plots import (
    CLASS_COLOURS,
    draw_abilities,
    draw_attention,
    draw_curves,
    draw_differences,
    draw_streaming,
    looks,
)
from casa_train.report.comparison_tables import (
    as_csv,
    as_json,
    cell,
    difference_rows,
    markdown,
    seeds_of,
    steps_of,
)
from casa_train.report.drawing import VARIABLES
from casa_train.report.jobs import read_sweep
from casa_train.report.streaming_costs import read_streaming
from casa_train.report.training_costs import cost_rows
from casa_train.report.variants import MEAN
from casa_train.report.verdicts import (
    chance_said,
    how_matched,
    verdict,
    what_a_claim_is,
    who_still_rises,
)

STEM = "comparison"  # of comparison.html, .md, .csv and .json
OPEN = 2  # variants whose attention is unfolded


def write_comparison(
    sweep: Path, only: str, match: str, baseline: str | None = None
) -> tuple[list[str], Path]:
    """Compares the jobs of a sweep and writes what is found into its directory.

    :return: the Markdown, and the page's path.
    :raises UserError: nothing to compare, or the files cannot be written.
    """
    sweep = sweep.resolve()
    result = compare(read_sweep(sweep, only), sweep, match, baseline)
    problems = list(result.problems)
    attention = attention_over_time(result)
    gates = [gate for over in attention if (gate := gate_of(over)) is not None]
    # Reads streaming.json, whose problems count, too.
    page = render(result, sweep, only, problems, attention, gates)
    lines = markdown(result, problems, gates)
    files = {
        ".md": "\n".join(lines) + "\n",
        ".csv": as_csv(result),
        ".json": json.dumps(as_json(result, problems, gates), indent=1) + "\n",
    }
    for suffix, text in files.items():
        path = sweep / f"{STEM}{suffix}"
        try:
            write_atomic(path, text)
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error}. Free or mend the directory."
            ) from error
    path = sweep / f"{STEM}.html"
    html.write(page, path, ". Free or mend the directory.")
    return lines, path


def render(
    result: Comparison,
    sweep: Path,
    only: str,
    problems: list[str],
    attention: Sequence[AttentionOverTime],
    gates: Sequence[Gate],
) -> str:
    """The page.

    :param only: which jobs of the sweep.
    :param problems: takes those of streaming.json.
    """
    look = looks(result)
    some = [] if only == "*" else ["--only", only]
    command = ["python", "-m", "casa_train.bench", "streaming", "--sweep", str(sweep), *some]
    measure = shlex.join(command)
    streaming = read_streaming(result, sweep, measure, problems.append)
    told = [*result.variants, *result.apart]
    titles, costs = cost_rows(told)
    return html.render(
        "comparison.html.j2",
        __package__,
        result=result,
        look=look,
        mean=MEAN,
        problems=problems,
        findings=verdict(result),
        how=how_matched(result),
        claim=what_a_claim_is(result),
        chance=chance_said(result),
        cells={
            (variant.label, ability): cell(result, variant, ability)
            for variant in result.variants
            for ability in result.columns
        },
        read={variant.label: f"{seeds_of(variant)}, {steps_of(variant)}" for variant in told},
        differences=difference_rows(result),
        forest=[plot for plot in [draw_differences(result, look)] if plot is not None],
        rising=who_still_rises(result),
        curves=draw_curves(result, look),
        panels=draw_abilities(result, look),
        cost_titles=titles,
        costs=list(zip(told, costs, strict=True)),
        streaming=streaming,
        measure=measure,
        streams=[]
        if streaming is None
        else draw_streaming(streaming.values, streaming.columns, streaming.images, look),
        silent=[
            variant.label
            for variant in result.variants
            if all(over.variant is not variant for over in attention)
        ],
        attention=[(over, draw_attention(over, result.abilities)) for over in attention],
        gate_titles=GATE_TITLES,
        gates=list(zip([gate.label for gate in gates], gate_rows(gates), strict=True)),
        classes={kind: VARIABLES[colour] for kind, colour in CLASS_COLOURS.items()},
        open=OPEN,
        facts=facts(result),
    )


def facts(result: Comparison) -> Sequence[tuple[str, str, str]]:
    """The numbers that the page begins with: what, how much, and a note."""
    seeds = sorted({trial.seed for variant in result.variants for trial in variant.trials})
    questions = sum(result.questions(ability) for ability in result.abilities)
    claimed = sum(difference.claimed for difference in result.differences.values())
    return [
        (
            "variants",
            f"{len(result.variants)}",
            f"and {len(result.apart)} told apart" if result.apart else "",
        ),
        (
            "jobs",
            f"{len(result.chosen)}",
            f"of {len(result.jobs)}: not all is told yet"
            if any(job.state != "finished" for job in result.jobs)
            else f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}",
        ),
        ("abilities", f"{len(result.abilities)}", f"{questions:,} questions"),
        ("matched by", result.match, ""),
        ("baseline", result.baseline.label, ""),
        ("differences", f"{claimed} of {len(result.differences)}", "claimed of compared"),
    ]
