"""Draws the page of a run: one HTML file with curves, results and samples that loads nothing.

Whatever comes from data (questions, answers, keys, reasons) is escaped by the templates, and the
page's content security policy forbids scripts and requests. The same run gives the same bytes.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2

from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.io.log import count
from casa_train.report import series, text
from casa_train.report.attempts import start_rows
from casa_train.report.attention_plots import draw_reads
from casa_train.report.bad_samples import bad_samples
from casa_train.report.curves import draw_plots
from casa_train.report.facts import facts
from casa_train.report.run_data import RunData
from casa_train.report.samples import PICTURE_SIDE, sample_rows
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
    html = template("page.html.j2").render(
        name=run.name,
        facts=facts(run),
        plots=draw_plots(run.metrics),
        evaluation=run.evaluation,
        sources={name: curve for name, curve in columns.sources().items() if curve.losses},
        starts=start_rows(run.starts),
        restarted=len(columns.restarts) > 0,
        smoothed=len(run.metrics) >= series.SMOOTH_FROM,
        reads=draw_reads(run.evaluation),
        samples=sample_rows(run),
        validation=validations(run),
        picture_side=PICTURE_SIDE,
        bad=bad_samples(run.quarantine),
        holes=int(run.metrics[-1].get("bad_samples") or len(run.quarantine)),
        config_yaml=run.config_yaml,
        environment=list(_flatten(run.environment)),
    )
    # Texts may hold lone surrogates (JSON can), which UTF-8 cannot.
    html = html.encode("utf-8", "replace").decode("utf-8")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, html)
    except OSError as error:
        raise UserError(f"report {path} cannot be written: {error}") from error


def template(name: str) -> jinja2.Template:
    """A template of this folder; what it is filled with is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=text.percent, width=text.width, short=text.short, count=count
    )
    return environment.get_template(name)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and texts of a nested mapping; lists read as a command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            yield f"{prefix}{key}", shlex.join(map(str, value))
        else:
            yield f"{prefix}{key}", text.MISSING if value is None else str(value)
