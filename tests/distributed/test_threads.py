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
from casa_train.data.loader import PackLoader
from casa_train.data.prepared.plan import Pack
from casa_train.distributed.threads import use_threads
from casa_train.export import background_exports
from tests.helpers.commands import ROOT, TINY, environment, on_data, train_command

OWN = 2  # what torch would take by itself in the processes below; their runs ask for others
PROBE = """
import atexit, os, sys

def note():
    if "torch" in sys.modules:
        with open(os.environ["PROBE"], "w") as file:
            print(sys.modules["torch"].get_num_threads(), file=file)

atexit.register(note)
"""


def probed(tmp_path: Path, command: Sequence[str], policy: str | None = None) -> tuple[int, str]:
    """Runs a command.

    :param policy: OMP_WAIT_POLICY of its environment.
    :return: how many threads its torch had in the end, and all that it printed.
    """
    (tmp_path / "sitecustomize.py").write_text(PROBE)
    answer = tmp_path / "threads.txt"
    answer.unlink(missing_ok=True)
    env = environment()
    for name in ("OMP_WAIT_POLICY", "TORCH_CPP_LOG_LEVEL"):
        env.pop(name, None)  # the suite and commands called in it set them
    env |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PROBE": str(answer),
        "OMP_NUM_THREADS": str(OWN),
        "OMP_DISPLAY_ENV": "verbose",
        **({} if policy is None else {"OMP_WAIT_POLICY": policy}),
    }
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return int(answer.read_text()), done.stdout + done.stderr


def module(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, arguments)]


def spins(printed: str) -> set[str]:
    """How long waiting threads spin, as GNU's OpenMP or another says of each process."""
    found = re.findall(r"(?:GOMP_SPINCOUNT|KMP_BLOCKTIME) ?= ?'?(\w+)", printed)
    assert found, "torch has no OpenMP here, or it printed nothing"
    return set(found)


@pytest.mark.fresh
@pytest.mark.slow
def test_every_command_obeys_the_run(data_dir: Path, tmp_path: Path) -> None:
    small = [o for o in TINY if not o.startswith(("parallel.threads", "data.workers"))]
    given = [*small, *on_data(data_dir), "trainer.steps=1", "data.workers=1", "name=job"]
    sweep = ["-m", "+experiment=demo", "parallel.threads=3,0", *given]
    # The jobs of a sweep share a process: the second one gets torch's own choice back.
    found, printed = probed(tmp_path, train_command([*sweep, f"hydra.sweep.dir={tmp_path}"]))
    assert found == OWN
    assert spins(printed) <= {"0", "0ms"}
    assert re.findall(r"fp32, (\d+) threads", printed) == ["3", str(OWN)]
    (three,) = tmp_path.glob("job,*threads=3,*")
    (own,) = tmp_path.glob("job,*threads=0,*")
    for wanted, *command in (
        (3, "casa_train.export", three, "--out", three / "export"),
        (3, "casa_train.evaluate", three),
        (OWN, "casa_train.inspect", own, "--out", tmp_path / "page.html"),
    ):
        found, printed = probed(tmp_path, module(*command))
        assert found == wanted, command
        assert spins(printed) <= {"0", "0ms"}, command
    # Both jobs in one process, each with its own number; the one of three threads comes last.
    (three / "evaluation.json").unlink()
    again = module("casa_train.evaluate", "--sweep", tmp_path, "--only", "job,*")
    found, printed = probed(tmp_path, again)
    assert found == 3 and printed.count("step 1, exact match") == 2


@pytest.mark.fresh
@pytest.mark.slow
def test_benchmarks_and_recipes_sleep_too(data_dir: Path, tmp_path: Path) -> None:
    small = [o for o in TINY if not o.startswith(("trainer.", "data.workers", "parallel.threads"))]
    arms = ["demo,parallel.threads=3", "demo,parallel.threads=4"]
    options = ["--steps", 1, "--warm-up", 0, "--set", *small]
    found, printed = probed(tmp_path, module("casa_train.bench", "step", *arms, *options))
    assert found == 4 and "threads [3, 4], " in printed
    assert spins(printed) <= {"0", "0ms"}
    rendered = ["--out", tmp_path / "data", "--samples", 8, "--seed", 1, "--workers", 1]
    _, printed = probed(tmp_path, module("data_recipes", "synthetic", *rendered))
    assert spins(printed) <= {"0", "0ms"}


@pytest.mark.fresh
@pytest.mark.slow
def test_who_asks_for_spinning_gets_it(tmp_path: Path) -> None:
    sets = "from casa_train.io.environment import set_environment; set_environment(); import torch"
    loads = [sys.executable, "-c", sets]
    assert spins(probed(tmp_path, loads)[1]) <= {"0", "0ms"}
    assert not spins(probed(tmp_path, loads, policy="active")[1]) & {"0", "0ms"}


@pytest.mark.slow
def test_a_library_leaves_torch_as_it_is(tmp_path: Path) -> None:
    imports = "import casa_train, casa_train.bench.step, casa_train.train, os"
    absent = "assert not {'OMP_WAIT_POLICY', 'TORCH_CPP_LOG_LEVEL'} & os.environ.keys()"
    _, printed = probed(tmp_path, [sys.executable, "-c", f"{imports}; {absent}"])
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


class CountsThreads:
    """In place of a materializer."""

    def __getitem__(self, pack: Pack) -> Any:
        return torch.get_num_threads()


def test_loader_processes_have_one_thread(threads: int) -> None:
    use_threads(threads + 2)
    packs: Any = [Pack(i, (), 0, 0) for i in range(2)]
    counts: Any = CountsThreads()
    assert PackLoader(packs, counts, packs_per_step=2, workers=1).next_step() == [1, 1]
    assert PackLoader(packs, counts, packs_per_step=1).next_step() == [threads + 2]


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
