"""Files of tensors, whose disk errors are OSErrors that name the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


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
