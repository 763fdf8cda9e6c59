"""Lines: how they reach files and consoles on disks that may be full."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

MOST_WAITING = 20_000


class LineFile:
    """Appends lines; what the disk refuses waits in memory until there is room again.

    The file is opened for every write, so that it also survives a disk that comes back.

    :param path: made with the first line.
    :param log: told once when the disk begins to refuse, and when it no longer does.
    :param most: so many lines wait at most; then the oldest are dropped.
    """

    def __init__(self, path: Path, log: Callable[[str], None], most: int = MOST_WAITING) -> None:
        self.path, self.log = path, log
        self._waiting: deque[str] = deque(maxlen=most)
        self._dropped = 0
        self._refused = False

    def add(self, lines: Sequence[str]) -> None:
        """:param lines: without their ends."""
        self._dropped += max(0, len(self._waiting) + len(lines) - (self._waiting.maxlen or 0))
        self._waiting.extend(lines)
        if not self._waiting:
            return
        try:
            append("".join(f"{line}\n" for line in self._waiting), self.path)
        except OSError as error:
            if not self._refused:
                self.log(f"{self.path} cannot be written: {error}; its lines wait in memory")
            self._refused = True
            return
        if self._refused:
            lost = f", {self._dropped} were dropped" if self._dropped else ""
            self.log(f"{self.path} is written again: {len(self._waiting)} lines had waited{lost}")
        self._waiting.clear()
        self._refused, self._dropped = False, 0

    @property
    def waiting(self) -> int:
        """Lines that are not on the disk yet."""
        return len(self._waiting)

    def close(self) -> None:
        """A last attempt."""
        self.add([])
        if self._waiting:
            self.log(f"{self.path}: the last {len(self._waiting)} lines could not be written")


def append(text: str, path: Path) -> None:
    """Appends to a file, or leaves it as it was; a last line that a kill cut short is ended first.

    :raises OSError: naming the file.
    """
    size: int | None = None
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.fstat(descriptor).st_size
            cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            content = memoryview((("\n" if cut else "") + text).encode())
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)  # some file systems report a full disk only here
    except OSError as error:
        if size is not None:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
        raise OSError(error.errno, error.strerror, str(path)) from error


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines; what a kill cut short, and was ended later, is left out.

    :raises OSError: it cannot be read.
    """
    objects = []
    for line in path.read_bytes().split(b"\n"):  # a character may be cut, too
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


def log(line: str, stream: TextIO | None = None) -> None:
    """Prints; a console that is a file on a full disk ends no run.

    :param stream: standard output unless it is given.
    """
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)


def warn(line: str) -> None:
    """On standard error, for whatever one rank alone has to say."""
    log(f"warning: {line}", sys.stderr)


def drop_unwritten() -> None:
    """Before the process ends: lines that still cannot be written would change its exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
