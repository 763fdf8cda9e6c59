"""Draws the page of a run: curves, results and samples in one HTML file."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from casa_train.errors import UserError
from casa_train.io.numbers import MISSING
from casa_train.pages import html, pictures
from casa_train.report import series
from casa_train.report.attempts import start_rows
from casa_train.report.attention_plots import draw_image_attention
from casa_train.report.bad_samples import bad_samples
from casa_train.report.benchmarks import benchmarks
from casa_train.report.curves import draw_plots
from casa_train.report.facts import facts
from casa_train.report.live_captions import live_captions
from casa_train.report.run_data import RunData
from casa_train.report.samples import sample_rows
from casa_train.report.validations import validations


def write_report(run: RunData, path: Path) -> None:
    """Writes the page of a run, whole or not at all.

    :raises UserError: there is no step to show, or the file cannot be written.
    """
    if not run.metrics:
        raise UserError(
            f"run {run.name!r} has no metrics: no step has been reported yet. Check the run's name "
            "and that its metrics.jsonl has at least one line, or train it first."
        )
    columns = series.Columns(run.metrics)
    page = html.render(
        "page.html.j2",
        __package__,
        name=run.name,
        facts=facts(run),
        plots=draw_plots(run.metrics),
        evaluation=run.evaluation,
        sources={name: curve for name, curve in columns.sources().items() if curve.losses},
        starts=start_rows(run.starts),
        restarted=len(columns.restarts) > 0,
        smoothed=len(run.metrics) >= series.SMOOTH_FROM,
        live=live_captions(run.evaluation),
        image_attention=draw_image_attention(run.evaluation),
        samples=sample_rows(run),
        validation=validations(run),
        benchmarks=benchmarks(run),
        picture_side=pictures.SIDE,
        bad=bad_samples(run.quarantine),
        holes=int(run.metrics[-1].get("bad_samples") or len(run.quarantine)),
        config_yaml=run.config_yaml,
        environment=list(_flatten(run.environment)),
    )
    html.write(page, path)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of a nested mapping; lists read as a command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            yield f"{prefix}{key}", MISSING if value is None else str(value)
