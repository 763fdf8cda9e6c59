"""Exports of a run's own checkpoints while it trains, one process in the background at a time.

The process is `python -m casa_train.export RUN --step N` at low priority, without a GPU and outside
the run's process group, so training neither waits for it nor fails with it. Its checkpoint stays
until it is done. It ends with the run: what was not finished then, the next attempt exports.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from casa_train.checkpoint.saved import saved_steps
from casa_train.config.schema import ExportConfig
from casa_train.distributed.ranks import of_no_rank
from casa_train.export.writer import exported_step
from casa_train.metrics.sinks.base import Record
from casa_train.run.layout import CHECKPOINTS, EXPORT_LOG, EXPORTS
from casa_train.training.hooks import Hook
from casa_train.training.state import Progress
from casa_train.training.stopping import StopFlags

ROOT = Path(__file__).resolve().parents[2]
THREADS = 4  # at most, where parallel.threads is 0: the run's ranks and loaders want the others


class BestStep(Protocol):
    """Knows the step of the best validation so far; 0: there was none."""

    step: int


class BackgroundExports(Hook):
    """Exports that `config` asks for; the first rank alone has one.

    :param log: prints one line for the user.
    """

    def __init__(
        self, run_dir: Path, config: ExportConfig, log: Callable[[str], None], best: BestStep
    ) -> None:
        self.run_dir, self.config, self.log, self.best = run_dir, config, log, best
        self._waiting: dict[str, int] = {}  # name of the export: step
        self._running: tuple[str, int, subprocess.Popen[bytes]] | None = None

    def begin(self, progress: Progress) -> None:
        """Asks for what earlier attempts of the run left undone."""
        for step in saved_steps(self.run_dir / CHECKPOINTS):
            self.after_save(step)

    def after_step(self, record: Record) -> bool:
        self.proceed()
        return False

    def after_save(self, step: int) -> None:
        """A checkpoint was committed: exports it where it is to be, unless that has been done."""
        if self.config.every and step % self.config.every == 0:
            self._ask(f"step_{step}", step)
        if self.config.best and step == self.best.step:
            self._ask("best", step)  # an older best that waits is not the best any more
        self.proceed()

    def after_failed_save(self, step: int) -> None:
        if self.config.best and step == self.best.step:
            self.log(f"warning: step {step} is the best so far, but exports/best stays as it was")
        self.proceed()

    def close(self, reason: str | None) -> None:
        """A run that leaves early gives up what is not done; else `finish` waits for it."""
        if reason is not None:
            self.give_up()

    def pinned(self) -> set[int]:
        """Steps whose checkpoints must stay."""
        running = {self._running[1]} if self._running is not None else set()
        return running | set(self._waiting.values())

    def proceed(self) -> None:
        """Notes what has ended and starts what waits; returns at once."""
        if self._running is not None:
            name, step, process = self._running
            if process.poll() is None:
                return
            self._running = None
            if process.returncode == 0:
                self.log(f"exported step {step} to {self._target(name)}")
            else:
                self.log(
                    f"the export of step {step} to {self._target(name)} failed (code "
                    f"{process.returncode}), which ends nothing; see {self.run_dir / EXPORT_LOG}. "
                    "The run's next start tries again"
                )
        if self._waiting:
            name = next(iter(self._waiting))
            step = self._waiting.pop(name)
            try:
                self._running = name, step, self._start(name, step)
            except OSError as error:  # a full disk, no memory for a process
                self.log(f"the export of step {step} could not be started ({error})")

    def finish(self, stop: StopFlags) -> bool:
        """Waits for every export.

        :param stop: asked all along; once it says so, what is left is given up.
        :return: whether nothing was given up.
        """
        self.proceed()
        if self._running is not None:
            self.log(f"waiting for exports of steps {sorted(self.pinned())}")
        while self._running is not None and not any(stop.flags()):
            time.sleep(0.2)
            self.proceed()
        done = self._running is None
        self.give_up()
        return done

    def give_up(self) -> None:
        """Ends what runs; the run's next start does it again."""
        if self._running is not None:
            steps = sorted(self.pinned())
            process = self._running[2]
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self.log(f"gave up the exports of steps {steps}; the same command makes them again")
        self._running, self._waiting = None, {}

    def _ask(self, name: str, step: int) -> None:
        running = self._running is not None and self._running[:2] == (name, step)
        if not running and exported_step(self._target(name)) != step:
            self._waiting.pop(name, None)
            self._waiting[name] = step

    def _target(self, name: str) -> Path:
        return self.run_dir / EXPORTS / name

    def _start(self, name: str, step: int) -> subprocess.Popen[bytes]:
        export = ["casa_train.export", str(self.run_dir), "--step", str(step)]
        export += ["--out", str(self._target(name))]
        command = [sys.executable, "-m", "casa_train.export.child", str(os.getpid()), *export]
        with (self.run_dir / EXPORT_LOG).open("ab") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {shlex.join(export)}\n".encode())
            log.flush()
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,
            )


def _environment() -> dict[str, str]:
    """This process's environment for one that is no rank and sees no GPU."""
    kept = of_no_rank(os.environ)
    threads = min(THREADS, len(os.sched_getaffinity(0)))
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    more = {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(threads)}
    return {**kept, **more}
