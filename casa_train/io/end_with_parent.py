"""A process that ends with the one that started it."""

from __future__ import annotations

import ctypes
import os
import signal

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def end_with_parent(parent: int, by: signal.Signals) -> None:
    """Lets this process get a signal when its parent ends, however that ends.

    Call it before anything heavy is imported, so that one ended at once leaves nothing behind.

    :param parent: the pid of the process that started this one.
    :raises SystemExit: with 1, the parent has ended already.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it ended before this took effect
        raise SystemExit(1)
