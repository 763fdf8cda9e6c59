"""The run directories of a sweep."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from pathlib import Path

from casa_train.errors import UserError
from casa_train.run.layout import (
    CONFIG_FILE,
    CONSOLE_FILE,
    FAILURE_FILE,
)


def run_directories(sweep: Path, only: str = "*") -> list[Path]:
    """The directories of a sweep's jobs, in natural order: runs, and empty ones, which a job leaves
    that failed before it began.

    :param only: a pattern of the directories' names.
    :raises UserError: there is no run.
    """
    if not sweep.is_dir():
        raise UserError(
            f"--sweep {sweep} is not a directory; expected what hydra.sweep.dir was in the sweep's "
            "command, such as runs"
        )
    jobs = [
        path
        for path in sorted(sweep.iterdir(), key=lambda path: natural(path.name))
        if path.is_dir()
        and fnmatch.fnmatchcase(path.name, only)
        and ((path / CONFIG_FILE).is_file() or {*_names(path)} <= {FAILURE_FILE, CONSOLE_FILE})
    ]
    if not any((path / CONFIG_FILE).is_file() for path in jobs):
        raise UserError(
            f"--sweep {sweep} holds no run: no directory {only!r} in it has a {CONFIG_FILE}. "
            "Expected what hydra.sweep.dir was in the sweep's command, such as runs."
        )
    return jobs


def _names(path: Path) -> list[str]:
    with contextlib.suppress(OSError):
        return [entry.name for entry in path.iterdir()]
    return ["unreadable"]


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts every=2 before every=10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
