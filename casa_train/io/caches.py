"""Errors that no second try mends, and Hugging Face's caches among their causes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

from casa_train.errors import UserError

# A disk, a folder or a permission that stays as it is.
REFUSED = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def permanent(error: BaseException) -> bool:
    """Whether the same request would fail again: what is missing, forbidden or cannot be written.

    A file that the hub's library does not find in its cache may be one that the network kept away.
    """
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return not isinstance(error, LocalEntryNotFoundError)
    # `datasets` raises an error of its own in this one's place and keeps only the name.
    if isinstance(error, OfflineModeIsEnabled) or OfflineModeIsEnabled.__name__ in str(error):
        return True
    return any(isinstance(e, OSError) and e.errno in REFUSED for e in _chain(error))


def unwritable_cache(error: BaseException) -> str | None:
    """What to say where an error means that a cache cannot be written; None where it does not."""
    for cause in _chain(error):
        if not isinstance(cause, OSError) or not cause.filename:
            continue
        for folder in _folders():
            inside = cause.errno in REFUSED and Path(str(cause.filename)).is_relative_to(folder)
            # Or it is not there, and a folder above it cannot be made.
            above = cause.errno in REFUSED | {errno.ENOENT} and not os.path.exists(folder)
            if inside or (above and Path(folder).is_relative_to(str(cause.filename))):
                return _unwritable(folder, cause)
    return None


def check_cache(folder: str) -> None:
    """Writes a file where a library will write.

    :raises UserError: naming the folder and HF_HOME.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(_unwritable(folder, error)) from error


def _unwritable(folder: str, error: OSError) -> str:
    return (
        f"{folder}, a cache of Hugging Face's libraries, cannot be written: {error}; expected a "
        "folder of this user's with room. Set HF_HOME to one, such as "
        "HF_HOME=/scratch/$USER/huggingface."
    )


def _folders() -> list[str]:
    """The caches, the inner ones first."""
    own = ("HF_MODULES_CACHE", "HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_XET_CACHE")
    return [*filter(None, map(os.environ.get, own)), constants.HF_HUB_CACHE, constants.HF_HOME]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        following = error.__cause__ or error.__context__
        if following is None:
            return
        error = following
