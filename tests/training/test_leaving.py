"""Runs that end early: signals, time limits, hangs, numbers that are not finite, a second job."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.run.lock import RunLock
from casa_train.training.signals import EXIT_REQUEUE, StopRequest
from tests.helpers.commands import ROOT, environment, run, train_command
from tests.helpers.runs import leaving_run, start_ranks, wait_for_step

EXACT = ("loss", "gradient_norm", "rates", "samples_digest", "answer_tokens", "sources")


def test_a_signal_is_remembered_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest(0) as stop:
        assert stop.flags() == (False, False)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.flags() == (True, False)
        assert stop.signal == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_time_limit_leaves_room_for_a_step_and_a_save() -> None:
    now = 0.0
    stop = StopRequest(1.0, clock=lambda: now)
    for now in (1900.0, 1960.0, 2020.0, 3450.0):  # a start of half an hour is no step
        late = stop.flags()[1]
        assert late == (now == 3450.0)


def test_a_second_job_is_told_who_holds_the_directory(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(UserError, match=rf"host {socket.gethostname()}, pid {os.getpid()}"):
        RunLock(tmp_path)
    lock.close()
    RunLock(tmp_path).close()


@pytest.mark.fresh  # which takes less than the first fork
def test_a_lock_goes_with_a_killed_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from casa_train.run.lock import RunLock;"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(100)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"pid {holder.pid}"):
        RunLock(tmp_path)
    holder.kill()
    holder.wait()
    RunLock(tmp_path).close()


# ----------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_the_same_step_on_all(data_dir: Path, tmp_path: Path) -> None:
    """Everybody leaves with 75; the same command then ends as if nothing had happened."""
    run(train_command(leaving_run(data_dir, tmp_path / "whole"), processes=2))
    run_dir = tmp_path / "stopped"
    command = train_command(leaving_run(data_dir, run_dir))
    ranks = start_ranks(command)
    wait_for_step(run_dir, 3, *ranks)
    ranks[1].send_signal(signal.SIGUSR1)
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [EXIT_REQUEUE] * 2, outputs
    asked = json.loads((run_dir / "requeue.json").read_text())
    reached = len(read_metrics(run_dir / "metrics.jsonl"))
    assert asked == {"step": reached, "reason": "signal"} and 3 <= reached < 14
    assert (run_dir / "checkpoints" / f"step_{reached}").is_dir()
    assert f"left after step {reached}" in outputs[0]
    again = start_ranks(command)
    outputs = [process.communicate(timeout=150)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert not (run_dir / "requeue.json").exists()
    records = [read_metrics(path / "metrics.jsonl") for path in (tmp_path / "whole", run_dir)]
    for whole, stopped in zip(*records, strict=True):
        for name in EXACT:
            if name != "sources":  # sums since the last such record, which a stop begins anew
                assert whole.get(name) == stopped.get(name), (whole["step"], name)
    source = records[0][6]["sources"]["synthetic"]
    assert source["answer_tokens"] == sum(r["answer_tokens"] for r in records[0][:7])
    mean = sum(r["loss"] * r["answer_tokens"] for r in records[0][:7]) / source["answer_tokens"]
    assert source["loss"] == pytest.approx(mean, rel=1e-6)


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
def test_a_signal_while_the_libraries_load_is_not_lost(data_dir: Path, tmp_path: Path) -> None:
    """On a cluster that takes minutes, and the signal's default would end the job for good."""
    run_dir = tmp_path / "early"
    ranks = start_ranks(train_command(leaving_run(data_dir, run_dir)), afresh=[1])
    deadline = time.monotonic() + 60
    while not catches(ranks[1].pid, signal.SIGUSR1):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert "libtorch" not in Path(f"/proc/{ranks[1].pid}/maps").read_text()
    ranks[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [EXIT_REQUEUE] * 2, outputs
    assert json.loads((run_dir / "requeue.json").read_text()) == {"step": 1, "reason": "signal"}


@pytest.mark.slow
def test_a_stalled_rank_ends_the_others_with_their_stacks(data_dir: Path, tmp_path: Path) -> None:
    """And a second job in the directory of a running one is told whose it is."""
    run_dir = tmp_path / "stalled"
    more = ["trainer.watchdog_minutes=0.2", "trainer.steps=100000", "checkpoint.every=100000"]
    command = train_command(leaving_run(data_dir, run_dir, *more))
    ranks = start_ranks(command)
    wait_for_step(run_dir, 2, *ranks)
    intruder = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert intruder.returncode == 2
    assert f"pid {ranks[0].pid}" in intruder.stderr and "in use by" in intruder.stderr
    ranks[1].send_signal(signal.SIGSTOP)
    try:
        output = ranks[0].communicate(timeout=90)[0]
        assert ranks[0].returncode == EXIT_REQUEUE, output
        assert "watchdog: no step for" in output
        stacks = (run_dir / "stacks_0.txt").read_text()
        assert "loop.py" in stacks
        # In a step, or between two, where all ranks are asked whether to leave.
        assert "train_step" in stacks or "stopping.py" in stacks
        asked = json.loads((run_dir / "requeue.json").read_text())
        assert asked == {"step": 0, "reason": "watchdog"}  # of the last checkpoint; there is none
    finally:
        ranks[1].kill()
        ranks[1].communicate()


@pytest.mark.slow
def test_the_time_limit_saves_and_leaves(data_dir: Path, tmp_path: Path) -> None:
    more = ["trainer.steps=100000", "optim.decay_steps=0", "trainer.max_hours=0.002"]
    command = train_command(leaving_run(data_dir, tmp_path / "late", *more))
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == EXIT_REQUEUE, done.stderr
    asked = json.loads((tmp_path / "late" / "requeue.json").read_text())
    assert asked["reason"] == "max_hours"
    assert (tmp_path / "late" / "checkpoints" / f"step_{asked['step']}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["3,4,7", "5,6,7", "1,2,6"])
def test_steps_with_nan_on_one_rank_are_left_out(tmp_path: Path, broken: str) -> None:
    """Two in a row are skipped, three in a row end the run with the samples named.

    The audit looks at the first step that was taken.
    """
    out = tmp_path / "lines"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run([*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.nan_steps", str(out), broken])
    lines = out.read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, (x for x in lines if x.startswith('{"step"')))}
    final = json.loads(lines[-1])
    assert final["finite"] and final["moved"] and final["skipped_steps"] == 3
    bad = [int(step) for step in broken.split(",")]
    skipped = [step for step, record in records.items() if record["skipped"]]
    audits = [line.split(":")[0] for line in lines if line.startswith("audit of ")]
    assert audits == [f"audit of step {next(s for s in (1, 2, 3) if s not in bad)}"]
    if broken != "5,6,7":
        assert skipped == bad and len(records) == 12
        assert all(records[step]["loss"] is None for step in bad)
        assert records[12]["loss"] < records[5 if bad[0] == 1 else 1]["loss"]
        # A skipped step empties the sums of its four steps.
        assert set(records[12]["sources"]) == {"a", "only rank 0", "only rank 1"}
        assert records[12]["sources"]["a"]["answer_tokens"] == 2 * 3 * 4
    else:
        assert skipped == [5, 6] and 8 not in records
        error = next(line for line in lines if line.startswith("error: "))
        assert "3 steps in a row" in error and "rank1" in error
