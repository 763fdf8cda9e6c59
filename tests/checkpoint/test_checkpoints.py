"""The commit: what is broken is never loaded, what is valid is never lost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from casa_train.checkpoint.manager import CheckpointManager
from casa_train.config.schema import CheckpointConfig
from casa_train.distributed.random_state import rng_state, set_rng_state
from casa_train.distributed.ranks import Ranks
from casa_train.errors import SaveError, UserError


def manager(directory: Path, said: list[str] | None = None, **keep: int) -> CheckpointManager:
    ranks = Ranks(out=(said if said is not None else []).append)
    config = CheckpointConfig(**{"keep_last": 3, **keep})
    return CheckpointManager(directory, config, {"config": "c"}, ranks)


def save(directory: Path, *steps: int, **keep: int) -> None:
    for step in steps:

        def write(target: Path, step: int = step) -> None:
            (target / "engine").mkdir()
            (target / "engine" / "weights.bin").write_bytes(bytes([step]) * 1000)

        manager(directory, **keep).save(step, write, {"progress": {"step": step}})


def test_newest_is_found_with_its_state(tmp_path: Path) -> None:
    assert manager(tmp_path).latest() is None
    save(tmp_path, 5, 10)
    found = manager(tmp_path).latest()
    assert found is not None and found.step == 10
    assert found.state == {"step": 10, "progress": {"step": 10}}
    assert found.manifest["fingerprints"] == {"config": "c"}


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda p: (p / "engine/weights.bin").write_bytes(b"x" * 1000),
            "does not match its sha256",
        ),
        (lambda p: (p / "engine/weights.bin").write_bytes(b"cut"), "has 3 bytes, expected 1000"),
        (lambda p: (p / "engine/weights.bin").unlink(), "weights.bin is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is missing or unreadable"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes"),
    ],
)
def test_a_broken_checkpoint_is_named_and_passed_over(
    tmp_path: Path, damage: object, words: str
) -> None:
    save(tmp_path, 5, 10)
    damage(tmp_path / "step_10")  # type: ignore[operator]
    said: list[str] = []
    found = manager(tmp_path, said).latest()
    assert found is not None and found.step == 5
    assert words in said[0] and "step_10" in said[0]
    assert (tmp_path / "step_10.broken").is_dir()
    save(tmp_path, 10)  # the name is free again
    again = manager(tmp_path).latest()
    assert again is not None and again.step == 10


def test_a_shard_of_another_step_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    stolen = (tmp_path / "step_5/engine/weights.bin").read_bytes()
    (tmp_path / "step_10/engine/weights.bin").write_bytes(stolen)
    found = manager(tmp_path).latest()
    assert found is not None and found.step == 5


def test_only_broken_ones_is_loud(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_5/state.json").unlink()
    for _ in range(2):  # the second start must not take the empty directory for a fresh one
        with pytest.raises(UserError, match="none is valid"):
            manager(tmp_path).latest()


def test_a_kill_in_mid_save_leaves_the_older_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    half = tmp_path / "step_10.tmp"
    half.mkdir()
    (half / "weights.bin").write_bytes(b"half")
    found = manager(tmp_path).latest()
    assert found is not None and found.step == 5
    assert not half.exists()


def test_pruning_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    save(tmp_path, 2, 4, 6, 8, 10, keep_last=2, keep_every=4)
    assert sorted(json.loads(p.name[5:]) for p in tmp_path.iterdir()) == [4, 8, 10]


def test_what_a_kill_left_of_a_deletion_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step_5.deleted").mkdir(parents=True)
    assert manager(tmp_path).latest() is None
    assert not list(tmp_path.iterdir())


def test_a_broken_one_goes_when_enough_newer_ones_exist(tmp_path: Path) -> None:
    save(tmp_path, 5, 10)
    (tmp_path / "step_10/state.json").write_text("{}")
    manager(tmp_path).latest()
    save(tmp_path, 11, 12, keep_last=2)
    (tmp_path / "step_13.tmp").mkdir()  # of a save that failed on a read-only disk
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_11", "step_12", "step_13.tmp"]
    save(tmp_path, 14, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_12", "step_14"]


def test_phases_are_told_in_their_order(tmp_path: Path) -> None:
    phases: list[str] = []
    checkpoints = CheckpointManager(tmp_path, CheckpointConfig(keep_last=1), {}, Ranks())
    checkpoints.watched_by(phases.append)
    for step in (1, 2):
        checkpoints.save(step, lambda path: None, {})
    whole = ["writing", "hashing", "committing", "renaming", "pruning"]
    first, second = ([f"saving step {step}: {name}" for name in whole] for step in (1, 2))
    assert phases == [*first, *second, "saving step 2: deleting step_1"]


def test_a_directory_that_is_a_file_ends_the_save_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(SaveError, match="step 5 could not be saved .* no older one"):
        save(tmp_path / "checkpoints", 5)


def test_a_second_job_on_the_run_is_stopped(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(UserError, match="another job writes into this run"):
        save(tmp_path, 5)


def test_a_renamed_checkpoint_is_noticed(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_5").rename(tmp_path / "step_9")
    with pytest.raises(UserError, match="is that of step 5"):
        manager(tmp_path).latest()


def test_reading_for_an_export_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "step_5/state.json").write_text("{}")
    assert manager(tmp_path).read(5) is None
    assert (tmp_path / "step_5").is_dir()


def test_random_states_come_back() -> None:
    state = rng_state()
    draws = [(random.random(), np.random.rand(), torch.rand(1).item())]
    set_rng_state(state)
    draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]
