"""metrics.jsonl: one line a step, written and read."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from casa_train.io.files import write_atomic
from casa_train.io.log import LineFile, read_json_lines, warn
from casa_train.metrics.sinks.base import Record

LONGEST_LINES = 4 << 20  # bytes in which a whole line is found, with thousands of sources in it


class JsonlSink:
    """Appends one JSON line a step at once, so that a killed run keeps what it reported.

    What a full disk does not take waits in memory and is written, in order, when there is room
    again. `keep_steps` first removes what a resumed run will report again.

    :param warn: called when the disk begins to refuse, and when it takes lines again.
    """

    def __init__(self, path: Path, warn: Callable[[str], None] = warn) -> None:
        self._file = LineFile(path, warn)

    def write(self, record: Record) -> None:
        self._file.add([json.dumps(record)])

    def validated(self, record: Record) -> None:
        """Validations have a file of their own."""

    def log(self, line: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a run by step; where a step was repeated after a resume, the last one counts.

    A line cut short by a kill is left out.
    """
    records: dict[int, Record] = {}
    for record in read_json_lines(path):
        if isinstance(record.get("step"), int):
            records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def last_step(path: Path) -> int | None:
    """The step of the last whole line, without reading the others; None: there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_LINES))
        for line in reversed(file.read().splitlines()):
            try:
                return int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):  # cut by a kill, or by where reading began
                continue
    return None


def keep_steps(path: Path, last: int) -> None:
    """Drops lines of steps after `last`, which a resumed run repeats, and a line cut by a kill.

    Where the disk refuses, they stay: of a step's lines the last one counts.
    """
    with contextlib.suppress(OSError):
        if path.exists():
            kept = [json.dumps(r) + "\n" for r in read_metrics(path) if r["step"] <= last]
            write_atomic(path, "".join(kept))
