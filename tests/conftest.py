"""One rendered dataset for the whole session, and runs of the real commands on it."""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from casa_train.io.environment import set_environment

# For the tests and the processes they start, before anything imports torch or transformers: one
# thread a process, since models here are tiny and processes many; no word to a hub, for whose
# answer a test would wait.
set_environment()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# As in `environment`, so that what the project starts with its own environment can be a fork too.
os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter  # noqa: E402

from tests.helpers.commands import prepare_data  # noqa: E402
from tests.helpers.fork_server import STARTED, available, install  # noqa: E402
from tests.helpers.once import once  # noqa: E402

# What a test for a GPU may miss where there must be one: a package, a newer card.
OPTIONAL = ("flash-attn", "compute capability 8.9")


def pytest_collection_finish() -> None:
    """A collection by a test, or by Python in one, need not go through all that is imported; those
    by Python are seldom, which saves a twentieth of the time of tests that make many objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Where GPU_REQUIRED is 1 a test for a GPU that skips itself has failed, unless what it wants
    is optional.
    """
    report = (yield).get_result()  # type: ignore[misc]
    if report.skipped and item.get_closest_marker("gpu") and os.environ.get("GPU_REQUIRED") == "1":
        reason = str(report.longrepr[2])
        if not any(word in reason.replace("_", "-") for word in OPTIONAL):
            report.outcome = "failed"
            report.longrepr = f"GPU_REQUIRED is 1, but this skipped itself: {reason}"


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic dataset: train, validation, tokenizer."""
    return once(tmp_path_factory, "synthetic", prepare_data)


@pytest.fixture(autouse=True, scope="session")
def forking() -> Iterator[None]:
    """Commands are forks of one process that imported what is heavy; see fork_server.py."""
    worker = "PYTEST_XDIST_TESTRUNUID" in os.environ
    owner = os.getppid() if worker else os.getpid()
    with install(str(owner), owner) if available() else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def fresh(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under `@pytest.mark.fresh` every command is a new process."""
    if request.node.get_closest_marker("fresh"):
        monkeypatch.setattr(subprocess, "Popen", STARTED)


@pytest.fixture(autouse=True)
def no_worker_left_behind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A DataLoader that ends as garbage waits five seconds for each of its workers: the collector
    first ends the thread that would tell them to leave.
    """
    started: weakref.WeakSet[Any] = weakref.WeakSet()
    start = _MultiProcessingDataLoaderIter.__init__

    def noted(self: Any, loader: Any) -> None:
        started.add(self)
        start(self, loader)

    monkeypatch.setattr(_MultiProcessingDataLoaderIter, "__init__", noted)
    yield
    for iterator in started:
        iterator._shutdown_workers()


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A process that was a rank in one test would be one to whatever library the next one calls."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    left = {name: value for name in names if (value := os.environ.get(name)) != before[name]}
    for name in left:
        os.environ.pop(name, None)
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        dist.destroy_process_group()
    assert not left and not joined, f"left behind: {left}, a process group: {joined}"
