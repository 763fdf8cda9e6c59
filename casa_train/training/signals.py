"""How a run is asked to leave before its last step: signals and a time limit."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

# EX_TEMPFAIL: the run saved what it had and wants to be started again.
EXIT_REQUEUE = 75
# SLURM sends one of these before it takes a job's nodes away.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop; ranks then agree on a step (`Stopping`).

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
