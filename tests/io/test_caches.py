"""A cache that cannot be written is named with the way out, and nothing waits for it to mend."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from casa_train.data.stream.row_groups import Retries
from casa_train.errors import UserError
from casa_train.io.caches import check_cache, permanent, unwritable_cache
from tests.helpers import published
from tests.helpers.commands import environment
from tests.helpers.small_disk import remount, small_disk
from tests.helpers.tiny_export import write_tiny_export

LOAD = """
import sys
from pathlib import Path
from casa_train.export.loading import load_processor
from casa_train.errors import UserError
try:
    load_processor(Path(sys.argv[1]))
except UserError as error:
    print(error)
"""
STREAM = """
import sys
from casa_train.config.data_schema import StreamDatasetConfig
from casa_train.data.stream.row_groups import Retries
from casa_train.data.stream.subsets import open_subset, subset_names
from casa_train.errors import UserError
retries = Retries(8, 60.0)
for work in (
    lambda: open_subset(StreamDatasetConfig(source=sys.argv[1]), "chartqa", retries),
    lambda: subset_names("owner/name", None, retries),
):
    try:
        work()
    except UserError as error:
        print(error)
    else:
        print("read")
"""


def refused(number: int, path: str) -> OSError:
    return OSError(number, "said by a test", path)


def test_what_no_second_try_mends() -> None:
    for error in (
        refused(errno.EROFS, "/a"),
        refused(errno.ENOSPC, "/a"),
        refused(errno.ENOTDIR, "/a"),
        PermissionError("told by a server"),
        FileNotFoundError("/a"),
        OfflineModeIsEnabled("offline"),
    ):
        assert permanent(error), error
    for error in (
        refused(errno.ECONNRESET, "/a"),
        TimeoutError("slow"),
        ConnectionError("gone"),
        LocalEntryNotFoundError("not in the cache, and no connection"),
        ValueError("no idea"),
    ):
        assert not permanent(error), error
    wrapped = RuntimeError("a library's own")
    wrapped.__cause__ = refused(errno.EROFS, "/a")
    assert permanent(wrapped)
    assert permanent(ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"))


def test_only_a_cache_is_blamed_on_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HOME", "/nowhere/home/hf")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "/nowhere/home/hf/hub")
    monkeypatch.setenv("HF_MODULES_CACHE", "/other/modules")
    for error, folder in (
        (refused(errno.EROFS, "/nowhere/home/hf/hub/models--x"), "/nowhere/home/hf/hub"),
        (refused(errno.EACCES, "/nowhere/home"), "/nowhere/home/hf/hub"),
        (refused(errno.ENOENT, "/nowhere"), "/nowhere/home/hf/hub"),
        (refused(errno.EROFS, "/other/modules/x"), "/other/modules"),
    ):
        message = unwritable_cache(error)
        assert message is not None and message.startswith(f"{folder}, a cache"), message
        assert "Set HF_HOME to one" in message
    for error in (
        refused(errno.EACCES, "/data/train"),
        refused(errno.ENOENT, "/nowhere/home/hf/hub/models--x"),
        refused(errno.ECONNRESET, "/nowhere/home/hf/hub/models--x"),
        OSError("no path"),
    ):
        assert unwritable_cache(error) is None, error


def test_a_permanent_error_is_not_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    tried = 0

    def work() -> None:
        nonlocal tried
        tried += 1
        raise refused(errno.EROFS, "/data/x")

    with pytest.raises(UserError, match="x.parquet cannot be read: .*said by a test"):
        Retries(8, 60.0).run("x.parquet", work)
    assert tried == 1 and capsys.readouterr().err == ""


def call(home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in environment().items() if not k.startswith(("HF_", "XDG_"))}
    env = {**inherited, "HOME": str(home), "MPLCONFIGDIR": str(home.parent / "mpl"), **more}
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_commands_name_a_home_that_cannot_be_written(
    kind: str, data_dir: Path, tmp_path: Path
) -> None:
    write_tiny_export(tmp_path / "export")
    source = published.finevision(tmp_path / "source", [[published.fine_row(n) for n in range(3)]])

    def check(home: Path) -> None:
        folder = f"{home}/.cache/huggingface"
        loaded = call(home, "-c", LOAD, str(tmp_path / "export"))
        assert loaded.stdout.startswith(f"{folder}/modules, a cache"), loaded.stderr[-2000:]
        recipe = ["-m", "data_recipes", "finevision", "--source", str(source)]
        recipe += ["--tokenizer", str(data_dir / "tokenizer"), "--template", "demo"]
        prepared = call(home, *recipe, "--out", str(tmp_path / "out"), "--workers", "1")
        assert prepared.returncode == 2, prepared.stderr[-2000:]
        assert prepared.stderr.startswith("error: ") and "Traceback" not in prepared.stderr
        assert f"{folder}/" in prepared.stderr and "Set HF_HOME to one" in prepared.stderr
        streamed = call(home, "-c", STREAM, str(source), HF_HUB_OFFLINE="1")
        assert "attempt 2" not in streamed.stderr
        # A local copy needs no cache.
        copy, hub = streamed.stdout.splitlines()
        assert copy == "read" and "owner/name" in hub, streamed.stderr[-2000:]

    if kind == "file":
        (tmp_path / "file").write_text("")
        check(tmp_path / "file" / "home")
        return
    with small_disk(tmp_path / "disk", "64k") as disk:
        remount(disk, "ro")
        check(disk / "home")


def test_a_cache_that_can_be_written_stays_empty(tmp_path: Path) -> None:
    check_cache(str(tmp_path / "new" / "modules"))
    assert list((tmp_path / "new" / "modules").iterdir()) == []
    with pytest.raises(UserError, match="Set HF_HOME to one"):
        (tmp_path / "file").write_text("")
        check_cache(str(tmp_path / "file" / "modules"))
