"""The real batch scripts on a real SLURM of two nodes on this machine: launch/local_slurm.sh."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.run.provenance import code_commit
from tests.helpers.commands import ROOT, TINY, environment, on_data

pytestmark = pytest.mark.slow

# What must not depend on when a run was stopped; seconds and throughput may.
EXACT = ("step", "loss", "gradient_norm", "rates", "text_tokens", "samples_digest", "fill_image")
CPU_NODES = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]


@dataclass
class Slurm:
    """Commands on the SLURM of a session."""

    env: dict[str, str]

    def run(self, *command: str, code: int | None = 0, **env: str) -> str:
        """Output of a command that leaves with `code`; None: any."""
        done = subprocess.run(
            command, cwd=ROOT, env={**self.env, **env}, capture_output=True, text=True, timeout=120
        )
        if code is not None:
            assert done.returncode == code, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def submit(self, directory: Path, *overrides: str, array: bool = False) -> tuple[str, Path]:
        """Submits with launch/submit.py; returns the job and its folder of logs."""
        options = ["--nodes", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--shared"]
        printed = self.run(
            *[sys.executable, "-m", "launch.submit", *options, *(["--array"] if array else [])],
            *["--submissions", str(directory), "+experiment=demo", *TINY, *overrides],
        )
        found = re.search(r"submitted job (\d+); output: (.+)", printed)
        assert found, printed
        return found[1], Path(found[2])

    def job(self, number: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        text = self.run("scontrol", "show", "job", "--oneliner", number)
        return dict(re.findall(r"(\w+)=(\S+)", text))

    def finish(self, number: str, seconds: float = 240) -> dict[str, str]:
        """Waits for the end of a job and of its requeues."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_for(lambda: self.job(number)["JobState"] in ended, f"the end of job {number}", seconds)
        return self.job(number)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """A SLURM for this module; without its packages CI fails and anything else skips."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [
        p for p in ("slurmctld", "slurmd", "munged", "srun") if not shutil.which(p, path=path)
    ]
    if missing:
        reason = f"{', '.join(missing)} not found: install the packages slurm-wlm and munge"
        if os.environ.get("CI_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    state = tempfile.mkdtemp(prefix="casa-slurm-")  # sockets need short paths
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = min(probe.getsockname()[1], 65000)
    env = {**environment(), "CASA_SLURM_DIR": state, "CASA_SLURM_PORT": str(port)}
    env.update(SLURM_CONF=f"{state}/slurm.conf", CASA_MASTER_ADDR="127.0.0.1")
    script = str(ROOT / "launch" / "local_slurm.sh")
    subprocess.run([script, "start"], env=env, check=True, timeout=120)
    try:
        yield Slurm(env)
    finally:
        subprocess.run([script, "stop"], env=env, check=True, timeout=120)


def exact(run_dir: Path) -> list[dict[str, Any]]:
    return [{k: r[k] for k in EXACT} for r in read_metrics(run_dir / "metrics.jsonl")]


def steps(run_dir: Path) -> int:
    with contextlib.suppress(OSError):
        return len((run_dir / "metrics.jsonl").read_text().splitlines())
    return 0


def test_a_preempted_run_is_requeued_and_ends_like_an_undisturbed_one(
    slurm: Slurm, data_dir: Path, tmp_path: Path
) -> None:
    common = [*on_data(data_dir), "trainer.steps=150", "checkpoint.every=1000"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed, _ = slurm.submit(tmp_path / "s", *common, "name=whole", f"run_dir={whole}")
    assert slurm.finish(undisturbed)["JobState"] == "COMPLETED"
    job, logs = slurm.submit(tmp_path / "s", *common, "name=cut", f"run_dir={cut}")

    def requeued(times: int) -> int:
        """Waits for a requeue; returns the step that it will go on from."""
        history = cut / "requeues.tsv"
        wait_for(
            lambda: history.exists() and len(history.read_text().splitlines()) == times,
            f"requeue {times}",
        )
        # The next start removes requeue.json, which may be at once; the history keeps what it said.
        _, step, reason, _ = history.read_text().splitlines()[-1].split("\t")
        assert reason == "signal"
        assert (cut / "checkpoints" / f"step_{step}").is_dir()
        return int(step)

    # As SLURM signals before the time limit.
    wait_for(lambda: steps(cut) >= 5, "five steps")
    slurm.run("scancel", "--signal=USR1", job)
    first = requeued(1)
    # Somebody more important: SLURM sends SIGTERM and, after a grace time, would kill and requeue.
    wait_for(lambda: steps(cut) >= first + 5, "five more steps")
    rival = ["--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    slurm.run("sbatch", "--wait", *rival)
    second = requeued(2)
    assert 5 <= first < second < 150

    ended = slurm.finish(job)
    log = (logs / f"{job}.out").read_text()
    assert ended["JobState"] == "COMPLETED" and ended["Restarts"] == "2", log
    for number, step in enumerate((first, second), start=1):
        assert f"saved at step {step} (signal); requeue {number} of at most 20" in log
        assert f"at step {step}\n" in log  # resuming from ... at step N
    assert not (cut / "requeue.json").exists()
    assert len(exact(whole)) == 150
    assert exact(cut) == exact(whole)


def test_a_sweep_is_an_array_of_frozen_code(slurm: Slurm, data_dir: Path, tmp_path: Path) -> None:
    sweep = ["fusion=casa,insertion", "trainer.steps=2", f"hydra.sweep.dir={tmp_path}/runs"]
    job, logs = slurm.submit(tmp_path / "s", *on_data(data_dir), *sweep, array=True)
    code = logs.parent / "code"
    record = json.loads((logs.parent / "submission.json").read_text())
    assert len(record["run_dirs"]) == 2
    for task, run_dir in enumerate(record["run_dirs"]):
        ended = slurm.finish(f"{job}_{task}")
        assert ended["JobState"] == "COMPLETED", (logs / f"{job}_{task}.out").read_text()
        assert steps(Path(run_dir)) == 2
        ran = json.loads((Path(run_dir) / "environment.json").read_text())
        assert ran["git_commit"] == code_commit(code)
        assert ran["command"][0] == f"{code}/casa_train/__main__.py"


# Stands in for python where a case is about the batch script's decisions alone: it says where the
# run directory is, and as the training it counts its starts, then runs the case's own line.
STAND_IN = """#!/usr/bin/env bash
case "$*" in
    -c*) exec {python} "$@" ;;
    *--cfg*) echo {run_dir} ;;
    *)
        [ "$SLURM_PROCID" = 0 ] || exec sleep 2
        echo start >>{run_dir}/starts
        starts=$(wc -l <{run_dir}/starts)
        {line}
        ;;
esac
"""
SAVE = r"""printf "{\"step\": %s, \"reason\": \"signal\"}" STEP >RUN_DIR/requeue.json; exit 75"""


def sbatch_stand_in(slurm: Slurm, run_dir: Path, line: str, *options: str) -> str:
    """Submits launch/slurm.sbatch with a stand-in for python; returns the job."""
    run_dir.mkdir()
    (run_dir / "requeue.json").write_text('{"step": 1, "reason": "of an earlier job"}')
    python = run_dir / "python.sh"
    line = line.replace("RUN_DIR", str(run_dir))
    python.write_text(STAND_IN.format(python=sys.executable, run_dir=run_dir, line=line))
    python.chmod(0o755)
    printed = slurm.run(
        *["sbatch", "--parsable", *CPU_NODES, "--mem=1", f"--output={run_dir}/log", *options],
        *["launch/slurm.sbatch", "+experiment=demo"],
        CASA_PYTHON=str(python),
        CASA_MAX_REQUEUES="2",
    )
    return printed.strip()


def test_requeues_have_a_cap_and_need_progress(slurm: Slurm, tmp_path: Path) -> None:
    cases = {
        "stuck": SAVE.replace("STEP", "5"),
        "endless": SAVE.replace("STEP", "$starts"),
        "crash": "exit 3",
    }
    jobs = {name: sbatch_stand_in(slurm, tmp_path / name, line) for name, line in cases.items()}
    ended = {name: slurm.finish(job) for name, job in jobs.items()}
    logs = {name: (tmp_path / name / "log").read_text() for name in cases}
    starts = {name: len((tmp_path / name / "starts").read_text().split()) for name in cases}

    assert {name: e["ExitCode"] for name, e in ended.items()} == {
        "stuck": "75:0",
        "endless": "75:0",
        "crash": "143:0",  # not 3: srun reports the highest code, here of the peer that it killed
    }, logs
    assert starts == {"stuck": 2, "endless": 3, "crash": 1}
    assert "step 5 (signal) is no further than step 5 at the last requeue" in logs["stuck"]
    assert "2 already, CASA_MAX_REQUEUES allows no more; saved at step 3" in logs["endless"]
    assert "srun ended with 143 and nobody asked for a requeue" in logs["crash"]


def test_what_somebody_cancels_saves_and_stays_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    save = SAVE.replace("STEP", "5")
    line = f"trap '{save}' TERM; while true; do sleep 0.1; done"
    job = sbatch_stand_in(slurm, run_dir, line, "--nodes=1")
    wait_for((run_dir / "starts").exists, "the start")
    slurm.run("scancel", job)
    assert slurm.finish(job)["JobState"] == "CANCELLED"
    log = (run_dir / "log").read_text()
    assert "no requeue: the job was cancelled or ran out of time" in log and "step 5" in log
    assert not (run_dir / "requeues.tsv").exists()


def test_a_configuration_that_does_not_compose_stops_before_the_nodes_start(
    slurm: Slurm, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    command = ["sbatch", "--wait", *CPU_NODES, f"--output={log}", "launch/slurm.sbatch"]
    slurm.run(*command, "+experiment=demo", "sede=1", code=2)
    assert "Could not override 'sede'" in log.read_text()
    slurm.run(*command, "+experiment=demo", "checkpoint.resume=never", code=2)
    assert "would start over at every requeue" in log.read_text()


def test_preflight_passes_and_names_nodes_that_fail(
    slurm: Slurm, data_dir: Path, tmp_path: Path
) -> None:
    small = {"CASA_MIN_FREE_GB": "0", "CASA_WRITE_MB": "1", "CASA_REDUCE_MB": "1"}
    log, run_dir = tmp_path / "log", tmp_path / "run"
    command = ["sbatch", "--wait", *CPU_NODES, f"--output={log}", "launch/preflight.sh"]
    slurm.run(*command, str(run_dir), str(data_dir / "train"), CASA_PYTHON=sys.executable, **small)
    passed = log.read_text()
    assert "preflight passed on n[0-1]" in passed
    assert re.search(r"all 2 tasks: ok: all-reduce of 1 MiB [\d.]+ GB/s", passed)
    for node in ("n0", "n1"):
        assert re.search(rf"{node}: ok: {run_dir}: \d+ GB free, writes \d+ MB/s", passed)
        assert re.search(rf"{node}: ok: {data_dir}/train: reads \d+ MB/s", passed)
    assert not list(run_dir.iterdir())

    slurm.run(*command, str(run_dir), "/nowhere", code=1, **small)
    failed = log.read_text()
    assert "n1: FAILED: /nowhere is not there, or holds no file" in failed
    assert "preflight FAILED on n0,n1; sbatch --exclude=n0,n1 leaves them out" in failed
