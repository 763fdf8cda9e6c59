"""The console: a progress bar or lines."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

from casa_train.io.log import log
from casa_train.io.numbers import duration, rate, with_unit
from casa_train.metrics.sinks.base import Record


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
        shown = f"{numbers}  {record['text_tokens_per_second']:.0f} text tok/s  {_work(record)}"
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(shown, refresh=False)
        elif step % self.every == 0 or step == self.steps:
            elapsed = time.monotonic() - self._began
            left = elapsed / max(1, step - self.start) * (self.steps - step)
            rates = " ".join(f"{name} {rate(own)}" for name, own in record["rates"].items())
            fills = record["fill_text"], record["fill_image"]
            log(
                f"step {step}/{self.steps}  {shown}  {record['seconds']:.2f} s  rates {rates}  "
                f"fill {fills[0]:.2f}/{fills[1]:.2f}  left {duration(round(left))}",
                self.stream,
            )

    def validated(self, record: Record) -> None:
        """A line says it."""

    def log(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            log(line, self.stream)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _sized_terminal(stream: TextIO) -> bool:
    """Whether a bar would be seen; some pseudo-terminals have neither rows nor columns."""
    if not stream.isatty():
        return False
    size = os.get_terminal_size(stream.fileno())
    return size.columns > 0 and size.lines > 0


def _work(record: Record) -> str:
    """Utilisation where the device's peak is known; otherwise the work that a rank does."""
    if record["mfu"] is not None:
        return f"MFU {record['mfu']:.1%}"
    return with_unit(1e12 * record["tflops"], "FLOP/s")
