"""One job at a time works in a run directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from pathlib import Path

from casa_train.errors import UserError
from casa_train.io.log import warn
from casa_train.run.layout import (
    LOCK_FILE,
)


class RunLock:
    """One job at a time works in a run directory; the lock goes with its process, however it ends.

    Between hosts it holds where the file system passes flock on: NFS does, Lustre with its mount
    option `flock`.

    :raises UserError: another process holds it, with its host and pid; or the directory is unfit.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LOCK_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(unwritable(run_dir, error)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"run directory {run_dir} is in use by {holder}; expected no other job in it. Wait "
                "for it, stop it, or choose another name."
            ) from error
        except OSError as error:
            warn(
                f"{path} cannot be locked: {error}. This file system has no locks, so nothing "
                "stops a second job in this directory: make sure that there is none"
            )
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"host {socket.gethostname()}, pid {os.getpid()}" + (f", job {job}" if job else "")
        try:
            self._file.truncate(0)
            self._file.write(holder + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(unwritable(run_dir, error)) from error

    def close(self) -> None:
        self._file.close()


def unwritable(run_dir: Path, error: OSError) -> str:
    """What to say of a run directory that takes no files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"run directory {run_dir} takes no more files: {error}. Make room there, or choose "
            "another run_dir=..."
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return (
            f"run_dir={run_dir} is, or lies below, a file ({error}); expected a directory or free "
            "path. Choose another run_dir=..."
        )
    return (
        f"run directory {run_dir} cannot be written: {error}; expected a directory of this "
        "user's. Choose another run_dir=... or mend its permissions."
    )
