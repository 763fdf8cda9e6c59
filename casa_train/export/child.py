"""python -m casa_train.export.child PARENT MODULE ...: a command that yields to and ends with
PARENT.

PARENT is the pid of the process that starts it. Nothing heavy is imported before the command ends
with it, so even one killed at once leaves nothing behind.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # of Linux's prctl


def main() -> None:
    """Runs the module as `python -m` would."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before this took effect
        raise SystemExit(1)
    os.nice(10)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
