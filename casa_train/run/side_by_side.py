"""Several jobs of a sweep at once, each in a process with an output of its own.

Separate processes because a run is made for one: its threads, seeds, process group, signals and
exit code are the process's, and one that is killed takes nothing with it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from casa_train.config.schema import Config
from casa_train.distributed.ranks import of_no_rank
from casa_train.io.numbers import duration
from casa_train.run.directory import record_failure
from casa_train.run.layout import CONSOLE_FILE
from casa_train.run.lock import unwritable

ROOT = Path(__file__).resolve().parents[2]
USER_CAN_MEND = 2
BETWEEN_LOOKS = 0.1  # seconds
BETWEEN_INTERRUPTS = 20.0  # seconds


class Signalled(Protocol):
    """The name of the signal that asked this process to leave; None: there was none."""

    signal: str | None


@dataclass(frozen=True)
class Job:
    """A run to start.

    :param arguments: behind `python -m casa_train`.
    :param finished: whether it needs no start any more.
    """

    run_dir: Path
    arguments: Sequence[str]
    finished: Callable[[], bool]


@dataclass
class Outcome:
    """The run directories of the jobs that did not end well.

    :param left: those that saved and want to be started again, or never were started.
    :param failed: by what the user can mend; :param crashed: otherwise, or were killed.
    """

    left: list[Path] = field(default_factory=list)
    failed: list[Path] = field(default_factory=list)
    crashed: list[Path] = field(default_factory=list)


@dataclass(frozen=True)
class _Running:
    job: Job
    name: str
    process: subprocess.Popen[bytes]
    place: Mapping[str, str]
    began: float
    before: int  # bytes that its output had when it was started


class Pool:
    """Runs jobs, one at each place.

    :param places: what the environment of a job has more; as many jobs run at once.
    :param stop: once it has a signal, every job gets it, and no other is started.
    :param requeue: the exit code of a run that left early; none is started after it.
    :param log: prints a line; :param complain: prints why a job failed.
    """

    def __init__(
        self,
        places: Sequence[Mapping[str, str]],
        stop: Signalled,
        requeue: int,
        log: Callable[[str], None],
        complain: Callable[[str], None],
    ) -> None:
        self.free, self.stop, self.requeue = deque(places), stop, requeue
        self.log, self.complain = log, complain
        self.outcome = Outcome()
        self._running: list[_Running] = []
        self._told: str | None = None  # the signal that the jobs have been sent

    def run(self, jobs: Sequence[Job]) -> Outcome:
        """Returns when all have ended, or those that ran when it was time to leave.

        :raises KeyboardInterrupt: after every job has had the interrupt, too, and ended.
        """
        waiting = deque((f"job {n} of {len(jobs)}", job) for n, job in enumerate(jobs, 1))
        try:
            while self._running or (waiting and not self._leaving()):
                while waiting and self.free and not self._leaving():
                    self._begin(*waiting.popleft())
                if self._running:
                    time.sleep(BETWEEN_LOOKS)
                self._pass_on()
                for running in [r for r in self._running if r.process.poll() is not None]:
                    self._end(running)
        except KeyboardInterrupt:
            self._interrupt()
            raise
        finally:
            self._signal(signal.SIGTERM)  # nobody would wait for what still runs
        if waiting:
            self.log(
                f"not begun: {len(waiting)} of {len(jobs)} jobs; the same command goes on with them"
            )
            self.outcome.left += [job.run_dir for _, job in waiting]
        return self.outcome

    def _leaving(self) -> bool:
        return self.stop.signal is not None or bool(self.outcome.left)

    def _begin(self, name: str, job: Job) -> None:
        if job.finished():
            self.log(f"{name} was finished before: {_shown(job.run_dir)}")
            return
        command = ["-m", "casa_train", *job.arguments]
        console = job.run_dir / CONSOLE_FILE
        place = self.free.popleft()
        try:
            job.run_dir.mkdir(parents=True, exist_ok=True)
            with console.open("ab") as file:
                before = file.tell()
                at = time.strftime("%Y-%m-%d %H:%M:%S")
                file.write(f"{at} {shlex.join(['python', *command])}\n".encode())
                file.flush()
                process = subprocess.Popen(
                    [sys.executable, "-m", "casa_train.run.job_process", str(os.getpid())]
                    + list(job.arguments),
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**environment_of_jobs(), **place},
                    start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
                )
        except OSError as error:
            self.free.appendleft(place)
            self.outcome.failed.append(job.run_dir)
            self.complain(f"job {job.run_dir}: {unwritable(job.run_dir, error)}")
            return
        self._running.append(_Running(job, name, process, place, time.monotonic(), before))
        self.log(f"{name} begins: {_shown(job.run_dir)}")

    def _end(self, running: _Running) -> None:
        self._running.remove(running)
        self.free.append(running.place)
        code, run_dir = running.process.returncode, running.job.run_dir
        took = duration(time.monotonic() - running.began)
        if code == 0:
            self.log(f"{running.name} is done after {took}: {_shown(run_dir)}")
            return
        if code == self.requeue or (self._told and code == -signal.Signals[self._told]):
            self.log(f"{running.name} left early after {took}: {_shown(run_dir)}")
            self.outcome.left.append(run_dir)
            return
        self.log(f"{running.name} failed after {took}, exit code {code}: {_shown(run_dir)}")
        message = last_words(run_dir / CONSOLE_FILE, running.before, code)
        record_failure(run_dir, message)
        (self.outcome.failed if code == USER_CAN_MEND else self.outcome.crashed).append(run_dir)
        self.complain(f"job {_shown(run_dir)}: {message}")

    def _interrupt(self) -> None:
        """Passes Ctrl-C on, again and again until every job has ended: Python drops an interrupt
        that meets a `__del__`. A second one from the user kills.
        """
        try:
            ended = False
            while not ended:
                self._signal(signal.SIGINT)
                until = time.monotonic() + BETWEEN_INTERRUPTS
                while not ended and time.monotonic() < until:
                    ended = all(running.process.poll() is not None for running in self._running)
                    time.sleep(BETWEEN_LOOKS)
        except KeyboardInterrupt:
            self._signal(signal.SIGKILL)

    def _pass_on(self) -> None:
        name = self.stop.signal
        if name is not None and name != self._told:
            self._told = name
            self._signal(signal.Signals[name])
            self.log(f"{name}: passed on to the jobs, which save and leave")

    def _signal(self, number: signal.Signals) -> None:
        for running in self._running:
            with contextlib.suppress(ProcessLookupError):
                running.process.send_signal(number)


def _shown(run_dir: Path) -> str:
    """As one would write it here: below this folder from here, elsewhere whole."""
    below = os.path.relpath(run_dir)
    return str(run_dir) if below.startswith(os.pardir) else below


def environment_of_jobs() -> dict[str, str]:
    """This process's environment for a run that is alone and imports this very code.

    What the user told DeepSpeed (DS_ACCELERATOR and the like) and SLURM's job are the job's, too.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {n: value for n, value in os.environ.items() if n.startswith(("SLURM_", "DS_"))}
    return {**of_no_rank(os.environ), **own, "PYTHONPATH": path}


def last_words(console: Path, offset: int, code: int) -> str:
    """Why a job failed: its error message, or the last line that it printed.

    :param offset: where in its output this start of it begins.
    :param code: its exit code, as subprocess has it.
    """
    try:
        with console.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode(errors="replace").splitlines()[1:]
    except OSError as error:
        lines = [f"its output cannot be read: {error}"]
    errors = [n for n, line in enumerate(lines) if line.startswith("error: ")]
    if code == USER_CAN_MEND and errors:
        return "\n".join(lines[errors[-1] :]).removeprefix("error: ").strip()
    printed = [line.strip() for line in lines if line.strip()]
    last = printed[-1] if printed else "it printed nothing"
    if code < 0:
        name = signal.Signals(-code).name
        why = " (often by the system, for want of memory)" if name == "SIGKILL" else ""
        return f"killed by {name}{why}; its last line: {last}"
    return f"crashed with exit code {code}: {last}; see {console}"


def at_once(wanted: int | None, configs: Sequence[Config | None], cores: int, gpus: int) -> int:
    """How many jobs run at once.

    :param wanted: None: one a GPU, or as many as the cores hold the threads of.
    :param configs: of the jobs; None: one that does not hold, whose job says so at once.
    """
    if wanted is None:
        threads = (threads_of(config, cores) for config in configs if config is not None)
        wanted = gpus or cores // max(threads, default=1)
    return max(1, min(wanted, len(configs)))


def threads_of(config: Config, cores: int) -> int:
    """CPU threads that a job computes with, at most a core each."""
    own = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return min(
        cores, config.parallel.threads or (int(own) if own.isdecimal() and int(own) else cores)
    )


def places(count: int, gpus: int) -> list[dict[str, str]]:
    """What the environment of each of so many jobs has more: a GPU, or nothing where there is none.

    :param gpus: that this process sees; more jobs than GPUs share them evenly.
    """
    if not gpus:
        return [{} for _ in range(count)]
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    seen = [x.strip() for x in named.split(",")] if named else [str(n) for n in range(gpus)]
    return [{"CUDA_VISIBLE_DEVICES": seen[n % gpus]} for n in range(count)]
