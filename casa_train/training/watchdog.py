"""A watchdog for hangs: a step that takes too long ends the run and tells where each rank is."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from pathlib import Path
from typing import Protocol

from casa_train.config.schema import TrainerConfig
from casa_train.distributed.ranks import Ranks
from casa_train.metrics.sinks.base import Record
from casa_train.training.hooks import Hook
from casa_train.training.signals import EXIT_REQUEUE
from casa_train.training.state import Progress


class LastWords(Protocol):
    """Leaves word that the run wants to be started again; see `run.last_words`."""

    def leave(self, reason: str) -> None: ...


class Heartbeat:
    """When the run last went forward, and what it does since.

    Whatever takes long calls it with what comes next: saves, validations, the memory probe.
    """

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.doing = "starting"

    def __call__(self, doing: str = "training") -> None:
        self.doing = doing
        self.last = time.monotonic()


class Watchdog(Hook):
    """Ends the process when a step takes too long, after writing every thread's stack.

    A hanging collective cannot be interrupted from Python, so the process leaves at once, with the
    code that asks to be started again.

    :param run_dir: takes a file of this rank for the stacks.
    :param last_words: written before it leaves.
    """

    def __init__(
        self,
        config: TrainerConfig,
        ranks: Ranks,
        heartbeat: Heartbeat,
        run_dir: Path,
        last_words: LastWords,
    ) -> None:
        self.seconds = 60 * config.watchdog_minutes
        self.heartbeat, self.last_words = heartbeat, last_words
        self.stacks = run_dir / f"stacks_{ranks.rank}.txt"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, progress: Progress) -> None:
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.heartbeat(self.heartbeat.doing)
            self._thread.start()

    def after_step(self, record: Record) -> bool:
        self.heartbeat()
        return False

    def after_save(self, step: int) -> None:
        self.heartbeat()

    def after_failed_save(self, step: int) -> None:
        self.heartbeat()

    def close(self, reason: str | None) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self.seconds / 4)):
            late = time.monotonic() - self.heartbeat.last
            if late > self.seconds:
                self._leave(late)

    def _leave(self, late: float) -> None:
        message = (
            f"watchdog: no step for {late:.0f} s ({self.heartbeat.doing}), more than "
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
            self.last_words.leave("watchdog")
        finally:
            os._exit(EXIT_REQUEUE)
