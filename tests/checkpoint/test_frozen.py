"""Frozen weights have one file for all checkpoints: referred to, checked, kept, and no longer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from casa_train.checkpoint.frozen import FrozenFile, write_frozen
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.checkpoint.slices import MASTER, STATE_DIRECTORY, Slice, read_weights, write_slices
from casa_train.config.schema import CheckpointConfig
from casa_train.distributed.ranks import Ranks
from casa_train.errors import SaveError, UserError
from casa_train.io.files import sha256


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tower.weight": torch.randn(3, 5, generator=generator),
        "tower.scale": torch.randn((), generator=generator),
        "ßackbone.weight": torch.randn(7, 2, 2, generator=generator).bfloat16(),
    }


def write(checkpoints: Path, seed: int = 0) -> FrozenFile:
    values = weights(seed)
    kinds = {name: (value.dtype, tuple(value.shape)) for name, value in values.items()}
    return write_frozen(checkpoints, kinds, values.values())


def manager(directory: Path, said: list[str] | None = None, **keep: int) -> CheckpointManager:
    ranks = Ranks(out=(said if said is not None else []).append)
    return CheckpointManager(directory, CheckpointConfig(**keep), {}, ranks)


def save(directory: Path, *steps: int, seed: int | None = 0, **keep: int) -> None:
    """Checkpoints of one trained parameter beside frozen ones, as an engine writes them.

    :param seed: of the frozen weights; None: nothing is frozen.
    """
    for step in steps:

        def state(target: Path, step: int = step) -> FrozenFile | None:
            frozen = write(directory, seed) if seed is not None else None
            trained = [Slice("trained", (2,), 0, {MASTER: torch.full((2,), float(step))})]
            write_slices(target / STATE_DIRECTORY, 0, trained, step, frozen)
            return frozen

        manager(directory, **keep).save(step, state, {})


def files(directory: Path) -> set[str]:
    return {path.name for path in (directory / "frozen").iterdir()}


def test_the_file_is_named_by_its_content_and_opens_with_safetensors(tmp_path: Path) -> None:
    written = write(tmp_path)
    path = written.path(tmp_path)
    assert path == tmp_path / "frozen" / f"{sha256(path)}.safetensors"
    assert written.bytes == path.stat().st_size and written.there(tmp_path)
    loaded = load_file(path)
    assert loaded.keys() == weights().keys()
    for name, value in weights().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    assert write(tmp_path) == written and write(tmp_path, seed=1) != written
    assert len(files(tmp_path)) == 2


def test_a_checkpoint_has_its_own_weights_and_the_file_s(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    assert len(files(tmp_path)) == 1
    own = sum(path.stat().st_size for path in (tmp_path / "step_2" / "engine").iterdir())
    assert own < 3000
    found = manager(tmp_path).latest()
    assert found is not None and found.frozen is not None
    assert found.manifest["frozen"] == vars(found.frozen)
    whole = read_weights(found.path)
    assert torch.equal(whole.pop("trained"), torch.full((2,), 2.0))
    assert whole.keys() == weights().keys()
    assert all(torch.equal(whole[name], value) for name, value in weights().items())


def test_where_nothing_is_frozen_there_is_no_file(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=None)
    found = manager(tmp_path).latest()
    assert found is not None and found.frozen is None
    assert not (tmp_path / "frozen").exists() and read_weights(found.path).keys() == {"trained"}


def test_it_stays_while_a_checkpoint_refers_to_it(tmp_path: Path) -> None:
    """A run whose frozen weights become others, as with another precision."""
    save(tmp_path, 4, seed=0, keep_every=4)
    (first,) = files(tmp_path)
    save(tmp_path, 5, seed=1, keep_every=4)
    save(tmp_path, 6, 7, seed=2, keep_every=4)
    steps = {path.name for path in tmp_path.iterdir()} - {"frozen"}
    assert steps == {"step_4", "step_6", "step_7"}
    assert first in files(tmp_path) and len(files(tmp_path)) == 2  # that of step 5 has gone
    save(tmp_path, 8, seed=2, keep_every=0)
    assert len(files(tmp_path)) == 1 and first not in files(tmp_path)


def test_a_checkpoint_that_somebody_reads_keeps_its_file(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    exporting = manager(tmp_path, keep_last=1)
    reads = {1}
    exporting.watched_by(lambda phase: None, SimpleNamespace(pinned=lambda: reads))
    save_with = write(tmp_path, 1)
    exporting.save(2, lambda path: save_with, {})
    assert len(files(tmp_path)) == 2
    reads.clear()
    exporting.prune()
    assert files(tmp_path) == {save_with.name}


def test_a_broken_checkpoint_keeps_its_file_as_long_as_it_stays(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    (first,) = files(tmp_path)
    (tmp_path / "step_1/state.json").write_text("{}")
    with pytest.raises(UserError, match="none is valid"):
        manager(tmp_path).latest()
    save(tmp_path, 2, seed=1)
    assert (tmp_path / "step_1.broken").is_dir() and first in files(tmp_path)
    save(tmp_path, 3, 4, seed=1)
    assert not (tmp_path / "step_1.broken").exists() and first not in files(tmp_path)


def test_nothing_goes_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=0)
    manifest = (tmp_path / "step_1/manifest.json").read_text()
    for unreadable in ("{", "[]", '{"frozen": {"name": "x"}}', '{"frozen": 3}'):
        (tmp_path / "step_1/manifest.json").write_text(unreadable)
        checkpoints = manager(tmp_path)
        (tmp_path / "frozen" / "other.safetensors").touch()
        checkpoints.prune()
        assert len(files(tmp_path)) == 2, unreadable
    (tmp_path / "step_1/manifest.json").write_text(manifest)
    checkpoints.prune()
    assert len(files(tmp_path)) == 1 and checkpoints.latest() is not None


def test_what_a_kill_left_goes(tmp_path: Path) -> None:
    """Half a file with the next start; a whole one that no checkpoint came to need with a save."""
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "unfinished.tmp").write_bytes(b"half")
    write(tmp_path, seed=5)
    assert manager(tmp_path).latest() is None
    assert len(files(tmp_path)) == 1
    save(tmp_path, 1, seed=0)
    assert len(files(tmp_path)) == 1 and manager(tmp_path).latest() is not None


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (flip, "has {bytes} bytes with sha256 {found}"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has {less} bytes with sha256"),
    "missing": (Path.unlink, "is missing"),
    "another": (
        lambda path: path.write_bytes(
            write(path.parent.parent, 1).path(path.parent.parent).read_bytes()
        ),
        "has {bytes} bytes with sha256 {found}",
    ),
    "a directory": (lambda path: (path.unlink(), path.mkdir()), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_nothing_is_put_aside(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1, 2)
    (name,) = files(tmp_path)
    path = tmp_path / "frozen" / name
    whole = path.read_bytes()
    do, words = DAMAGES[damage]
    do(path)
    found = sha256(path) if path.is_file() else ""
    size = len(whole)
    words = words.format(bytes=f"{size:,}", less=f"{size - 1:,}", found=found)
    checkpoints = manager(tmp_path)
    for read in (checkpoints.latest, lambda: checkpoints.read(2)):
        with pytest.raises(UserError) as caught:
            read()
        message = str(caught.value)
        assert message.startswith(f"{path} {words}"), message
        assert f"expected {size:,} bytes with sha256 {path.stem}" in message
        assert "Restore it from a backup" in message and "checkpoint.resume=never" in message
    assert {p.name for p in tmp_path.iterdir()} == {"frozen", "step_1", "step_2"}
    if damage in ("missing", "cut"):  # what reads without a manager says so, too
        with pytest.raises(UserError, match="Restore it from a backup"):
            read_weights(tmp_path / "step_2")
    # Another run that started from the same weights has the same file.
    if path.is_dir():
        path.rmdir()
    write(tmp_path / "other run")
    (tmp_path / "other run" / "frozen" / name).rename(path)
    (tmp_path / "other run" / "frozen").rmdir()
    again = manager(tmp_path).latest()
    assert again is not None and again.step == 2 and path.read_bytes() == whole


def test_a_broken_checkpoint_is_passed_over_before_its_file_is_missed(tmp_path: Path) -> None:
    save(tmp_path, 1, seed=None)
    save(tmp_path, 2, seed=0)
    (tmp_path / "step_2/state.json").unlink()
    for path in (tmp_path / "frozen").iterdir():
        path.unlink()
    found = manager(tmp_path).latest()
    assert found is not None and found.step == 1


def test_a_directory_that_cannot_be_made_ends_the_save_alone(tmp_path: Path) -> None:
    (tmp_path / "frozen").write_text("")
    with pytest.raises(SaveError, match="frozen/unfinished.tmp"):
        save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["frozen"]


def test_older_manifests_say_nothing_of_frozen_weights(tmp_path: Path) -> None:
    """Their checkpoints hold shares of them; `test_resume_steps.py` reads these."""
    save(tmp_path, 1, seed=None)
    manifest = json.loads((tmp_path / "step_1/manifest.json").read_text())
    del manifest["frozen"]
    (tmp_path / "step_1/manifest.json").write_text(json.dumps(manifest))
    found = manager(tmp_path).latest()
    assert found is not None and found.frozen is None
