"""Short runs of the real command: what they are asked for, how they are awaited and compared."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casa_train.metrics.sinks.jsonl import read_metrics
from tests.helpers.commands import ROOT, TINY, environment, on_data
from tests.helpers.fork_server import STARTED

# What must not depend on when a run was killed; seconds and throughput may.
EXACT = (
    "loss",
    "gradient_norm",
    "rates",
    "answer_tokens",
    "text_tokens",
    "image_tokens",
    "samples",
    "samples_digest",
    "bad_samples",
    "fill_text",
    "fill_image",
)


def short_run(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of twelve steps with a checkpoint every four."""
    return [
        "+experiment=demo",
        *TINY,
        *on_data(data),
        f"run_dir={run_dir}",
        "trainer.steps=12",
        "checkpoint.every=4",
        "optim.warmup_steps=2",
        "optim.decay_steps=4",
        *more,
    ]


def leaving_run(data: Path, run_dir: Path, *more: str) -> list[str]:
    """Overrides of fourteen steps whose checkpoints and logs fall on different ones."""
    steps = ["trainer.steps=14", "trainer.log_every=7", "checkpoint.every=5"]
    return short_run(data, run_dir, *steps, *more)


def exact(run_dir: Path) -> list[dict[str, Any]]:
    """Every step's numbers that must repeat bit for bit."""
    return [
        {"step": record["step"], **{name: record[name] for name in EXACT}}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]


def start_ranks(
    command: list[str], stdout: Any = subprocess.PIPE, afresh: Sequence[int] = ()
) -> list[subprocess.Popen[str]]:
    """Two ranks without a launcher, so that each has an exit code of its own.

    :param afresh: those that are new processes whatever the others are, and load the libraries.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        (STARTED if rank in afresh else subprocess.Popen)(
            command,
            cwd=ROOT,
            env={
                **environment(),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]


def wait_for_step(run_dir: Path, step: int, *processes: subprocess.Popen[Any]) -> None:
    """Returns once metrics.jsonl holds `step`.

    :raises AssertionError: a process ended before, or nothing came for long.
    """
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < deadline, f"no step {step} of {run_dir}"
        for process in processes:
            assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
