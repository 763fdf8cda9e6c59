"""CPU threads: that those of torch's pool sleep while they wait, and that each command has as many
as its run asks for. Looked at from within real processes: the OpenMP runtime prints what it read,
and a probe asks torch at the end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_train.bench._benchmark import describe_machine
from casa_train.config.compose import compose_config
from casa_train.config.data_schema import DataConfig
from casa_train.data.loader import PackLoader
from casa_train.data.prepared.plan import Pack
from casa_train.distributed.threads import use_threads
from casa_train.export import background_exports
from tests.helpers.commands import ROOT, TINY, environment, on_data, run

OWN = 2  # what torch would take by itself in the processes below; their runs ask for others
SET_BY_COMMANDS = {"OMP_WAIT_POLICY", "TORCH_CPP_LOG_LEVEL", "DS_ACCELERATOR"}
SET_BY_COMMANDS |= {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
# Python reads this file as it starts: it notes how many threads torch had in the end,
AT_THE_END = """
import atexit, os, sys

def note():
    if "torch" in sys.modules:
        print(sys.modules["torch"].get_num_threads(), file=open(os.environ["PROBE"], "w"))

atexit.register(note)
"""
# or what the OpenMP runtime would read as torch loads, which it does once.
AT_TORCH = """
import os, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), file=open(os.environ["PROBE"], "w"))
            sys.stdout.flush(), os._exit(0)

sys.meta_path.insert(0, Finder())
"""
# A command in a process that begins with another number of threads than its run asks for.
COMMAND = f"""
import runpy, sys, torch
torch.set_num_threads({OWN})
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    print("threads in the end:", torch.get_num_threads())
"""


def probed(
    tmp_path: Path, command: Sequence[object], probe: str, policy: str | None = None
) -> tuple[str, str]:
    """Runs a new Python.

    :param policy: OMP_WAIT_POLICY of its environment.
    :return: what the probe wrote, and all that was printed.
    """
    (tmp_path / "sitecustomize.py").write_text(probe)
    answer = tmp_path / "answer.txt"
    answer.unlink(missing_ok=True)
    env = environment()
    for name in SET_BY_COMMANDS:
        env.pop(name, None)  # the suite and commands called in it set them
    env |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PROBE": str(answer),
        "OMP_NUM_THREADS": str(OWN),
        "OMP_DISPLAY_ENV": "verbose",
        **({} if policy is None else {"OMP_WAIT_POLICY": policy}),
    }
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return answer.read_text().strip(), done.stdout + done.stderr


def spins(printed: str) -> set[str]:
    """How long waiting threads spin, as GNU's OpenMP or another says of each process."""
    found = re.findall(r"(?:GOMP_SPINCOUNT|KMP_BLOCKTIME) ?= ?'?(\w+)", printed)
    assert found, "torch has no OpenMP here, or it printed nothing"
    return set(found)


COMMANDS = {
    "casa_train": ["+experiment=demo", "dry_run=true"],
    "casa_train.export": ["run", "--out", "export"],
    "casa_train.convert": ["kyutai", "checkpoint", "--tree"],
    "casa_train.evaluate": ["run"],
    "casa_train.inspect": ["demo"],
    "casa_train.bench": ["images"],
    "casa_train.caption": ["clip.mp4", "--export", "export"],
    "data_recipes": ["synthetic", "--out", "data", "--samples", 1, "--seed", 1],
}


@pytest.mark.fresh
@pytest.mark.parametrize("module", COMMANDS)
def test_threads_of_every_command_sleep(module: str, tmp_path: Path) -> None:
    found, _ = probed(tmp_path, ["-m", module, *COMMANDS[module]], AT_TORCH)
    assert found == "passive"


def test_those_are_the_commands() -> None:
    """The report computes nothing, and imports no torch."""
    found = {path.parent for path in ROOT.glob("casa_train/**/__main__.py")}
    modules = {".".join(path.relative_to(ROOT).parts) for path in found}
    assert modules - {"casa_train.report"} == COMMANDS.keys() - {"data_recipes"}


def in_the_end(module: str, *arguments: object) -> tuple[int, str]:
    """How many threads torch had at the end of a command, and what that printed."""
    output = run([sys.executable, "-c", COMMAND, module, *map(str, arguments)]).stdout
    return int(output.rpartition("threads in the end: ")[2]), output


@pytest.mark.slow
def test_every_command_obeys_the_run(data_dir: Path, tmp_path: Path) -> None:
    small = [o for o in TINY if not o.startswith(("parallel.threads", "data.workers"))]
    given = [*small, *on_data(data_dir), "trainer.steps=1", "data.workers=1", "name=job"]
    sweep = ["-m", "+experiment=demo", "parallel.threads=3,0", *given]
    # The jobs of a sweep share a process: the second one gets torch's own choice back.
    found, printed = in_the_end("casa_train", *sweep, f"hydra.sweep.dir={tmp_path}")
    assert found == OWN
    assert re.findall(r"fp32, (\d+) threads", printed) == ["3", str(OWN)]
    for asked, wanted in ((3, 3), (0, OWN)):
        (job,) = tmp_path.glob(f"job,*threads={asked},*")
        for module, *arguments in (
            ("casa_train.export", job, "--out", job / "export"),
            ("casa_train.evaluate", job),
            ("casa_train.inspect", job, "--out", tmp_path / "page.html"),
        ):
            assert in_the_end(module, *arguments)[0] == wanted, (module, asked)
    # Both jobs in one process, each with its own number; the one of three threads comes last.
    for path in tmp_path.glob("job,*/evaluation.json"):
        path.unlink()
    again = ["--sweep", tmp_path, "--only", "job,*"]
    found, printed = in_the_end("casa_train.evaluate", *again)
    assert found == 3 and printed.count("step 1, exact match") == 2


@pytest.mark.fresh
@pytest.mark.slow
def test_a_new_process_has_its_threads_and_they_sleep(data_dir: Path, tmp_path: Path) -> None:
    small = [o for o in TINY if not o.startswith("parallel.threads")]
    given = [*small, *on_data(data_dir), "trainer.steps=1", "parallel.threads=3"]
    command = ["-m", "casa_train", "+experiment=demo", *given, f"run_dir={tmp_path / 'run'}"]
    found, printed = probed(tmp_path, command, AT_THE_END)
    assert found == "3" and spins(printed) <= {"0", "0ms"}


@pytest.mark.slow
def test_experiments_of_a_benchmark_have_their_own() -> None:
    small = [o for o in TINY if not o.startswith(("trainer.", "data.workers", "parallel.threads"))]
    arms = ["demo,parallel.threads=3", "demo,parallel.threads=4"]
    options = ["--steps", 1, "--warm-up", 0, "--set", *small]
    found, printed = in_the_end("casa_train.bench", "step", *arms, *options)
    assert found == 4 and "threads [3, 4], " in printed


@pytest.mark.fresh
@pytest.mark.slow
def test_who_asks_for_spinning_gets_it(tmp_path: Path) -> None:
    sets = "from casa_train.io.environment import set_environment; set_environment(); import torch"
    loads = ["-c", sets]
    assert spins(probed(tmp_path, loads, AT_THE_END)[1]) <= {"0", "0ms"}
    assert not spins(probed(tmp_path, loads, AT_THE_END, "active")[1]) & {"0", "0ms"}


@pytest.mark.fresh
@pytest.mark.slow
def test_a_library_leaves_the_environment_as_it_is(tmp_path: Path) -> None:
    imports = "import casa_train, casa_train.bench.step, casa_train.train, os"
    code = f"{imports}; assert not {SET_BY_COMMANDS} & os.environ.keys()"
    _, printed = probed(tmp_path, ["-c", code], AT_THE_END)
    assert not spins(printed) & {"0", "0ms"}


@pytest.fixture
def threads() -> Iterator[int]:
    """As many threads as this process has, which it gets back."""
    own = torch.get_num_threads()
    yield own
    use_threads(0)
    assert torch.get_num_threads() == own


def test_zero_gives_torchs_choice_back(threads: int) -> None:
    for asked in (threads + 2, threads + 1, 0, threads + 2):
        use_threads(asked)
        assert torch.get_num_threads() == (asked or threads)


class Packs:
    """In place of a planner: two packs."""

    def __init__(self, data: DataConfig) -> None:
        self.data, self.seed = data, 3

    def __iter__(self) -> Iterator[Pack]:
        return (Pack(i, (), 0, 0) for i in range(2))


class CountsThreads:
    """In place of a materializer."""

    def __getitem__(self, pack: Pack) -> Any:
        return torch.get_num_threads()


def test_loader_processes_have_one_thread(threads: int) -> None:
    use_threads(threads + 2)
    counts: Any = CountsThreads()
    inside: Any = Packs(DataConfig(packs_per_step=2, workers=1))
    assert PackLoader(inside, counts).next_step() == [1, 1]
    alone: Any = Packs(DataConfig(packs_per_step=1, workers=0))
    assert PackLoader(alone, counts).next_step() == [threads + 2]


def test_an_export_in_the_background_takes_no_more_than_there_are_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for cores, wanted in ((2, "2"), (64, "4")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert background_exports._environment()["OMP_NUM_THREADS"] == wanted


def test_the_demo_has_one_thread() -> None:
    assert compose_config(["+experiment=demo"]).parallel.threads == 1
    assert compose_config(["+experiment=helium_casa"]).parallel.threads == 0


def test_a_single_thread_is_no_threads() -> None:
    facts = {"device": "a CPU", "dtype": "fp32", "torch": "2", "transformers": "5"}
    assert "a CPU, 1 thread, fp32" in describe_machine({**facts, "threads": 1})
