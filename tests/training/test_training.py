"""Whole runs of the real command: resume after SIGKILL, several processes, ZeRO stages, sweeps."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from casa_train.data.prepared.shards import Split
from casa_train.metrics.sinks.jsonl import read_metrics
from tests.helpers.commands import ROOT, environment, run, train_command
from tests.helpers.once import once
from tests.helpers.runs import exact, short_run, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps that nothing happens to."""
    return once(
        tmp_path_factory,
        "undisturbed",
        lambda run_dir: run(train_command(short_run(data_dir, run_dir))),
    )


def test_a_run_leaves_its_records(undisturbed: Path) -> None:
    records = exact(undisturbed)
    assert [r["step"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["rates"]["fusion"] == pytest.approx(records[1]["rates"]["fusion"] / 2)
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step_12", "step_8"]
    environment_record = json.loads((undisturbed / "environment.json").read_text())
    assert environment_record["packages"]["deepspeed"]
    assert "git_commit" in environment_record
    assert (undisturbed / "config.yaml").read_text().startswith("name: demo")


def test_sigkill_and_the_same_command_again_is_bit_exact(
    data_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    command = train_command(short_run(data_dir, tmp_path / "killed"))
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for_step(tmp_path / "killed", 6, process)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    reached = len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines())
    assert reached < 12, "the kill came too late to prove anything"
    again = run(command)
    assert "resuming from" in again.stdout
    assert re.search(r"resuming from .*step_(4|8) at step", again.stdout)
    lines = (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12  # one line a step, the repeated ones too
    assert exact(tmp_path / "killed") == exact(undisturbed)
    # What the last checkpoint holds is equal too, the random generators among it.
    for name in ("rng_0.pt", "state.json"):
        files = [d / "checkpoints" / "step_12" / name for d in (tmp_path / "killed", undisturbed)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.fresh
def test_two_processes_equal_accumulation(
    data_dir: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run(train_command(short_run(data_dir, tmp_path / "two"), processes=2))
    alone, together = exact(undisturbed), exact(tmp_path / "two")
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-3)
        for name in ("rates", "answer_tokens", "text_tokens", "samples", "samples_digest"):
            assert two[name] == one[name]


@pytest.mark.parametrize("stage", [1, 3])
def test_other_zero_stages_train_the_same(
    data_dir: Path, undisturbed: Path, tmp_path: Path, stage: int
) -> None:
    more = [f"parallel.zero_stage={stage}", "trainer.steps=6", "optim.decay_steps=0"]
    run(train_command(short_run(data_dir, tmp_path / "stage", *more), processes=2))
    # Decay begins after step 8, so the first six steps are those of the longer run.
    for one, other in zip(exact(undisturbed)[:6], exact(tmp_path / "stage"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-4)


def test_frozen_backbone_and_prefix_in_bf16(data_dir: Path, tmp_path: Path) -> None:
    more = [
        "model.backbone.trainable=false",
        "model.vision.train_last_blocks=1",
        "fusion=cross_attention",
        "fusion.init=zero_output",
        "parallel.precision=bf16",
        "trainer.steps=11",
    ]
    done = run(train_command(short_run(data_dir, tmp_path / "frozen", *more)))
    assert "wait (zero gradient by design" in done.stdout
    # Ten steps later everything had a gradient and had moved.
    assert re.search(r"audit of step 11: (\d+) of \1 trainable", done.stdout)
    assert "1 frozen blocks" in done.stdout

    # What the checkpoint cannot become is refused, and the run stays what it was.
    before = (tmp_path / "frozen" / "config.yaml").read_bytes()
    more += ["model.backbone.trainable=true", "trainer.steps=13"]
    more += ["checkpoint.resume_allow=[model.backbone.trainable,trainer.steps]"]
    refused = run(train_command(short_run(data_dir, tmp_path / "frozen", *more)), check=False)
    assert refused.returncode == 2 and "was frozen there and is trained now" in refused.stderr
    assert (tmp_path / "frozen" / "config.yaml").read_bytes() == before


def test_corrupt_images_are_skipped_counted_and_reported(data_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(data_dir, tmp_path / "data")
    split = Split(tmp_path / "data" / "train")
    rows = [r for r in split.index.to_pylist() if r["image_offsets"]][::10]
    for row in rows:
        shard = split.directory / split.meta["shards"][row["shard"]]["name"]
        with shard.open("r+b") as file:
            file.seek(row["image_offsets"][0] + 30)
            file.write(b"\0" * (row["image_sizes"][0] - 30))
    done = run(train_command(short_run(tmp_path / "data", tmp_path / "run", "data.workers=1")))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    lines = (tmp_path / "run" / "quarantine_0.jsonl").read_text().splitlines()
    failures = [json.loads(line) for line in lines]
    assert len(records) == 12
    assert records[-1]["bad_samples"] == len(failures) > 0
    assert {f["key"] for f in failures} <= {row["key"] for row in rows}
    assert {f["reason"] for f in failures} == {"unreadable_image"}
    assert f"{len(failures)} of" in done.stdout and "quarantine files" in done.stdout


def test_sweep_gives_each_job_its_directory(data_dir: Path, tmp_path: Path) -> None:
    done = run(
        train_command(
            [
                "-m",
                *[o for o in short_run(data_dir, tmp_path) if not o.startswith("run_dir=")],
                f"hydra.sweep.dir={tmp_path}",
                "fusion=casa,cross_attention,insertion",
                "trainer.steps=4",
            ]
        )
    )
    jobs = sorted(p for p in tmp_path.iterdir() if p.is_dir())
    mechanisms = [
        (job / "config.yaml").read_text().split("mechanism: ")[1].split()[0] for job in jobs
    ]
    assert sorted(mechanisms) == ["casa", "cross_attention", "insertion"]
    for job in jobs:
        assert job.name.startswith("demo,") and "/" not in job.name
        assert [r["step"] for r in exact(job)] == [1, 2, 3, 4]
    assert "fusion insertion: 0 parameters" in done.stdout  # insertion adds none
