"""Sinks: TensorBoard and wandb continue a run, a full disk loses no line, and none ends a run."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from casa_train.config.schema import Config, MetricsConfig
from casa_train.metrics.fields import FIELDS, scalars
from casa_train.metrics.sinks import wandb as wandb_sink
from casa_train.metrics.sinks.console import ConsoleSink
from casa_train.metrics.sinks.guarded import Guarded
from casa_train.metrics.sinks.jsonl import JsonlSink, last_step, read_metrics
from casa_train.metrics.sinks.opening import open_sinks
from tests.helpers.commands import ROOT, run
from tests.helpers.small_disk import Filler, small_disk


def record(step: int, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = dict.fromkeys(FIELDS, 1.0)
    made |= {"step": step, "time": 1e9 + step, "loss": 10.0 - step, "skipped": False, "mfu": None}
    made |= {"rates": {"fusion": 1e-4}, "samples_digest": "abc"}
    made |= {"sources": {"docs/a": {"loss": 2.0, "answer_tokens": 7}}}
    return made | changes


def config(**metrics: Any) -> Config:
    made = Config(name="unit", metrics=MetricsConfig(**metrics))
    made.trainer.steps, made.trainer.log_every = 6, 1
    return made


def start(run_dir: Path, first: int, last: int, settings: Config) -> None:
    """One start of a run that reports these steps."""
    sinks = open_sinks(settings, run_dir / "metrics.jsonl", first - 1)
    for step in range(first, last + 1):
        for sink in sinks:
            sink.write(record(step, loss=float(10 * first + step)))
    for sink in sinks:
        sink.close()


def test_numbers_are_named_by_section() -> None:
    found = scalars(record(3, loss=None, gradient_norm=float("nan")))
    assert found["training/rates/fusion"] == 1e-4
    assert found["training/sources/docs/a/loss"] == 2.0
    assert found["speed/tflops"] == 1.0 and found["training/skipped"] == 0.0
    absent = {"training/loss", "training/gradient_norm", "data/samples_digest", "speed/mfu"}
    assert not absent & found.keys()


def test_a_resumed_run_continues_its_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    start(tmp_path, 1, 5, config())
    start(tmp_path, 4, 6, config())  # steps 4 and 5 came behind the checkpoint
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6
    events = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("training/loss")]
    assert losses == [(1, 11.0), (2, 12.0), (3, 13.0), (4, 44.0), (5, 45.0), (6, 46.0)]
    assert events.Scalars("training/loss")[0].wall_time == 1e9 + 1
    assert "switched off" not in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_switched_off_is_not_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.metrics.test_sinks import config, start;"
        "start(Path(sys.argv[1]), 1, 1, config(tensorboard=False));"
        "assert not {'tensorboard', 'wandb'} & set(sys.modules), sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
    assert not (tmp_path / "tensorboard").exists()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment in which nobody is logged in to wandb."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(home))
    return monkeypatch


@pytest.mark.slow
def test_wandb_without_a_login_writes_one_run_into_files(
    tmp_path: Path, nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    settings = config(tensorboard=False, wandb=True, wandb_tags=["a", "b"])
    start(run_dir, 1, 3, settings)
    start(run_dir, 4, 6, settings)
    output = capsys.readouterr().out
    assert output.count("wandb is offline (nobody is logged in") == 2
    assert "switched off" not in output
    directories = sorted((run_dir / "wandb").glob("offline-run-*"))
    run_id = (run_dir / "wandb_id").read_text().strip()
    assert len(directories) == 2 and all(d.name.endswith(run_id) for d in directories)
    for directory in directories:
        (log,) = directory.glob("run-*.wandb")
        # wandb's own process writes the file, often a moment after the run has finished.
        deadline = time.monotonic() + 30
        while b"training/loss" not in log.read_bytes():
            assert time.monotonic() < deadline, "the file stays empty"
            time.sleep(0.1)
        assert b"casa_train" in log.read_bytes()


@pytest.mark.parametrize("listens", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_wandb_does_not_wait_for_a_server_that_does_not_answer(
    tmp_path: Path, nobody: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], listens: bool
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen(50)  # and says nothing, ever
            nobody.setattr(wandb_sink, "INIT_SECONDS", 3.0)
        address = f"127.0.0.1:{server.getsockname()[1]}"
        nobody.setenv("WANDB_BASE_URL", f"http://{address}")
        nobody.setenv("WANDB_API_KEY", "0" * 40)
        began = time.monotonic()
        start(tmp_path, 1, 2, config(tensorboard=False, wandb=True))
    assert time.monotonic() - began < 90  # with the start of wandb's service on a busy machine
    output = capsys.readouterr().out
    reason = "CommError" if listens else re.escape(f"{address} is out of reach")
    assert re.search(rf"wandb is offline \({reason}", output) and "switched off" not in output
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_a_sink_that_fails_is_switched_off_with_one_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("in the way")
    start(tmp_path, 1, 3, config())
    output = capsys.readouterr().out
    assert output.count("metrics.tensorboard is switched off") == 1
    assert "training goes on" in output and "step 3/6" in output
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


@pytest.mark.slow
def test_a_disk_that_fills_switches_tensorboard_off_without_a_traceback(tmp_path: Path) -> None:
    code = (
        "import resource, sys, time; from pathlib import Path;"
        "from casa_train.metrics.sinks.guarded import Guarded;"
        "from casa_train.metrics.sinks.tensorboard import TensorBoardSink;"
        "from tests.metrics.test_sinks import record;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY));"
        "name, path = 'metrics.tensorboard', Path(sys.argv[1]);"
        "sink = Guarded(name, lambda: TensorBoardSink(path, 0), print);"
        "[sink.write(record(step)) for step in range(1, 500)];"
        "sink.close(); time.sleep(1)"  # the library's thread would have its time to complain
    )
    done = run([sys.executable, "-c", code, str(tmp_path)])
    assert done.stdout.count("metrics.tensorboard is switched off") == 1
    assert "OSError" in done.stdout and "Traceback" not in done.stderr


def test_a_sink_that_fails_later_is_closed() -> None:
    warnings: list[str] = []
    stream = io.StringIO()
    console = Guarded("the console", lambda: ConsoleSink(6, 0, 1, stream), warnings.append)
    console.write(record(1))
    assert stream.getvalue().startswith("step 1/6")
    stream.close()
    console.write(record(2))
    console.write(record(3))
    console.log("anything")
    console.close()
    assert len(warnings) == 1 and "closed file" in warnings[0]


def test_a_console_that_goes_away_ends_nothing_and_comes_back(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        filler = Filler(disk)
        with (disk / "log").open("w") as stream:
            console = ConsoleSink(6, 0, 1, stream)
            filler.fill()
            console.write(record(1))
            filler.empty()
            console.write(record(2))
        assert (disk / "log").read_text().splitlines()[-1].startswith("step 2/6")


def test_the_last_step_is_that_of_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_step(path) is None
    path.write_text("")
    assert last_step(path) is None
    path.write_text('{"step": 8}\n{"step": 9, "filler": "' + "x" * 100_000 + '"}\n{"step": 10, "l')
    assert last_step(path) == 9


def test_lines_wait_until_a_full_disk_has_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as disk:
        warnings: list[str] = []
        sink = JsonlSink(disk / "metrics.jsonl", warnings.append)
        sink.write(record(1))
        filler = Filler(disk)
        filler.path.write_bytes(b"x" * 56_000)
        written = 1
        while not warnings:
            written += 1
            assert written < 100, "the disk never filled up"
            sink.write(record(written))
        sink.write(record(written + 1))
        assert len(warnings) == 1 and "No space left" in warnings[0]
        filler.empty()
        sink.write(record(written + 2))
        sink.close()
        lines = (disk / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, written + 3))
