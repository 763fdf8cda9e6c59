"""launch/gpu_check.sh: its rehearsal on a CPU passes; what fails is reported and stops no other."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from casa_train.errors import UserError
from launch.gpu_check import RESULT, main, prepare
from launch.gpu_runner import Check, Failed, Result, Running, Stage
from launch.gpu_stages import FULL, REHEARSAL, STAGES, insertion
from tests.helpers.commands import ROOT, environment

Work = Callable[[Running], str]


def checked(tmp_path: Path, *stages: Stage, **figures: float) -> dict[str, Result]:
    """Runs stages of a test's own on a card of 10 GiB."""
    check = Check(stages, tmp_path, tmp_path, REHEARSAL, 10 << 30, environment(), 60)
    for result in check.results.values():
        result.figures.update(figures)
    check.run()
    return check.results


def python(code: str) -> Work:
    return lambda running: running.run("-c", code)


@pytest.mark.slow
def test_the_script_takes_the_interpreter_that_it_is_told(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\necho "of mine: $@"\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    env = {**environment(), "PYTHON": str(fake)}
    command = [str(ROOT / "launch/gpu_check.sh"), "--only", "trian"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: 'trian' is no stage")
    assert done.stdout.splitlines()[-1] == "of mine: -m launch.gpu_check --only trian"


def test_an_interpreter_without_the_packages_is_refused() -> None:
    bare = Path(sys.base_prefix) / "bin" / "python3"
    env = {"PYTHON": f"{bare}", "PATH": "/usr/bin:/bin", "PYTHONNOUSERSITE": "1"}
    command = [ROOT / "launch/gpu_check.sh"]
    if subprocess.run([bare, "-c", "import torch, deepspeed"], env=env).returncode == 0:
        pytest.skip(f"{bare} has the packages")
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "deepspeed" in done.stderr and done.stderr.endswith("PYTHON=...\n")


def as_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a user, of whose commands pytest is one; they can be forks."""
    for name in [name for name in environment() if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_without_a_gpu_it_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert said.startswith("error: no GPU: torch 2.") and "--cpu-rehearsal runs" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "trian"], "'trian' is no stage; expected one of tests, estimate, data"),
        (["--limit", "steps=5"], "'steps' is no stage"),
        (["--limit", "train"], "--limit is 'train'; expected STAGE=SECONDS"),
    ],
)
def test_an_unknown_stage_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--cpu-rehearsal"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("made", [True, False])
def test_a_folder_that_cannot_be_one_is_refused(
    made: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").touch()
    out = tmp_path / "out" if made else tmp_path / "out" / "below"
    assert main([str(out), "--cpu-rehearsal"]) == 2
    assert f"error: OUT is {out}: " in capsys.readouterr().err


def test_results_of_an_earlier_check_are_gone_and_a_second_one_waits(tmp_path: Path) -> None:
    for name in (RESULT, "casa.json", "casa.log", "notes.txt"):
        (tmp_path / name).touch()
    with prepare(tmp_path, STAGES):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "notes.txt"]
        with pytest.raises(UserError, match="another check"):
            prepare(tmp_path, STAGES)
    prepare(tmp_path, STAGES).close()


@pytest.mark.fresh
def test_no_process_of_a_stage_outlives_it(tmp_path: Path) -> None:
    child = tmp_path / "child"
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(child.pid))
sys.exit(3)
"""
    assert not checked(tmp_path, Stage("left", 60, python(code)))["left"].passed
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child.read_text()}").exists():
        state = Path(f"/proc/{child.read_text()}/stat").read_text().split()[2]
        assert state == "Z" or time.monotonic() < deadline
        if state == "Z":
            break


def test_a_failed_stage_stops_no_other_but_those_that_need_it(tmp_path: Path) -> None:
    found = checked(
        tmp_path,
        Stage("bad", 60, python("import sys; print('no luck'); sys.exit(3)")),
        Stage("slow", 0.2, python("import time; time.sleep(3600)")),
        Stage("odd", 60, lambda running: str(json.loads("no JSON"))),
        Stage("after", 60, python("print()"), needs=("good", "bad")),
        Stage("good", 60, lambda running: running.run("-c", "print(6 * 7)").splitlines()[-1]),
        Stage("last", 60, lambda running: "done", needs=("good",), timed=True),
    )
    assert [name for name, result in found.items() if result.passed] == ["good", "last"]
    assert found["good"].said == "42"
    assert found["bad"].said == f"left with code 3; {tmp_path / 'bad.log'}: no luck"
    assert found["slow"].said.startswith("it took longer than its time; ")
    assert found["odd"].said.startswith("JSONDecodeError: Expecting value")
    assert found["after"].said == "not run: it needs bad, which failed"


def test_when_all_time_is_used_up_the_rest_is_not_run(tmp_path: Path) -> None:
    ran = []
    stage = Stage("late", 60, lambda running: str(ran.append(1)), timed=True)
    check = Check([stage], tmp_path, tmp_path, REHEARSAL, None, environment(), seconds=0)
    check.run()
    assert not ran and not check.results["late"].passed
    assert "no time was left; give it more with --minutes" in check.results["late"].said


def test_a_stage_that_runs_out_of_memory_says_what_it_tried(tmp_path: Path) -> None:
    code = "import sys; sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried 2.00 GiB')"
    found = checked(tmp_path, Stage("big", 60, python(code)), estimated_bytes=12.5 * 2**30)
    said = found["big"].said
    assert said.startswith("out of memory; a dry run estimates 12.5 GiB; the card has 10.0 GiB; ")
    assert f"tried: {found['big'].tried}; torch.OutOfMemoryError: CUDA out" in said
    assert found["big"].tried.startswith("python -c ")


def test_a_word_of_memory_long_before_the_end_is_no_reason(tmp_path: Path) -> None:
    printed = "'out of memory? no' + 60 * '\\nx', flush=True"
    code = f"print({printed}); raise SystemExit('it does not fit')"
    said = checked(tmp_path, Stage("odd", 60, python(code)))["odd"].said
    assert said.startswith("left with code 1") and said.endswith("it does not fit")


def test_an_earlier_command_that_failed_for_another_reason_is_not_blamed(tmp_path: Path) -> None:
    def work(running: Running) -> str:
        running.run("-c", "print('out of memory, but it went on')")
        raise Failed(running.why("nothing of it", 1))

    assert checked(tmp_path, Stage("two", 60, work))["two"].said.endswith("two.log: nothing of it")


@pytest.mark.parametrize(
    ("card", "chosen", "broken"),
    [(139.8, "none", False), (79.1, "vision", True), (70.0, "all", False), (23.5, "all", False)],
)
def test_steps_checkpoint_no_more_activations_than_the_card_asks_for(
    card: float, chosen: str, broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Estimates of helium_insertion; eager and compiled stand beside each other."""
    gib = 2**30
    estimates = {"none": 81.3 * gib, "vision": 73.8 * gib, "all": 42.5 * gib}
    asked: list[tuple[str, ...]] = []

    def benchmark(self: Running, *words: str) -> dict[str, Any]:
        asked.append(words)
        row = {"mfu": 0.234, "text_tokens_per_second": 1198.4, "peak_bytes": 36.9 * gib}
        rows = [row, {**row, "mfu": 0.4, "text_tokens_per_second": 2048.0}]
        self.figures["results"] = rows[: 1 if broken else 2]
        if broken:
            raise Failed("the second of them did not fit")
        return self.figures

    monkeypatch.setattr(Running, "benchmark", benchmark)
    stages = [stage for stage in STAGES if stage.name in ("estimate", "insertion")]
    check = Check(stages, tmp_path, tmp_path, FULL, int(card * gib), {}, 60)
    check.results["estimate"].figures["helium_insertion"] = estimates
    if broken:
        with pytest.raises(Failed) as caught:
            insertion(Running(check, check.results["insertion"], end=0))
        said = str(caught.value)
    else:
        said = insertion(Running(check, check.results["insertion"], end=0))
    arm = f"helium_insertion,parallel.activation_checkpointing={chosen},parallel.compile="
    few = "--steps", "3", "--warm-up", "1"
    assert asked == [("step", arm + "off", arm + "on", *few)]
    share = f"36.9 GiB ({36.9 * gib / estimates[chosen]:.2f} of the estimate)"
    eager = f"activation checkpointing {chosen}: eager 1,198 text tokens/s, 23.4% MFU, {share}"
    if broken:
        assert said == f"the second of them did not fit; before, {eager}"
    else:
        assert said == f"{eager}; compiled 2,048 text tokens/s, 40.0% MFU, {share}"


@pytest.mark.slow
def test_the_rehearsal_passes_and_its_file_tells_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_a_user(monkeypatch)
    assert main([str(tmp_path), "--cpu-rehearsal"]) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / RESULT).read_text())
    assert found["passed"] and found["rehearsal"] and found["commit"]
    assert found["card"]["name"] is None and found["versions"]["torch"].startswith("2.")
    stages = {stage["stage"]: stage for stage in found["stages"]}
    assert list(stages) == [stage.name for stage in STAGES]
    assert all(stage["passed"] and stage["said"] for stage in stages.values())
    figures = {name: stage["figures"] for name, stage in stages.items()}
    assert figures["tests"]["skipped"] == figures["tests"]["tests"] > 20  # here is no GPU
    assert figures["kill"]["step"] >= 3 and figures["resume"]["from_step"] in (2, 4)
    assert figures["train"]["audit of step"].endswith("0 frozen ones did not")
    assert "63 image tokens went forward and backward" in figures["train"]["worst case:"]
    assert "logits equal to" in figures["export"]["gate"]
    assert list(figures["stream"]["streams"]) == ["casa"]
    assert list(figures["streaming"]["streams"]) == ["casa", "insertion"]
    assert {row["backend"] for row in figures["attention"]["rows"]} == {"sdpa"}
    for name, experiment in (("casa", "demo"), ("insertion", "demo,fusion=insertion")):
        row = figures[name]["results"][0]
        assert row["experiment"] == f"{experiment},parallel.activation_checkpointing=none"
        estimates = figures["estimate"][experiment]
        assert estimates["none"] >= estimates["vision"] >= estimates["all"] > 0
        assert row["peak_of_estimate"] == row["peak_bytes"] / estimates["none"]
    assert [len(figures[name]["results"]) for name in ("casa", "insertion")] == [2, 1]
    fp8 = figures["casa"]["results"][1]["experiment"]
    assert fp8.endswith(",parallel.frozen_precision=fp8")
    printed = capsys.readouterr().out
    table = printed[printed.index("\nstage") :]
    assert [line.split()[:2] for line in table.splitlines()[2:14]] == [
        [stage.name, "passed"] for stage in STAGES
    ]
    assert not list(tmp_path.glob("work_*"))


@pytest.mark.slow
def test_a_stage_that_fails_is_reported_and_leaves_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here all tests for a GPU skip themselves, which they may not where there must be one."""
    as_a_user(monkeypatch)
    monkeypatch.setenv("GPU_REQUIRED", "1")
    only = ["--only", "tests", "--only", "attention"]
    assert main([str(tmp_path), "--cpu-rehearsal", *only]) == 1
    tests, attention = json.loads((tmp_path / RESULT).read_text())["stages"]
    assert not tests["passed"] and tests["said"].startswith("left with code 1; ")
    assert tests["figures"]["tests"] == tests["figures"]["errors"] > 20
    assert attention["passed"]
    assert "tests      FAILED" in capsys.readouterr().out
    assert "GPU_REQUIRED is 1, but this skipped itself" in (tmp_path / "tests.log").read_text()
