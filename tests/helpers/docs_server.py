"""Runs many commands for the price of one start: a process imports what is heavy, then forks.

Each command is a child of its own, with its own arguments, output and folder, as a fresh process
would be; only the seconds of importing torch and its friends are saved.

    python -m tests.helpers.docs_server

reads one JSON list a line: a module's name and its arguments, or "-c" and code; answers with one
JSON object a line.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.helpers.commands import ROOT, environment

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "hydra", "casa_train.train")


@dataclass
class Done:
    """How a command ended."""

    code: int
    output: str
    """What it printed, errors among it."""


class ForkServer:
    """The side of the tests.

    :param folder: where commands run.
    """

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.docs_server"],
            cwd=folder,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, *arguments: str) -> Done:
        """Runs `python -m module arguments`; with "-c", `python -c arguments`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([module, *arguments]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the fork server ended with {self.process.wait()}"
        return Done(**json.loads(answer))

    def close(self) -> None:
        self.process.communicate(timeout=60)


@contextlib.contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """A server whose commands run in a folder."""
    server = ForkServer(folder)
    try:
        yield server
    finally:
        server.close()


def serve() -> None:
    """Answers until its input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for name in HEAVY:
        importlib.import_module(name)
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            code = _in_a_child(json.loads(line), output.fileno())
            output.seek(0)
            text = output.read().decode(errors="replace")
        answers.write(json.dumps({"code": code, "output": text}) + "\n")
        answers.flush()


def _in_a_child(command: Sequence[str], output: int) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        code = _run(command[0], list(command[1:]))
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # nothing of the server's own may be finished here


def _run(module: str, arguments: list[str]) -> int:
    """The exit code of a module or of code, run as the main program."""
    if sys.path[0] != os.getcwd():
        sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        if module == "-c":
            main: dict[str, Any] = {"__name__": "__main__"}
            exec(compile(arguments[0], "<code>", "exec"), main)
        else:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as leave:
        if isinstance(leave.code, str):
            print(leave.code, file=sys.stderr)
            return 1
        return leave.code or 0
    return 0


if __name__ == "__main__":
    assert str(ROOT) in os.environ["PYTHONPATH"]
    serve()
