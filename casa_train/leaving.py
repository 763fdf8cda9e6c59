"""How a run leaves before its last step: signals, a time limit, and a watchdog for hangs."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

# EX_TEMPFAIL: the run saved what it had and wants to be started again.
EXIT_REQUEUE = 75
# SLURM sends one of these before it takes a job's nodes away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop; ranks then agree on a step (`Trainer`).

    The handlers only set a flag, so that a signal never falls into the middle of a save.

    :param max_hours: the run leaves before so many hours have passed; 0: no limit.
    :param clock: seconds, for tests.
    """

    def __init__(self, max_hours: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.deadline = clock() + 3600 * max_hours if max_hours else None
        self.signal: str | None = None
        self._slowest = 0.0
        self._last: float | None = None  # starting up is no step
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._before[number] = signal.signal(number, self._received)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def flags(self) -> tuple[bool, bool]:
        """Whether a signal came, and whether the time limit is near; call once a step.

        Near: less is left than twice the longest step so far took, its save included; the first
        step after the start is not measured.
        """
        now = self.clock()
        if self._last is not None:
            self._slowest = max(self._slowest, now - self._last)
        self._last = now
        late = self.deadline is not None and now + 2 * self._slowest >= self.deadline
        return self.signal is not None, late

    def _received(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name


class Watchdog:
    """Ends the process when a step takes too long, after writing every thread's stack.

    A hanging collective cannot be interrupted from Python, so the process leaves at once, with the
    code that asks to be started again.

    :param seconds: between two beats; 0 turns it off.
    :param stacks: the file for the stacks.
    :param ask: called before it leaves, to ask for that start.
    """

    def __init__(self, seconds: float, stacks: Path, ask: Callable[[], None]) -> None:
        self.seconds = seconds
        self.stacks = stacks
        self.ask = ask
        self._beat = time.monotonic()
        self._doing = "starting"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.beat(self._doing)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, doing: str = "training") -> None:
        """The run is alive.

        :param doing: what comes next, for the message.
        """
        self._doing = doing
        self._beat = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            late = time.monotonic() - self._beat
            if late > self.seconds:
                self._leave(late)

    def _leave(self, late: float) -> None:
        message = (
            f"watchdog: no step for {late:.0f} s ({self._doing}), more than "
            f"trainer.watchdog_minutes allows; leaving with code {EXIT_REQUEUE}. Stacks of all "
            f"threads: {self.stacks}\n"
        )
        try:
            with contextlib.suppress(OSError):
                os.write(2, message.encode())
            try:
                with self.stacks.open("a") as file:
                    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}")
                    file.flush()
                    faulthandler.dump_traceback(file, all_threads=True)
            except OSError:  # a full disk
                faulthandler.dump_traceback(2, all_threads=True)
            self.ask()
        finally:
            os._exit(EXIT_REQUEUE)
