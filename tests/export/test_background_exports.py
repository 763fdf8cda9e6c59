"""A run that validates and exports itself: undisturbed, killed, asked to leave, and its report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from casa_train.config.schema import ExportConfig
from casa_train.evaluate.validation import Best
from casa_train.export.background_exports import BackgroundExports
from casa_train.io.files import EXPORT_MARKER
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report.run_report import report
from casa_train.training.signals import StopRequest
from tests.helpers.commands import ROOT, TINY, environment, on_data, run, train_command
from tests.helpers.fork_server import FORK_ALL

pytestmark = pytest.mark.slow


def command(data: Path, run_dir: Path) -> list[str]:
    return train_command(
        [
            "+experiment=demo",
            *TINY,
            *on_data(data),
            f"run_dir={run_dir}",
            "trainer.steps=20",
            "optim.warmup_steps=2",
            "optim.decay_steps=4",
            "checkpoint.every=10",
            "checkpoint.keep_last=1",
            "evaluation.every=5",
            "evaluation.loss_samples=10",
            "evaluation.max_new_tokens=4",
            "export.every=10",
        ]
    )


def validated(run_dir: Path) -> list[dict[str, Any]]:
    """The records of the validations, without when they were and how long they took."""
    records = read_metrics(run_dir / "validation.jsonl")
    return [{k: v for k, v in r.items() if k not in ("seconds", "time")} for r in records]


def exported(run_dir: Path) -> dict[str, int]:
    """The step of each export, by name; each loads as a user would load it."""
    found = {}
    for path in sorted(run_dir.glob("exports/*")):
        if (path / EXPORT_MARKER).is_file():
            AutoConfig.from_pretrained(path, trust_remote_code=True)
            found[path.name] = int(json.loads((path / EXPORT_MARKER).read_text())["step"])
    return found


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def export_processes(run_dir: Path) -> list[int]:
    """Processes that export this run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if "casa_train.export" in words and str(run_dir) in words:
            found.append(int(path.parent.name))
    return found


def interrupted(arguments: list[str], run_dir: Path, step: int, number: int) -> tuple[int, str]:
    """Sends a signal once `step` is reported and an export runs; the exit code and the output."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (
        metrics.exists()
        and len(metrics.read_text().splitlines()) >= step
        and export_processes(run_dir)
    ):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, number)
    output = process.communicate(timeout=200)[0]
    return process.returncode, output


@pytest.fixture(scope="module")
def undisturbed(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that nothing happens to, but that finds something else where an export is to be.

    Its exports are forks; those of the runs that something happens to are new processes.
    """
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    foreign = run_dir / "exports" / "step_10"
    foreign.mkdir(parents=True)
    (foreign / "notes.txt").write_text("not an export")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FORK_ALL, "1")
        return run_dir, run([*command(data_dir, run_dir), "export.best=true"]).stdout


def test_a_run_validates_and_exports_itself(undisturbed: tuple[Path, str]) -> None:
    run_dir, output = undisturbed
    records = validated(run_dir)
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    losses = [r["loss"] for r in records]
    assert losses[-1] < losses[0]
    for i, record in enumerate(records):
        assert record["best_loss"] == min(losses[: i + 1])
        assert len(record["questions"]) == 8
        assert f"validation of step {record['step']}: loss {record['loss']:.4f}" in output
    best = records[-1]["best_step"]
    assert exported(run_dir) == {"best": best, "step_20": 20}
    assert "the export of step 10" in output and "failed (code 2), which ends nothing" in output
    assert "is not an export of this program" in (run_dir / "exports.log").read_text()
    # What an export read stayed until it was done, and no longer.
    assert checkpoints(run_dir) == ["step_20"]
    assert [r["step"] for r in read_metrics(run_dir / "metrics.jsonl")] == list(range(1, 21))


def test_its_report_shows_the_answers_over_time(undisturbed: tuple[Path, str]) -> None:
    run_dir, _ = undisturbed
    path, _ = report(run_dir)
    html = path.read_text()
    assert "Answers over time" in html and "Validation loss" in html
    table = html[html.index('<div class="card over-time">') :]
    table = table[: table.index("</table>")]
    assert table.count("<img src=") >= 8  # a picture for every question, two for some
    for step in (5, 10, 15, 20):
        assert f"step {step}<" in table


def test_what_a_kill_or_a_signal_cut_off_is_made_up_for(
    data_dir: Path, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = command(data_dir, run_dir)
    # Killed outright while an export of step 10 runs: it goes with the run.
    code, _ = interrupted(arguments, run_dir, 11, signal.SIGKILL)
    assert code == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while export_processes(run_dir):
        assert time.monotonic() < deadline, "an export outlived its run"
        time.sleep(0.1)
    assert exported(run_dir) == {} and checkpoints(run_dir) == ["step_10"]
    with (run_dir / "validation.jsonl").open("a") as file:
        file.write('{"step": 15, "loss": 1.0, "questio')
    # Asked to leave, it gives the export up and saves.
    code, output = interrupted(arguments, run_dir, 13, signal.SIGTERM)
    assert code == 75, output
    assert "gave up the exports of steps [10" in output
    assert not export_processes(run_dir)
    # Asked again after the last step, it has nothing to train, but asks for another start.
    code, output = interrupted(arguments, run_dir, 20, signal.SIGTERM)
    assert code == 75, output
    assert json.loads((run_dir / "requeue.json").read_text())["step"] == 20
    assert "step_20" in checkpoints(run_dir) and 20 not in exported(run_dir).values()
    # The last attempt finishes everything; nobody can tell it from the undisturbed run.
    output = run(arguments).stdout
    assert "resuming from" in output and not (run_dir / "requeue.json").exists()
    assert exported(run_dir) == {"step_10": 10, "step_20": 20}
    assert validated(run_dir) == validated(undisturbed[0])
    # A finished run has nothing left to do.
    shutil.rmtree(run_dir / "exports" / "step_10")
    output = run(arguments).stdout
    assert "nothing to do" in output and "exported" not in output


def test_waiting_for_an_export_ends_when_the_run_has_to_leave(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(undisturbed[0], run_dir)
    shutil.rmtree(run_dir / "exports")
    lines: list[str] = []
    best = Best(step=20)
    exports = BackgroundExports(run_dir, ExportConfig(every=10, best=True), lines.append, best)
    exports.after_save(20)
    assert exports.pinned() == {20}
    while not export_processes(run_dir):  # between fork and exec it has no name of its own
        assert exports._running is not None and exports._running[2].poll() is None
    exports.after_save(7)  # neither a multiple nor the best
    assert exports.pinned() == {20}
    exports.after_failed_save(20)
    assert lines[-1] == "warning: step 20 is the best so far, but exports/best stays as it was"
    exports.close(None)  # the last step is done: what runs may go on
    assert exports.pinned() == {20}
    stop = StopRequest(0)
    stop.signal = "SIGTERM"
    assert not exports.finish(stop)
    assert not export_processes(run_dir) and exports.pinned() == set()
    assert any("gave up the exports of steps [20]" in line for line in lines)
