"""Jobs of a sweep in processes of their own, several at once."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from casa_train.config.compose import compose_config, compose_onto
from casa_train.config.model_schema import Matched
from casa_train.config.overrides import as_typed, quoted
from casa_train.config.schema import Config
from casa_train.cost.sizes import size_model
from casa_train.io.files import sha256
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.run.configuration import stored_config
from casa_train.run.finished import is_finished
from casa_train.run.layout import CONSOLE_FILE, FAILURE_FILE
from casa_train.run.side_by_side import (
    at_once,
    environment_of_jobs,
    last_words,
    places,
    threads_of,
)
from casa_train.run.sweep import run_directories
from casa_train.setup.equal_parameters import match_parameters
from tests.helpers.commands import ROOT, TINY, environment, on_data, run, train_command
from tests.helpers.runs import exact, wait_for_step


def own_experiment(data: Path, folder: Path) -> list[str]:
    """A folder of configurations whose experiment keeps directory names short."""
    small = OmegaConf.from_dotlist([*TINY, *on_data(data), "trainer.steps=3", "name=t"])
    text = "# @package _global_\ndefaults:\n  - demo\n  - _self_\n" + OmegaConf.to_yaml(small)
    path = folder / "conf" / "experiment" / "small.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return ["--config-dir", str(folder / "conf"), "+experiment=small"]


def weights(run_dir: Path, step: int) -> dict[str, str]:
    """Digests of what a checkpoint holds of the engine: weights, masters and moments."""
    folder = run_dir / "checkpoints" / f"step_{step}"
    return {path.name: sha256(path) for path in (folder / "engine").iterdir()}


@pytest.mark.slow
def test_a_job_beside_another_is_the_job_alone(data_dir: Path, tmp_path: Path) -> None:
    """And one that fails stops no other; one that was finished is not started again."""
    small = own_experiment(data_dir, tmp_path)
    sweep = ["-m", *small, "seed=5", f"hydra.sweep.dir={tmp_path}", "hydra.sweep.jobs=3"]
    done = run(train_command([*sweep, "fusion.every=1,2,9"]), check=False)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "3 jobs, 3 at once" in done.stdout
    assert done.stdout.count(" begins: ") == 3 and done.stdout.count(" is done after ") == 2
    failed, beside = (tmp_path / f"t,seed=5,fusion.every={every}" for every in (9, 2))
    assert f"error: job {failed}: fusion.every is 9" in done.stderr
    assert "fusion.every is 9" in (failed / FAILURE_FILE).read_text()
    assert {beside, failed} <= set(run_directories(tmp_path, "t,*"))
    console = (beside / CONSOLE_FILE).read_text()
    assert "step 3" in console and "step 3" not in done.stdout
    run(train_command([*small, "seed=5", "fusion.every=2", f"run_dir={tmp_path / 'alone'}"]))
    assert exact(beside) == exact(tmp_path / "alone")
    found = weights(beside, 3)
    assert found and found == weights(tmp_path / "alone", 3)
    again = run(train_command([*sweep, "fusion.every=1,2"]))
    assert again.stdout.count(" was finished before: ") == 2 and "begins" not in again.stdout
    assert (beside / CONSOLE_FILE).read_text() == console
    with Path("/dev/full").open("w") as full:  # a console that takes nothing ends no sweep
        command = train_command([*sweep, "fusion.every=1,2"])
        told = subprocess.run(command, cwd=ROOT, env=environment(), stdout=full)
    assert told.returncode == 0
    refuses_to_call_it_finished(beside, data_dir)


def refuses_to_call_it_finished(run_dir: Path, data: Path) -> None:
    """Whatever a start would do, or refuse, it is left to."""
    config = dataclasses.replace(stored_config(run_dir / "config.yaml"), run_dir=str(run_dir))

    def finished(*overrides: str) -> bool:
        changed: Config = compose_onto(config, overrides)
        return is_finished(changed, run_dir)

    assert finished() and not is_finished(None, run_dir)
    for override in (
        "trainer.steps=4",
        "optim.groups.backbone.lr=0.1",
        "evaluation.loss_samples=7",
        "checkpoint.resume=never",
        "export.every=1000",
        "model.tokenizer=elsewhere",
    ):
        assert not finished(override), override
    for name, text in (("requeue.json", "{}"), (FAILURE_FILE, "it failed since\n")):
        (run_dir / name).write_text(text)
        assert not finished(), name
        (run_dir / name).unlink()
    begins = {"start": 9, "time": time.time(), "after_step": 3}
    starts = (run_dir / "starts.jsonl").read_text()
    (run_dir / "starts.jsonl").write_text(starts + json.dumps(begins) + "\n")
    assert not finished(), "a start that did not leave"
    (run_dir / "starts.jsonl").write_text(starts)
    assert finished()
    os.utime(run_dir / "starts.jsonl", (1e9, 1e9))  # older than the data
    assert not finished()
    os.utime(run_dir / "starts.jsonl")
    (run_dir / "checkpoints" / "step_3").rename(run_dir / "checkpoints" / "gone")
    assert not finished()


def jobs_of(sweep: int) -> set[int]:
    """The processes of a sweep's jobs."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(sweep)], capture_output=True)
    return {int(pid) for pid in listed.stdout.split()}


@pytest.mark.slow
def test_signals_reach_every_job(data_dir: Path, tmp_path: Path) -> None:
    """One that is killed stops no other; SIGTERM lets all save."""
    long = ["trainer.steps=100000", "checkpoint.every=100000", "optim.decay_steps=0"]
    small = own_experiment(data_dir, tmp_path)
    sweep = ["-m", *small, *long, "seed=1,2,3,4", f"hydra.sweep.dir={tmp_path}"]
    command = train_command([*sweep, "hydra.sweep.jobs=2"])
    first, second, third, last = (tmp_path / f"t,{','.join(long)},seed={n}" for n in (1, 2, 3, 4))
    process = started(command)
    try:
        wait_for_step(first, 1, process)
        wait_for_step(second, 1, process)
        holder = re.search(r"pid (\d+)", (first / "lock").read_text())
        assert holder is not None and int(holder[1]) in jobs_of(process.pid)
        os.kill(int(holder[1]), signal.SIGKILL)
        wait_for_step(third, 1, process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, out + err
    assert f"error: job {first}: killed by SIGKILL" in err
    assert "killed by SIGKILL" in (first / FAILURE_FILE).read_text()
    for job in (second, third):
        asked = json.loads((job / "requeue.json").read_text())
        assert asked["reason"] == "signal" and asked["step"] >= 1
        assert (job / "checkpoints" / f"step_{asked['step']}").is_dir()
    assert not (last / "config.yaml").exists() and "not begun: 1 of 4 jobs" in out


def started(command: Sequence[str]) -> subprocess.Popen[str]:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment(), text=True, **pipes)  # type: ignore[call-overload,no-any-return]


@pytest.mark.slow
def test_jobs_end_with_a_sweep_that_is_killed(data_dir: Path, tmp_path: Path) -> None:
    """They save and leave; the same command goes on with them, until Ctrl-C."""
    long = ["trainer.steps=100000", "checkpoint.every=100000", "optim.decay_steps=0"]
    sweep = ["-m", *own_experiment(data_dir, tmp_path), *long, "seed=6"]
    command = train_command([*sweep, f"hydra.sweep.dir={tmp_path}", "hydra.sweep.jobs=auto"])
    process = started(command)
    job = tmp_path / f"t,{','.join(long)},seed=6"
    wait_for_step(job, 1, process)
    (child,) = jobs_of(process.pid)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()
    asked = json.loads((job / "requeue.json").read_text())
    assert asked["reason"] == "signal"
    process = started(command)
    try:
        wait_for_step(job, asked["step"] + 1, process)
        (child,) = jobs_of(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in err, out + err
    assert not Path(f"/proc/{child}").exists()
    steps = [record["step"] for record in read_metrics(job / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > asked["step"]
    assert f"resuming from {job}" in (job / CONSOLE_FILE).read_text()


def test_what_cannot_run_side_by_side_is_refused_or_printed_in_order(tmp_path: Path) -> None:
    sweep = ["-m", "+experiment=demo", "seed=1,2", f"hydra.sweep.dir={tmp_path}"]
    for jobs, shown in (("0", "0"), ("many", "'many'"), ("1.5", "1.5"), ("true", "True")):
        done = run(train_command([*sweep, f"hydra.sweep.jobs={jobs}"]), check=False)
        assert done.returncode == 2
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith(f"error: hydra.sweep.jobs is {shown}; expected how many jobs")
    dry = run(train_command([*sweep, "hydra.sweep.jobs=2", "dry_run=true"]))
    assert dry.stdout.count("casa_train dry run: demo") == 2 and "at once" not in dry.stdout
    several = ["env", "RANK=0", "WORLD_SIZE=2", *train_command([*sweep, "hydra.sweep.jobs=3"])]
    done = subprocess.run(several, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "hydra.sweep.jobs is 3, but this command was started as 2 ranks" in done.stderr


def test_how_many_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, three, own = (
        compose_config(["+experiment=demo", f"parallel.threads={n}"]) for n in (1, 3, 0)
    )
    assert at_once(None, [one] * 9, cores=8, gpus=0) == 8
    assert at_once(None, [one, three] * 9, cores=8, gpus=0) == 2  # the larger one's threads
    assert at_once(None, [own] * 9, cores=8, gpus=0) == 1  # torch takes every core
    assert at_once(None, [three] * 9, cores=2, gpus=0) == 1
    assert at_once(None, [one] * 3, cores=8, gpus=0) == 3  # no more than there are jobs
    assert at_once(None, [one] * 9, cores=8, gpus=4) == 4
    assert at_once(5, [own] * 9, cores=2, gpus=1) == 5  # as it was said
    # A job whose configuration does not hold says so and computes nothing.
    assert at_once(None, [one, None, three], cores=8, gpus=0) == 2
    assert at_once(None, [None] * 3, cores=8, gpus=0) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2,1")
    assert threads_of(own, cores=8) == 2 and threads_of(three, cores=8) == 3


def test_every_job_sees_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert places(3, 0) == [{}, {}, {}]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(3, 2)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-ab")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(3, 2)] == ["5", "GPU-ab", "5"]


def test_a_job_is_no_rank_and_keeps_all_else_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_a_rank = dict.fromkeys(("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"), "1")
    kept = {"DS_ACCELERATOR": "cpu", "SLURM_JOB_ID": "77", "WANDB_MODE": "offline"}
    with monkeypatch.context() as patch:
        for name, value in {**of_a_rank, **kept}.items():
            patch.setenv(name, value)
        found = environment_of_jobs()
    assert {name: found.get(name) for name in kept} == kept
    assert not {*of_a_rank} & {*found}


def test_last_words_are_of_this_start(tmp_path: Path) -> None:
    console = tmp_path / CONSOLE_FILE
    console.write_text("then the command\nerror: of an earlier start\n")
    offset = console.stat().st_size
    assert "it printed nothing" in last_words(console, offset, -9)
    with console.open("a") as file:
        file.write("now the command\nwarning: x\nerror: a field\n  goes on here\n")
    assert last_words(console, offset, 2) == "a field\n  goes on here"
    assert last_words(console, offset, 1).startswith("crashed with exit code 1: goes on here")
    assert "killed by SIGKILL" in last_words(console, offset, -9)


@pytest.mark.parametrize("name", ["a,b=c", "it's", "a\\b", "a\\", "a\\'b"])
def test_any_directory_is_one_value(name: str, tmp_path: Path) -> None:
    """The run directory of a job goes through Hydra's grammar."""
    (override,) = as_typed([f"run_dir={quoted(f'{tmp_path}/{name}')}"])
    assert compose_config(["+experiment=demo", override]).run_dir == f"{tmp_path}/{name}"


@pytest.mark.parametrize("chosen", ["width", "options"])
def test_a_run_with_matched_parameters_is_finished_once(chosen: str, tmp_path: Path) -> None:
    """Its directory holds the numbers that the start chose; who starts it again does not."""
    data = tmp_path / "data"
    for name in ("tokenizer", "train", "validation"):
        (data / name).mkdir(parents=True)
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints" / "step_7").mkdir(parents=True)
    fusion, match = "casa", "gated_cross_attention"
    own = ["trainer.steps=7", f"fusion={fusion}", f"run_dir={run_dir}", *on_data(data)]
    config = compose_config(["+experiment=demo", *TINY, *own, f"model.match={match}"])
    if chosen == "width":
        started = match_parameters(config, size_model(config, [])).config
    else:  # as beside a pretrained backbone
        started = dataclasses.replace(config, fusion={**config.fusion, "every": 2})
        matched = Matched(123, reached=124, fusion=dict(config.fusion))
        started.model = dataclasses.replace(config.model, matched=matched)
    assert started != config
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(started)))
    left = {"start": 1, "time": 2.5, "left": "finished", "step": 7}
    lines = [{"start": 1, "time": 1.5, "after_step": 0}, left]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(run_dir / "starts.jsonl", (2e9, 2e9))
    assert is_finished(config, run_dir)
    for other in ("model.match=cross_attention", "model.match=null", "fusion.every=2"):
        assert not is_finished(compose_onto(config, [other]), run_dir), other
    wider = compose_onto(config, ["model.backbone.config.intermediate_size=56"])
    assert not is_finished(wider, run_dir)
