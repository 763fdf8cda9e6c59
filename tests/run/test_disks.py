"""Full and read-only disks: said before training, survived in it; nothing is half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from casa_train.checkpoint.disk_space import (
    check_room,
    check_writable,
    checkpoint_bytes,
    saves_left,
)
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.config.schema import CheckpointConfig, Config, TrainerConfig
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER, write_atomic
from casa_train.io.log import LineFile, warn
from casa_train.metrics.sinks.jsonl import JsonlSink, read_metrics
from casa_train.run.directory import prepare_run_directory, request_requeue
from casa_train.run.lock import RunLock
from casa_train.training.signals import EXIT_REQUEUE
from tests.helpers.commands import ROOT, environment, train_command
from tests.helpers.runs import leaving_run, start_ranks
from tests.helpers.small_disk import Filler, remount, small_disk
from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "8m") as where:
        yield where


def test_lines_wait_for_room_and_none_is_cut(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filler = Filler(disk)
    sink = JsonlSink(disk / "metrics.jsonl")
    record = {"step": 1, "text": "x" * 3000}  # two of them need a new page
    sink.write(record)
    filler.fill()
    for step in (2, 3, 4):
        sink.write({**record, "step": step})
        lines = (disk / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1]
    warning = capsys.readouterr().err
    assert warning.count("No space left on device") == 1 and "metrics.jsonl" in warning
    filler.empty()
    sink.write({**record, "step": 5})
    assert [r["step"] for r in read_metrics(disk / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert "4 lines had waited" in capsys.readouterr().err
    remount(disk, "ro")
    sink.write({**record, "step": 6})
    assert "Read-only file system" in capsys.readouterr().err
    remount(disk, "rw")
    sink.close()
    assert [r["step"] for r in read_metrics(disk / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_waiting_lines_are_bounded_and_what_is_lost_is_said(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = LineFile(disk / "absent" / "lines", warn, most=3)
    for number in range(5):
        file.add([str(number)])
    (disk / "absent").mkdir()
    file.add(["5"])
    assert (disk / "absent" / "lines").read_text() == "3\n4\n5\n"
    assert "3 were dropped" in capsys.readouterr().err
    file.path = disk / "nowhere" / "lines"
    file.add(["6", "7"])
    file.close()
    assert "the last 2 lines could not be written" in capsys.readouterr().err


def test_a_line_that_a_kill_cut_short_is_ended(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n{"b"')
    LineFile(tmp_path / "lines", warn).add(['{"c": 3}'])
    assert (tmp_path / "lines").read_text() == '{"a": 1}\n{"b"\n{"c": 3}\n'


def test_an_atomic_write_leaves_the_old_file_on_a_full_disk(disk: Path) -> None:
    write_atomic(disk / "file", "old")
    Filler(disk).fill()
    with pytest.raises(OSError, match="No space left"):
        write_atomic(disk / "file", "new" * 10_000)
    assert (disk / "file").read_text() == "old"
    assert sorted(p.name for p in disk.iterdir()) == ["file", "filler"]


def test_a_directory_that_takes_no_files_is_named(disk: Path) -> None:
    check_writable(disk, 0)
    assert not list((disk / "checkpoints").iterdir())
    Filler(disk).fill()
    with pytest.raises(UserError, match=f"{disk}.* takes no more files: .*No space left"):
        check_writable(disk, 0)
    with pytest.raises(UserError, match="takes no more files"):
        RunLock(disk)
    Filler(disk).empty()
    remount(disk, "ro")
    with pytest.raises(UserError, match="cannot be written: .*Read-only file system"):
        check_writable(disk, 0)
    with pytest.raises(UserError, match="Read-only file system"):
        RunLock(disk / "run")


def test_what_cannot_be_deleted_stops_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = CheckpointManager(
        tmp_path, CheckpointConfig(keep_last=1), {}, Ranks(out=said.append)
    )
    with small_disk(tmp_path / "step_1.deleted" / "in_use", "64k"):
        assert checkpoints.latest() is None
        checkpoints.save(2, lambda path: None, {})
        checkpoints.save(3, lambda path: None, {})
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1.deleted", "step_3"]
        assert "step_1.deleted could not be deleted" in said[0] and "busy" in said[0]
    checkpoints.save(4, lambda path: None, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step_4"]


def test_a_requeue_that_cannot_be_asked_for_is_no_success(disk: Path) -> None:
    Filler(disk).fill()
    with pytest.raises(UserError, match="no batch script will start .* goes on from step 5"):
        request_requeue(disk, 5, "signal")
    assert [p.name for p in disk.iterdir()] == ["filler"]


def test_room_for_the_checkpoints_held_at_once(disk: Path) -> None:
    model = nn.Linear(999, 100, device="meta")  # 99,900 weights and 100 biases
    model.bias.requires_grad_(False)
    assert checkpoint_bytes(model.parameters(), "bf16") == (12 * 99_900, 2 * 100)
    assert checkpoint_bytes(model.parameters(), "fp32") == (12 * 99_900, 4 * 100)
    (disk / "checkpoints").mkdir()
    config = Config(run_dir=str(disk))
    config.trainer, config.checkpoint = TrainerConfig(steps=50), CheckpointConfig(every=10)
    with (disk / "other").open("wb") as file:
        file.truncate(1 << 20)
        file.write(bytes(5_000_000))

    def check(step: int, held: int, frozen_there: bool = False) -> None:
        check_room(config, model.parameters(), step, held, frozen_there)

    # 3.3 MB are free, a checkpoint has 1.2 MB.
    with pytest.raises(
        UserError,
        match=r"once need 3,596,600 more: 3 of 1,198,800 bytes each, since checkpoint.keep_last is "
        "2 and .* goes, and once 200 bytes of frozen weights. Make",
    ):
        check(0, 0)
    check(20, 1)
    check(40, 0)
    check(50, 0)
    config.checkpoint.keep_last = 1
    check(0, 0)

    # Most of a model is frozen: its weights are written once, and not again where they are.
    model.requires_grad_(False)
    model.bias.requires_grad_(True)
    with (disk / "more").open("wb") as file:
        file.write(bytes(3_200_000))
    free = shutil.disk_usage(disk).free
    assert 2 * 1_200 < free < 199_800
    with pytest.raises(UserError, match="2 of 1,200 bytes each.* and once 199,800 bytes of frozen"):
        check(0, 0)
    check(20, 1, frozen_there=True)
    check(50, 1)  # nothing more to write


def test_saves_that_are_left() -> None:
    def count(step: int, steps: int, every: int) -> int:
        return sum(s % every == 0 or s == steps for s in range(step + 1, steps + 1))

    for steps in (1, 9, 10, 11, 30):
        for every in (1, 3, 10, 40):
            for step in range(steps + 2):
                assert saves_left(step, steps, every) == count(step, steps, every)


def test_the_lock_stays_when_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    lock = RunLock(tmp_path)
    config = Config(run_dir=str(tmp_path), checkpoint=CheckpointConfig(resume="never"))
    prepare_run_directory(tmp_path, config)
    assert (tmp_path / "previous_1" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="in use by host"):
        RunLock(tmp_path)
    lock.close()


@pytest.mark.slow
def test_the_holder_on_another_host_is_named(tmp_path: Path) -> None:
    """In a namespace of its own with another host's name."""
    code = (
        "import socket, sys; socket.sethostname('node-17'); from pathlib import Path;"
        "from casa_train.run.lock import RunLock;"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        ["unshare", "--uts", sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env={**environment(), "SLURM_JOB_ID": "4711"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stderr is not None
    if holder.stdout.readline() != "held\n":
        pytest.skip(f"no host name of its own is allowed here: {holder.stderr.read()[-200:]}")
    with pytest.raises(UserError, match=rf"host node-17, pid {holder.pid}, job 4711"):
        RunLock(tmp_path)
    holder.communicate()
    RunLock(tmp_path).close()


def test_an_export_on_a_full_disk_leaves_the_earlier_one(disk: Path) -> None:
    torch.manual_seed(0)
    write_tiny_export(disk / "export")
    before = {p.name: p.read_bytes() for p in (disk / "export").iterdir()}
    filler = Filler(disk)
    filler.fill()
    with filler.path.open("r+b") as file:  # room for the small files, not for the weights
        file.truncate(filler.path.stat().st_size - 200_000)
    with pytest.raises(UserError, match="No space left on device.* earlier export is as it was"):
        write_tiny_export(disk / "export")
    assert {p.name: p.read_bytes() for p in (disk / "export").iterdir()} == before
    assert sorted(p.name for p in disk.iterdir()) == ["export", "filler"]
    # Killed between the two renames: the next one finds the earlier export again.
    (disk / "export").rename(disk / "export_stale")
    with pytest.raises(UserError, match="earlier export is as it was"):
        write_tiny_export(disk / "export")
    assert (disk / "export" / EXPORT_MARKER).is_file()
    filler.empty()
    write_tiny_export(disk / "export")
    assert sorted(p.name for p in disk.iterdir()) == ["export"]


@pytest.mark.slow
def test_a_run_whose_disk_is_full(data_dir: Path, tmp_path: Path) -> None:
    """Refused before training; in training a signal's save fails, then the last step's."""
    run_dir = tmp_path / "run"
    command = train_command(leaving_run(data_dir, run_dir))
    with small_disk(tmp_path / "disk", "8m") as disk:
        run_dir.mkdir()
        (run_dir / "checkpoints").symlink_to(disk)
        filler = Filler(disk)
        log = disk / "log"  # the console is a file on the same disk

        def attempt(full_after: int | None, signalled: bool = False) -> list[int]:
            """Exit codes of two ranks whose disk is full once a step has been saved."""
            with log.open("w") as console:
                ranks = start_ranks(command, console)
            if full_after is not None:
                wait_for(disk / f"step_{full_after}", ranks)
                filler.fill()
            if signalled:
                ranks[1].send_signal(signal.SIGUSR1)
            codes = [process.wait(timeout=200) for process in ranks]
            filler.empty()
            return codes

        filler.path.write_bytes(bytes(7_000_000))
        assert attempt(None) == [2, 2], log.read_text()
        assert "bytes are free" in log.read_text() and "step 1/" not in log.read_text()

        assert attempt(5, signalled=True) == [EXIT_REQUEUE] * 2
        asked = json.loads((run_dir / "requeue.json").read_text())
        assert asked == {"step": 5, "reason": "signal"}
        assert len(read_metrics(run_dir / "metrics.jsonl")) > 5
        assert [p.name for p in disk.glob("step_*")] == ["step_5"]

        assert attempt(10) == [2, 2]
        assert sorted(p.name for p in disk.glob("step_*")) == ["step_10", "step_5"]
        assert len(read_metrics(run_dir / "metrics.jsonl")) == 14


def wait_for(path: Path, ranks: list[subprocess.Popen[str]]) -> None:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in ranks), path
        time.sleep(0.002)
