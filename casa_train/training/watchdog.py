"""A watchdog for hangs: a step that takes too long ends the run and tells where each rank is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from casa_train.training.signals import EXIT_REQUEUE


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
        self._last_heartbeat = time.monotonic()
        self._doing = "starting"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.heartbeat(self._doing)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def heartbeat(self, doing: str = "training") -> None:
        """The run is alive.

        :param doing: what comes next, for the message.
        """
        self._doing = doing
        self._last_heartbeat = time.monotonic()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            late = time.monotonic() - self._last_heartbeat
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
