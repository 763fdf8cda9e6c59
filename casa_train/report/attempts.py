"""The starts of a run: when, on what, how far, and why each left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from casa_train.io.numbers import MISSING, count, duration

REASONS = {
    "finished": "finished",
    "signal": "told to leave by a signal",
    "max_hours": "its time was up (trainer.max_hours)",
    "watchdog": "no step for too long (watchdog)",
}


def start_rows(starts: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """One row for each start, as texts; what an older run did not write is missing."""
    rows = []
    for number, start in enumerate(starts):
        following = starts[number + 1] if number + 1 < len(starts) else None
        last = start.get("step") or (following or {}).get("found_step")
        note = ""
        again = following.get("after_step") if following else None
        if last is not None and again is not None and again < last:
            note = f"{count(last - again, 'step')} repeated by the next start"
        if last is not None and last == start.get("after_step"):
            note = "no step was done"
        left = start.get("left")
        if left is None:
            left = "killed, without a word" if following else "still runs, or was killed"
        rows.append(
            {
                "number": str(start.get("start", number + 1)),
                "began": _clock(start.get("time")),
                "place": _place(start),
                "from_step": _step(start.get("after_step"), 1),
                "to_step": _step(last, 0),
                "lasted": _lasted(start),
                "left": REASONS.get(left, str(left)),
                "note": note,
            }
        )
    return rows


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return MISSING
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _place(start: Mapping[str, Any]) -> str:
    ranks, device = start.get("ranks"), start.get("device")
    parts = [start.get("host"), ranks and count(ranks, "rank"), device]
    return ", ".join(str(part) for part in parts if part) or MISSING


def _step(step: int | None, more: int) -> str:
    return MISSING if step is None else f"{step + more:,}"


def _lasted(start: Mapping[str, Any]) -> str:
    if start.get("time") is None or start.get("left_time") is None:
        return MISSING
    return duration(start["left_time"] - start["time"])
