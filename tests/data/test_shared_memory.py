"""Shared memory too small for what loader processes hand over: said before the first step."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from casa_train.config.data_schema import DataConfig
from casa_train.data.shared_memory import check_shared_memory, ranks_beside
from casa_train.errors import UserError
from tests.helpers.commands import ROOT, TINY, environment, on_data
from tests.helpers.small_disk import small_disk

MIB = 1 << 20


def test_what_a_step_needs_is_compared_with_what_is_free(tmp_path: Path) -> None:
    data = DataConfig(image_tokens=446, text_tokens=100, workers=2, packs_per_step=6)
    pack = 446 * 28 * 28 * 3 + 100 * 64  # 1.01 MiB
    with small_disk(tmp_path / "shm", "20m") as where:
        # Two workers, four packs of each waiting; and two ranks' steps of six packs.
        check_shared_memory(data, world=2, beside=1, pinned=False, side=28, where=where)
        with pytest.raises(UserError) as refusal:
            check_shared_memory(data, world=2, beside=2, pinned=False, side=28, where=where)
        message = str(refusal.value)
        assert f"{where} has 20 MiB free" in message
        assert f"need up to {2 * (2 * 4 + 3) * pack / MIB:,.0f} MiB" in message
        for way in ("data.workers=0", "--shm-size", "--ipc=host", "emptyDir", "2 ranks x"):
            assert way in message, way
        check_shared_memory(data, world=2, beside=2, pinned=True, side=28, where=where)
        data.workers = 3
        with pytest.raises(UserError, match=r"data\.workers=3 x 4 packs that wait \+ 1 in use"):
            check_shared_memory(data, world=2, beside=2, pinned=True, side=28, where=where)
        (where / "others").write_bytes(bytes(12 * MIB))
        data.workers = 2
        with pytest.raises(UserError, match="has 8 MiB free"):
            check_shared_memory(data, world=6, beside=1, pinned=True, side=28, where=where)
        data.workers = 0
        check_shared_memory(data, world=2, beside=99, pinned=False, side=28, where=where)
    check_shared_memory(DataConfig(), 1, 1, False, 28, tmp_path / "absent")


def test_ranks_of_other_machines_have_their_own(tmp_path: Path) -> None:
    assert ranks_beside(lambda own: [own, own, ("other", own[1]), (own[0], -1)], tmp_path) == 2


@pytest.mark.slow
def test_a_run_is_refused_before_its_first_step(data_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["data.workers=2", "data.image_tokens=4000", "trainer.steps=2", f"run_dir={run}"]
    train = [sys.executable, "-m", "casa_train", "+experiment=demo", *TINY, *on_data(data_dir)]
    shell = 'mount -t tmpfs -o size=16m shm /dev/shm || exit 99; exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", shell, "sh", *train, *more]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no unshare here")
    if done.returncode in (1, 99):
        pytest.skip(f"mounting is not allowed here: {done.stderr[-200:]}")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: /dev/shm has 16 MiB free"), lines
    assert not run.exists()
