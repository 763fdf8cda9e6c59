"""Where the record of a step goes: metrics.jsonl and the console."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from casa_train.files import write_atomic

Record = dict[str, Any]


class Sink(Protocol):
    """Takes one record a step."""

    def write(self, record: Record) -> None: ...

    def say(self, line: str) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends one JSON line a step, flushed, so that a killed run keeps what it reported.

    `keep_steps` first removes what a resumed run will report again.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def say(self, line: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._file.close()


class ConsoleSink:
    """A progress bar with ETA on a terminal, plain lines in a log."""

    def __init__(self, steps: int, start: int, every: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.steps, self.start, self.every = steps, start, every
        self._began = time.monotonic()
        self._bar: Any = None
        if _sized_terminal(self.stream):
            self._bar = tqdm(
                total=steps, initial=start, file=self.stream, unit="step", dynamic_ncols=True
            )

    def write(self, record: Record) -> None:
        step = record["step"]
        numbers = "no finite loss"
        if record["loss"] is not None:
            numbers = f"loss {record['loss']:.4f}  grad {record['gradient_norm']:.2f}"
        shown = f"{numbers}  {record['text_tokens_per_second']:.0f} text tok/s"
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(shown, refresh=False)
        elif step % self.every == 0 or step == self.steps:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(1, step - self.start) * (self.steps - step)
            rates = " ".join(f"{name} {rate:.1e}" for name, rate in record["rates"].items())
            fills = record["fill_text"], record["fill_image"]
            print(
                f"step {step}/{self.steps}  {shown}  {record['seconds']:.2f} s  rates {rates}  "
                f"fill {fills[0]:.2f}/{fills[1]:.2f}  left {_clock(left)}",
                file=self.stream,
                flush=True,
            )

    def say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def read_metrics(path: Path) -> list[Record]:
    """The records of a run by step; where a step was repeated after a resume, the last one counts.

    A line cut short by a kill is left out.
    """
    records: dict[int, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record["step"]] = record
    return [records[step] for step in sorted(records)]


def keep_steps(path: Path, last: int) -> None:
    """Drops lines of steps after `last`, which a resumed run repeats, and a line cut by a kill."""
    if path.exists():
        kept = [json.dumps(r) + "\n" for r in read_metrics(path) if r["step"] <= last]
        write_atomic(path, "".join(kept))


def _sized_terminal(stream: TextIO) -> bool:
    """Whether a bar would be seen; some pseudo-terminals have neither rows nor columns."""
    if not stream.isatty():
        return False
    size = os.get_terminal_size(stream.fileno())
    return size.columns > 0 and size.lines > 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
