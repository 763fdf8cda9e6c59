"""python -m casa_train.export.child PARENT MODULE ...: a command that yields to and ends with
PARENT.

PARENT is the pid of the process that starts it. Nothing heavy is imported before the command ends
with it, so even one killed at once leaves nothing behind.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys

from casa_train.io.end_with_parent import end_with_parent


def main() -> None:
    """Runs the module as `python -m` would."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    end_with_parent(parent, signal.SIGKILL)
    os.nice(10)
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
