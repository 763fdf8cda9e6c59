"""The numbers at the top of the page."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from casa_train.io.numbers import (
    MISSING,
    count,
    duration,
    memory,
    percent,
    prefixed,
    short,
    significant,
)
from casa_train.report import series
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
        Fact("last loss", significant(loss[-1], 4), ""),
    ]
    if len(run.metrics) >= series.SMOOTH_FROM:
        _, smoothed = series.smooth(columns.steps, loss)
        found[-1].note = f"smoothed {significant(smoothed[-1], 4)}"
    if run.evaluation is not None:
        scores = run.evaluation
        blind, guess = percent(scores["blind"]), percent(scores["guess"])
        note = f"of {count(scores['questions'], 'question')}"
        if scores["questions"]:
            found += [
                Fact("exact match", percent(scores["exact_match"]), note),
                Fact("blind", blind, "another sample's image"),
                Fact("image-free guess", guess, "from the question alone"),
            ]
        if live := scores.get("live"):
            note = f"of {count(live['seconds'], 'second')} of {count(live['clips'], 'clip')}"
            blind = f"blind {percent(live['blind_match'])}"
            found.append(Fact("live captions", percent(live["match"]), f"{note}; {blind}"))
    total, waiting = np.nansum(seconds), np.nansum(waits)
    note = f"{percent(waiting / total)} waiting for data" if total else ""
    found.append(Fact("median step", duration(series.median(seconds)), note))
    for kind in ("text", "image"):
        rate = series.median(columns.column(f"{kind}_tokens_per_second"))
        tokens = np.nansum(columns.column(f"{kind}_tokens"))
        note = f"{short(tokens)} in all" if tokens else ""
        shown = f"{rate:,.0f}" if rate == rate else MISSING
        found.append(Fact(f"{kind} tokens/s", shown, note))
    return found + _machine(columns, len(run.starts))


def _machine(columns: series.Columns, starts: int) -> list[Fact]:
    """Use of the hardware; nothing of what an older run did not record."""
    found = []
    tflops, mfu = (series.median(columns.column(name)) for name in ("tflops", "mfu"))
    if tflops == tflops:
        number, prefix = prefixed(1e12 * tflops)
        unit = f"{prefix}FLOP/s"
        if mfu == mfu:
            found.append(Fact("MFU", percent(mfu), f"{number} {unit} a rank"))
        else:
            found.append(Fact(unit, number, "a rank; the peak is unknown"))
    peak = columns.column("memory_peak_bytes")
    if np.isfinite(peak).any():
        found.append(Fact("memory", memory(np.nanmax(peak)), "peak of a rank"))
    total = float(np.nansum(columns.column("seconds")))
    if starts and total:
        found.append(Fact("training", duration(total), f"in {count(starts, 'start')}"))
    return found
