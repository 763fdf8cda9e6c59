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
from types import TracebackType
from typing import Any, Protocol

from casa_train.io.log import read_json_lines

STARTS_FILE = "starts.jsonl"
FINISHED = "finished"


class Position(Protocol):
    """Knows the last step that was trained."""

    step: int


class StartLog:
    """This start's lines; a context around its steps.

    The log is for people: where it cannot be written, training goes on.

    :param path: the file; None: nothing is written, as on every rank but the first.
    :param progress: where the run stands.
    :param found_step: the last step that was reported before, which a checkpoint may lack.
    :param described: what else the first line says: ranks, device and the like.
    """

    def __init__(
        self,
        path: Path | None,
        progress: Position,
        described: dict[str, Any],
        found_step: int | None = None,
    ) -> None:
        self.path, self.progress = path, progress
        self.described = {"found_step": found_step, **described}
        self.number = 1 + max((s["start"] for s in read_starts(path)), default=0) if path else 1
        self.reason: str | None = None
        self._left = False

    def __enter__(self) -> StartLog:
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        self._append({"after_step": self.progress.step, **where, **self.described})
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            first = next(iter(str(error).splitlines()), "")
            self.leave(f"{type(error).__name__}: {first}" if first else type(error).__name__)
        else:
            self.leave(self.reason or FINISHED)

    def leave(self, reason: str) -> None:
        """The start ends, once: why, and after which step."""
        if not self._left:
            self._left = True
            self._append({"left": reason, "step": self.progress.step})

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
