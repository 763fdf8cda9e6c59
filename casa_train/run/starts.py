"""starts.jsonl: when a run was started, on what, from which step, and why each start left.

One line when a start begins to train, another when it leaves; a killed start has no second.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol

from casa_train.distributed.ranks import Ranks
from casa_train.io.log import read_json_lines
from casa_train.metrics.sinks.jsonl import last_step
from casa_train.run.layout import METRICS_FILE, STARTS_FILE

FINISHED = "finished"


class Position(Protocol):
    """Knows the last step that was trained."""

    step: int


class StartLog:
    """This start's lines.

    The log is for people: where it cannot be written, training goes on.

    :param path: the file; None: nothing is written, as on every rank but the first.
    :param described: what else the first line says: ranks, device and the like.
    :param found_step: the last step that was reported before, which a checkpoint may lack.
    """

    def __init__(
        self, path: Path | None, described: dict[str, Any], found_step: int | None = None
    ) -> None:
        self.path = path
        self.described = {"found_step": found_step, **described}
        self.number = 1 + max((s["start"] for s in read_starts(path)), default=0) if path else 1
        self._progress: Position | None = None

    def begin(self, progress: Position) -> None:
        """The start begins to train.

        :param progress: where the run stands, now and later.
        """
        self._progress = progress
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        self._append({"after_step": progress.step, **where, **self.described})

    def close(self, reason: str | None) -> None:
        """The start ends; None: after the last step."""
        self.leave(reason or FINISHED)

    def leave(self, reason: str) -> None:
        """The start ends, once: why, and after which step."""
        progress, self._progress = self._progress, None
        if progress is not None:
            self._append({"left": reason, "step": progress.step})

    def _append(self, fields: dict[str, Any]) -> None:
        if self.path is None:
            return
        line = json.dumps({"start": self.number, "time": round(time.time(), 3), **fields})
        with contextlib.suppress(OSError), self.path.open("a+b") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut by a kill
                    line = "\n" + line
            file.write(line.encode() + b"\n")


def open_starts(run_dir: Path | None, ranks: Ranks, described: dict[str, Any]) -> StartLog:
    """The log of a run's starts, and what it reported last; the first rank alone writes.

    :param run_dir: None: nothing is written.
    """
    if run_dir is None or not ranks.first:
        return StartLog(None, described)
    return StartLog(run_dir / STARTS_FILE, described, last_step(run_dir / METRICS_FILE))


def read_starts(path: Path) -> list[dict[str, Any]]:
    """The starts of a run in order, each with `left_time`, `left` and `step` if it could say so.

    Lines cut short by a kill are left out; no file, no starts.
    """
    starts: dict[int, dict[str, Any]] = {}
    with contextlib.suppress(FileNotFoundError):
        for fields in read_json_lines(path):
            if "start" in fields and "time" in fields:
                start = starts.setdefault(fields["start"], {})
                if "left" in fields:
                    fields["left_time"] = fields.pop("time")
                start.update(fields)
    return [starts[number] for number in sorted(starts)]
