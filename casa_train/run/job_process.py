"""python -m casa_train.run.job_process PARENT ...: `python -m casa_train ...` as a sweep's job.

PARENT is the pid of the sweep. Should that be killed, the job saves and leaves, as by any SIGTERM.
"""

from __future__ import annotations

import runpy
import signal
import sys

from casa_train.io.end_with_parent import end_with_parent


def main() -> None:
    """Runs the command in this process."""
    end_with_parent(int(sys.argv[1]), signal.SIGTERM)
    sys.argv = ["casa_train", *sys.argv[2:]]
    runpy.run_module("casa_train", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
