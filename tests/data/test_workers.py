"""Loader workers: how their deaths and errors reach the trainer, and what they hold on to."""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.loader import PackLoader, dead_workers_named
from casa_train.data.materialize import Materializer, in_one_storage
from casa_train.data.mixture import SourceSize
from casa_train.data.prepared.plan import Planner, PlanSource
from casa_train.data.prepared.shards import Split
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import RankError
from casa_train.modeling.processing_casa import CasaProcessor
from tests.helpers.bad_images import encoded, noise
from tests.helpers.commands import ROOT, TEMPLATE, TINY, environment, on_data, train_command
from tests.helpers.counting import sample_lengths, writer_for

SOON = 60  # seconds within which the trainer must know, on a busy machine; else it never does


@pytest.fixture(scope="module")
def processor(data_dir: Path) -> CasaProcessor:
    return CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), 952 * 952, TEMPLATE)


def make_split(directory: Path, processor: CasaProcessor, images: int, samples: int = 12) -> Split:
    """Samples of a few large images each, in three shards."""
    writer = writer_for(processor, directory, per_shard=4)
    picture = encoded(noise(700, 500), "JPEG")
    for i in range(samples):
        row = {"texts": [{"user": "what", "assistant": "that"}], "source": "unit"}
        assert writer.write(f"k-{i}", row, [picture] * images)
    writer.close()
    return Split(directory)


def make_loader(split: Split, processor: CasaProcessor, workers: int = 2) -> PackLoader:
    lengths = sample_lengths(split, processor)
    data = DataConfig(
        text_tokens=int(lengths[0].max()) + 1,  # a sample a pack
        image_tokens=int(lengths[1].max()) + 1,
        packs_per_step=1,
        balance_block=2,
        balance_group=2,
        workers=workers,
    )
    planner = Planner({"s": PlanSource(*lengths, SourceSize(len(split)))}, data, seed=0)
    materializer = Materializer({"s": split}, processor, Budget.of(data))
    return PackLoader(planner, materializer)


def worker_ids(loader: PackLoader) -> list[int]:
    iterator: Any = loader._iterator
    return [worker.pid for worker in iterator._workers]


def test_a_killed_worker_is_named_within_seconds(tmp_path: Path, processor: CasaProcessor) -> None:
    loader = make_loader(make_split(tmp_path, processor, 1), processor)
    loader.next_step()
    (victim, _) = worker_ids(loader)
    began = time.monotonic()
    # torch raises wherever the process is when the news comes in: here, or in a step.
    with pytest.raises(RankError, match="rank 0 lost a process.*Lower data.workers"):
        with dead_workers_named(0):
            os.kill(victim, signal.SIGKILL)
            while time.monotonic() - began < 2 * SOON:
                loader.next_step()
    assert time.monotonic() - began < SOON


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_disappears_is_named(
    tmp_path: Path, processor: CasaProcessor, workers: int
) -> None:
    loader = make_loader(make_split(tmp_path, processor, 1), processor, workers)
    (tmp_path / "shard-000001.tar").unlink()
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        for _ in range(12):
            loader.next_step()
    assert time.monotonic() - began < SOON
    assert re.match(r"rank 0: .*/shard-000001.tar cannot be opened any more", str(caught.value))
    assert "Traceback" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_an_unknown_failure_is_an_error_that_names_the_sample(
    tmp_path: Path, data_dir: Path, workers: int
) -> None:
    processor = CasaProcessor(load_tokenizer(str(data_dir / "tokenizer")), 7056, TEMPLATE)
    loader = make_loader(make_split(tmp_path, processor, 1), processor, workers)
    processor.encode = None  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(RuntimeError, match=r"sample unit/k-\d+ of pack 0: TypeError"):
        loader.next_step()
    assert time.monotonic() - began < SOON


LEAVES_DURING_A_DELIVERY = """
import os, socket, sys, threading, time
from multiprocessing import resource_sharer
from casa_train.data.loader import start_worker

start_worker(0) if sys.argv[1] == "started" else None
resource_sharer.DupFd(0)
with socket.socket(socket.AF_UNIX) as trainer:
    trainer.connect(resource_sharer._resource_sharer._address)
    trainer.recv(1)  # and goes with the rest of the challenge unread: a reset
resource_sharer.stop(timeout=10)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["started", "bare"])
def test_a_trainer_that_leaves_during_a_delivery_gets_no_traceback(how: str) -> None:
    command = [sys.executable, "-c", LEAVES_DURING_A_DELIVERY, how]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert ("ConnectionResetError" in done.stderr) == (how == "bare")
    assert how == "bare" or not done.stderr


def test_images_of_a_pack_share_one_storage_with_the_same_pixels() -> None:
    images = [torch.randint(0, 256, (3, 28, 28 * n), dtype=torch.uint8) for n in (1, 3, 2)]
    shared = in_one_storage(images)
    assert all(torch.equal(a, b) for a, b in zip(images, shared, strict=True))
    assert len({image.untyped_storage().data_ptr() for image in shared}) == 1
    assert in_one_storage([]) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads the kernel's lists")
def test_a_pack_of_many_images_needs_few_file_descriptors(
    tmp_path: Path, processor: CasaProcessor
) -> None:
    images = 60
    loader = make_loader(make_split(tmp_path, processor, images), processor, workers=1)
    before = len(os.listdir("/proc/self/fd"))
    kept = [loader.next_step() for _ in range(3)]
    assert sum(len(batch.inputs.images) for step in kept for batch in step) == 3 * images
    (worker,) = worker_ids(loader)
    assert len(os.listdir("/proc/self/fd")) - before < images
    assert len(os.listdir(f"/proc/{worker}/fd")) - before < images


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's account")
def test_a_worker_s_memory_stays_flat(tmp_path: Path, processor: CasaProcessor) -> None:
    loader = make_loader(make_split(tmp_path, processor, 4), processor, workers=1)

    def held() -> int:
        (worker,) = worker_ids(loader)
        text = Path(f"/proc/{worker}/status").read_text()
        (kilobytes,) = re.findall(r"RssAnon:\s+(\d+)", text)
        return int(kilobytes) * 1024

    sizes = []
    gc.collect()
    gc.freeze()  # else the worker's collector copies this whole process, page by page
    for _ in range(60):
        (batch,) = loader.next_step()
        assert len(batch.inputs.images) == 4
        sizes.append(held())
    one_pack = sum(image.nbytes for image in batch.inputs.images)
    # 40 packs leave less than 8 behind, whatever the allocator keeps for itself.
    assert max(sizes[40:]) - max(sizes[:20]) < 8 * one_pack, sizes


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_ends_with_a_message(tmp_path: Path, data_dir: Path) -> None:
    settings = [s for s in TINY if not s.startswith("data.workers")]
    command = train_command(
        [*settings, *on_data(data_dir), "data.workers=2", "trainer.steps=100000"]
        + ["name=killed", f"run_dir={tmp_path}/run"]
    )
    with subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            for line in process.stdout:
                if line.startswith(b"step 2/"):
                    break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            began = time.monotonic()
            os.kill(int(children[-1]), signal.SIGKILL)
            _, errors = process.communicate(timeout=2 * SOON)
        finally:
            process.kill()
    assert time.monotonic() - began < SOON
    assert process.returncode == 2, errors.decode()
    assert b"error: rank 0 lost a process that prepares its data" in errors
    assert b"Traceback" not in errors, errors.decode()
