"""What runs the stages of gpu_check.py: processes with limits, logs, and what came of them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa_train.io.numbers import GIB

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = re.compile(r".*(?:OutOfMemoryError|out of memory).*")
LAST_LINES = 40  # of a command that failed: an earlier one may have said what it got over


@dataclass(frozen=True)
class Sizes:
    """What differs between a card and a rehearsal.

    :param steps: of the demo; :param every: between two checkpoints; :param kill: the step behind
        which SIGKILL comes, not long after a checkpoint.
    :param demo: overrides of the demo.
    :param experiments: for the stages casa and insertion; :param dry_run: the same two at once.
    :param arms: of each of the two, overrides behind commas by what is said of them.
    :param patience: what limits of time are multiplied with; a CPU may be busy.
    """

    samples: int
    steps: int
    every: int
    kill: int
    demo: Sequence[str]
    experiments: Sequence[str]
    dry_run: Sequence[str]
    step: Sequence[str]
    streaming: Sequence[str]
    stream: Sequence[str]
    attention: Sequence[str]
    arms: Sequence[dict[str, str]]
    patience: float


class Failed(Exception):
    """A stage did not pass; says why."""


@dataclass
class Result:
    """What came of a stage.

    :param said: its key figures, or why it failed.
    :param tried: the command that ran last, and what was chosen for it.
    """

    stage: str
    passed: bool = False
    seconds: float = 0.0
    said: str = ""
    tried: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """:param seconds: its limit, once those are done whose results it `needs`.
    :param work: runs it and returns its key figures in words; raises `Failed`.
    :param timed: wants the machine for itself.
    """

    name: str
    seconds: float
    work: Callable[[Running], str]
    needs: tuple[str, ...] = ()
    timed: bool = False


class Check:
    """All stages of one check, and what came of them.

    :param out: where logs go; :param work: a folder for data, runs and exports.
    :param card: memory of the GPU in bytes; None in a rehearsal.
    :param environment: of every command.
    :param seconds: for all stages together.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        out: Path,
        work: Path,
        sizes: Sizes,
        card: int | None,
        environment: Mapping[str, str],
        seconds: float,
    ) -> None:
        self.stages, self.out, self.work, self.sizes, self.card = stages, out, work, sizes, card
        self.environment = environment
        self.deadline = time.monotonic() + seconds * sizes.patience
        self.results = {stage.name: Result(stage.name) for stage in stages}
        self.done = {stage.name: threading.Event() for stage in stages}
        self.processes: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        """Runs all stages; leaves no process behind."""
        side = [
            threading.Thread(target=self._run_stage, args=[stage], daemon=True)
            for stage in self.stages
            if not stage.timed
        ]
        try:
            for thread in side:
                thread.start()
            for thread in side:
                thread.join()
            for stage in self.stages:
                if stage.timed:
                    self._run_stage(stage)
        finally:
            for process in self.processes:
                kill(process)

    def _run_stage(self, stage: Stage) -> None:
        result = self.results[stage.name]
        for name in stage.needs:
            self.done[name].wait()
        began = time.monotonic()
        try:
            for name in stage.needs:
                if not self.results[name].passed:
                    raise Failed(f"not run: it needs {name}, which failed")
            if began >= self.deadline:
                raise Failed("not run: no time was left; give it more with --minutes")
            end = min(began + stage.seconds * self.sizes.patience, self.deadline)
            result.said = stage.work(Running(self, result, end))
            result.passed = True
        except Failed as error:
            result.said = str(error)
        except Exception as error:  # what a command printed or wrote was not what we expect
            result.said = f"{type(error).__name__}: {error}"
        result.seconds = time.monotonic() - began
        print(f"{stage.name}: {verdict(result)}, {result.seconds:.0f} s: {result.said}", flush=True)
        self.done[stage.name].set()


@dataclass
class Running:
    """A stage at work.

    :param end: of its time, by the monotonic clock.
    """

    check: Check
    result: Result
    end: float

    @property
    def sizes(self) -> Sizes:
        return self.check.sizes

    @property
    def figures(self) -> dict[str, Any]:
        return self.result.figures

    @property
    def log(self) -> Path:
        return self.check.out / f"{self.result.stage}.log"

    def start(self, *words: str, **environment: str) -> subprocess.Popen[bytes]:
        """Starts Python with these words in the checkout; its output goes to the stage's log."""
        command = [sys.executable, *words]
        self.result.tried = shlex.join(["python", *words])
        with self.log.open("a") as log:
            print(f"$ {self.result.tried}", file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**self.check.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.check.processes.append(process)
        return process

    def finish(self, process: subprocess.Popen[bytes]) -> str:
        """The stage's log once the process has ended.

        :raises Failed: by a code that is not 0, or too late.
        """
        limit = self.end - time.monotonic()
        try:
            code = process.wait(max(0.1, limit))
        except subprocess.TimeoutExpired:
            kill(process)
            raise Failed(f"it took longer than its time; {self.log} says how far it came") from None
        kill(process)  # what it may have left
        text = self.log.read_text(errors="replace")
        if code:
            last = text.rpartition("\n$ ")[2] if "\n$ " in text else text
            raise Failed(self.why(last.partition("\n")[2], code))
        return text

    def run(self, *words: str, **environment: str) -> str:
        """`start` and `finish`."""
        return self.finish(self.start(*words, **environment))

    def why(self, text: str, code: int) -> str:
        """:param text: what a command printed that left with `code`."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        short = OUT_OF_MEMORY.search("\n".join(lines[-LAST_LINES:]))
        if short is not None:
            sizes = {"a dry run estimates": self.figures.get("estimated_bytes")}
            sizes["the card has"] = self.check.card
            known = "".join(f"{k} {v / GIB:.1f} GiB; " for k, v in sizes.items() if v)
            said = short.group().strip()[:300]
            return f"out of memory; {known}tried: {self.result.tried}; {said}"
        return f"left with code {code}; {self.log}: {lines[-1][:200] if lines else 'no output'}"

    def benchmark(self, name: str, *words: str) -> dict[str, Any]:
        """What a benchmark measured; all of it becomes the stage's figures, also what it had
        written before it failed.
        """
        file = self.check.out / f"{self.result.stage}.json"
        file.unlink(missing_ok=True)
        found: dict[str, Any] = {}
        try:
            self.run("-m", "casa_train.bench", name, *words, "--json", str(file))
        finally:
            if file.exists():
                found = json.loads(file.read_text())
                self.figures.update(found)
        return found

    def demo(self, directory: str) -> list[str]:
        """The training command of the demo in a directory of its own."""
        data, sizes = self.check.work / "data", self.sizes
        return [
            "-u",  # a killed run has printed what it said
            *("-m", "casa_train", *sizes.demo),
            quoted("model.tokenizer", data / "tokenizer"),
            quoted("data.sources.synthetic.path", data / "train"),
            quoted("data.validation.synthetic.path", data / "validation"),
            quoted("run_dir", self.check.work / directory),
            "parallel.precision=bf16",
            "trainer.deterministic=true",  # on a GPU nothing repeats bit for bit without it
            "trainer.worst_case=true",
            f"trainer.steps={sizes.steps}",
            f"checkpoint.every={sizes.every}",
            f"evaluation.every={sizes.steps}",
            "evaluation.loss_samples=32",
            "metrics.tensorboard=false",
        ]


def quoted(name: str, path: Path) -> str:
    """An override whose value may hold brackets and commas."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"{name}='{escaped}'"


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started, also if it has ended itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def verdict(result: Result) -> str:
    return "passed" if result.passed else "FAILED"
