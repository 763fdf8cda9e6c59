"""Files of tensors, whose disk errors are OSErrors that name the file. Reading one runs no code."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from casa_train.errors import UserError


def save_tensors(value: Any, path: Path) -> None:
    """`torch.save`, flushed to the disk by the host that wrote it, with errors that say what is
    wrong: by itself it reports a full disk as a RuntimeError about positions.

    :raises OSError: with the file's name.
    """
    try:
        with path.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:
        disk = error.__context__
        if not isinstance(disk, OSError):
            raise
        raise OSError(disk.errno, disk.strerror, str(path)) from error


def load_tensors(path: Path, mmap: bool = False, classes: Sequence[Any] = ()) -> Any:
    """What `save_tensors` wrote: tensors, numbers, texts, and containers of them.

    :param mmap: map tensors from the file; only what is used is read.
    :param classes: that the file may hold, too, as `torch.serialization.safe_globals` takes them.
    :raises UserError: it cannot be read, or holds anything else, whose code is not run.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)
    except Exception as error:  # as many types as there are damaged files
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{path} cannot be read ({first}); expected a file of tensors that this program wrote. "
            "Restore it from a backup, or remove its checkpoint, so that an older one is taken."
        ) from error
