"""The numbers at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from casa_train.io.log import count
from casa_train.report import series, text
from casa_train.report.run_data import RunData


@dataclass
class Fact:
    """A number of the header."""

    label: str
    value: str
    note: str = ""


def facts(run: RunData) -> list[Fact]:
    """The essentials at the top."""
    columns, last = series.Columns(run.metrics), run.metrics[-1]
    loss = columns.column("loss")
    seconds = columns.column("seconds")
    waits = columns.column("data_seconds")
    trained = np.nansum(columns.column("samples"))
    found = [
        Fact("steps", f"{last['step']:,}", f"{trained:,.0f} samples" if trained else ""),
        Fact("last loss", text.number(loss[-1], 4), ""),
    ]
    if len(run.metrics) >= series.SMOOTH_FROM:
        _, smoothed = series.smooth(columns.steps, loss)
        found[-1].note = f"smoothed {text.number(smoothed[-1], 4)}"
    if run.evaluation is not None:
        scores = run.evaluation
        blind, guess = text.percent(scores["blind"]), text.percent(scores["guess"])
        note = f"of {count(scores['questions'], 'question')}"
        found += [
            Fact("exact match", text.percent(scores["exact_match"]), note),
            Fact("blind", blind, "another sample's image"),
            Fact("image-free guess", guess, "from the question alone"),
        ]
    total, waiting = np.nansum(seconds), np.nansum(waits)
    note = f"{text.percent(waiting / total)} waiting for data" if total else ""
    found.append(Fact("median step", text.number(series.median(seconds), 3, " s"), note))
    for kind in ("text", "image"):
        rate = series.median(columns.column(f"{kind}_tokens_per_second"))
        tokens = np.nansum(columns.column(f"{kind}_tokens"))
        note = f"{text.large(tokens)} in all" if tokens else ""
        shown = f"{rate:,.0f}" if rate == rate else text.MISSING
        found.append(Fact(f"{kind} tokens/s", shown, note))
    return found + _machine(columns, len(run.starts))


def _machine(columns: series.Columns, starts: int) -> list[Fact]:
    """Use of the hardware; nothing of what an older run did not record."""
    found = []
    tflops, mfu = (series.median(columns.column(name)) for name in ("tflops", "mfu"))
    if tflops == tflops:
        number, unit = text.with_unit(1e12 * tflops, "FLOP/s")
        if mfu == mfu:
            found.append(Fact("MFU", text.percent(mfu), f"{number} {unit} a rank"))
        else:
            found.append(Fact(unit, number, "a rank; the peak is unknown"))
    peak = columns.column("memory_peak_bytes")
    if np.isfinite(peak).any():
        found.append(Fact("memory", text.memory(np.nanmax(peak)), "peak of a rank"))
    total = float(np.nansum(columns.column("seconds")))
    if starts and total:
        found.append(Fact("training", text.duration(total), f"in {count(starts, 'start')}"))
    return found
