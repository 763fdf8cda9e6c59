"""Runs that repeat bit for bit, and garbage that is collected on a schedule without a leak."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from casa_train.config.schema import Config, run_fields
from casa_train.data.transfer import to_device
from casa_train.distributed.determinism import WORKSPACE, set_determinism
from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.training.garbage import ScheduledCollection
from casa_train.training.state import Progress
from tests.helpers.commands import TINY, on_data, run, train_command
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs
from tests.helpers.variants import build, gradients_of


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(WORKSPACE, raising=False)
    # Other tests of this process may have started CUDA.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    yield
    set_determinism(False)
    os.environ.pop(WORKSPACE, None)


def test_the_switch_sets_what_torch_asks_for_and_takes_it_back() -> None:
    set_determinism(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert os.environ[WORKSPACE] == ":4096:8"
    set_determinism(False)  # the next job of a sweep
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_environment_that_contradicts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, ":0:0")
    set_determinism(False)
    with pytest.raises(UserError, match="trainer.deterministic is true, but .*=:0:0; expected"):
        set_determinism(True)


def test_it_belongs_to_what_determines_a_run() -> None:
    fields = run_fields(Config())
    assert fields["trainer.deterministic"] is False
    for free in ("trainer.gc_every", "trainer.worst_case", "parallel.activation_checkpointing"):
        assert free not in fields


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["casa", "insertion", "gated_cross_attention"])
def test_gradients_repeat_on_a_gpu(variant: str, dtype: torch.dtype) -> None:
    code = (
        "import torch; from tests.distributed.test_determinism import check_gradients_repeat;"
        f"check_gradients_repeat({variant!r}, {dtype}, torch.device('cuda'))"
    )
    # Its own process: what is deterministic is settled when CUDA starts.
    run([sys.executable, "-c", code], gpu=True)


def test_the_check_of_gradients_sees_one_that_differs() -> None:
    check_gradients_repeat("casa", torch.float32, torch.device("cpu"))
    with pytest.raises(AssertionError):
        check_gradients_repeat("casa", torch.float32, torch.device("cpu"), noise=1e-6)


def check_gradients_repeat(
    variant: str, dtype: torch.dtype, device: torch.device, noise: float = 0.0
) -> None:
    """Works through a pack three times.

    :param noise: by how much random numbers change the logits.
    :raises AssertionError: its gradients are not the same each time.
    """
    set_determinism(True)
    model = build(variant, dtype=dtype).to(device).train()
    inputs = packed_inputs(fill(HARD_PACK * 8))
    inputs.logits_index = torch.arange(len(inputs.input_ids))
    inputs, _ = to_device(inputs, inputs.input_ids, device)
    found = []
    for _ in range(3):
        model.zero_grad()
        logits = model(packed=inputs).logits.float()
        (logits + noise * torch.randn_like(logits)).pow(2).sum().backward()
        found.append(gradients_of(model))
    for other in found[1:]:
        assert all(torch.equal(gradient, other[name]) for name, gradient in found[0].items())


RUNS_AND_TELLS = """
import torch
from casa_train.training import loop
step = loop.Trainer.train_step
def told(*arguments):
    print("deterministic", torch.are_deterministic_algorithms_enabled())
    return step(*arguments)
loop.Trainer.train_step = told
from casa_train.__main__ import run
raise SystemExit(run())
"""


@pytest.mark.slow
def test_every_job_of_a_sweep_trains_as_its_configuration_says(
    data_dir: Path, tmp_path: Path
) -> None:
    """What torch is told holds in the steps themselves, and the next job takes it back."""
    small = ["+experiment=demo", *TINY, *on_data(data_dir), "trainer.steps=1"]
    sweep = ["-m", f"hydra.sweep.dir={tmp_path}", "trainer.deterministic=true,false"]
    done = run([sys.executable, "-c", RUNS_AND_TELLS, *small, *sweep])
    assert re.findall(r"deterministic (\w+)", done.stdout) == ["True", "False"], done.stdout
    assert {path.name for path in tmp_path.glob("*/metrics.jsonl")} == {"metrics.jsonl"}


def _collects(queue: multiprocessing.Queue[bool]) -> None:
    queue.put(gc.isenabled())


def test_garbage_is_collected_at_its_steps_alone_and_by_forked_processes_as_ever() -> None:
    class Cycle:
        alive = 0

        def __init__(self) -> None:
            self.itself = self
            Cycle.alive += 1

        def __del__(self) -> None:
            Cycle.alive -= 1

    collection = ScheduledCollection(every=3)
    collection.begin(Progress())
    try:
        assert not gc.isenabled()
        counts = []
        for step in range(1, 7):
            Cycle()
            assert collection.after_step({"step": step}) is False
            counts.append(Cycle.alive)
        assert counts == [1, 2, 0, 1, 2, 0]
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=_collects, args=(queue,))
        process.start()
        assert queue.get(timeout=30)
        process.join()
    finally:
        collection.close(None)
    assert gc.isenabled() and gc.get_freeze_count() == 0
    ScheduledCollection(every=0).begin(Progress())
    assert gc.isenabled()


@pytest.mark.slow
def test_two_hundred_steps_leave_nothing_behind(data_dir: Path, tmp_path: Path) -> None:
    overrides = [
        "+experiment=demo",
        *TINY,
        *on_data(data_dir),
        f"run_dir={tmp_path}",
        "trainer.steps=200",
        "trainer.gc_every=50",
        "checkpoint.every=1000",
    ]
    run(train_command(overrides))
    memory = [record["memory_bytes"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert len(memory) == 200
    # Resident bytes of the process; caches fill until then. 50 kB a step would be 2.5 MB.
    assert memory[-1] - memory[149] < 2 << 20, memory[::25]
