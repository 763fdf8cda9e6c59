"""Whether the disk can take what a run will write: asked before training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.precision import DTYPES, FP32
from casa_train.run.layout import CHECKPOINTS
from casa_train.run.lock import unwritable


def check_disk(
    config: Config,
    ranks: Ranks,
    run_dir: Path,
    model: nn.Module,
    found: SavedCheckpoint | None,
    held: int,
) -> None:
    """Checks that the run can write its checkpoints; collective.

    :param found: the one that it goes on from; :param held: how many are there.
    :raises UserError: see `check_writable` and `check_room`.
    """
    ranks.agree(lambda: check_writable(run_dir, ranks.rank))
    step = found.step if found is not None else 0
    frozen_there = found is not None and found.frozen is not None
    ranks.agree(lambda: check_room(config, model.parameters(), step, held, frozen_there))


def check_writable(run_dir: Path, rank: int) -> None:
    """Writes a file where checkpoints will be written; every rank does, since each has its mounts.

    :raises UserError: naming the directory.
    """
    directory = run_dir / CHECKPOINTS
    probe = directory / f".write_test_{rank}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(b"test")
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise UserError(unwritable(directory, error)) from error


def check_room(
    config: Config, parameters: Iterable[nn.Parameter], step: int, held: int, frozen_there: bool
) -> None:
    """Refuses a disk that has no room for the checkpoints that a run holds at once.

    A new one is written before an old one goes. What `keep_every` gathers over time is left out:
    it may be moved elsewhere meanwhile.

    :param parameters: of the whole model, frozen ones too; any device.
    :param step: where the run stands; :param held: checkpoints that are there already.
    :param frozen_there: whether frozen weights, which have one file, are there.
    :raises UserError: with the free and the needed bytes.
    """
    keep, directory = config.checkpoint, Path(config.run_dir) / CHECKPOINTS
    size, frozen = checkpoint_bytes(parameters, config.parallel.precision)
    saves = saves_left(step, config.trainer.steps, keep.every)
    new = min(saves, keep.keep_last + 1 - min(held, keep.keep_last))
    once = frozen if new and not frozen_there else 0
    try:
        free = shutil.disk_usage(directory).free
    except OSError as error:
        raise UserError(unwritable(directory, error)) from error
    if free < new * size + once:
        raise UserError(
            f"{directory}: {free:,} bytes are free, but the checkpoints that this run holds at "
            f"once need {new * size + once:,} more: {new} of {size:,} bytes each, since "
            f"checkpoint.keep_last is {keep.keep_last} and a new one is written "
            "before the oldest goes"
            + (f", and once {once:,} bytes of frozen weights" if once else "")
            + ". Make room, lower checkpoint.keep_last, or choose another run_dir=..."
        )


def checkpoint_bytes(parameters: Iterable[nn.Parameter], precision: str) -> tuple[int, int]:
    """Bytes of the tensors in one checkpoint, all ranks' files together, and of frozen weights,
    which all checkpoints of a run share.
    """
    trained = frozen = 0
    for parameter in parameters:
        if parameter.requires_grad:
            trained += parameter.numel()
        else:
            frozen += parameter.numel()
    # fp32 masters and Adam's two moments; frozen weights as they are.
    return 3 * FP32 * trained, DTYPES[precision].itemsize * frozen


def saves_left(step: int, steps: int, every: int) -> int:
    """Checkpoints that a run at `step` still writes: every so many steps, and the last one."""
    if step >= steps:
        return 0
    return steps // every - step // every + (steps % every > 0)
