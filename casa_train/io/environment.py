"""What torch finds in the environment when it is imported; every command sets it first.

A library sets nothing when it is imported, so the `__main__` of each command calls this before its
other imports.
"""

from __future__ import annotations

import os


def set_environment(quiet_torch: bool = False) -> None:
    """Sets what torch reads once, at its import, where the environment does not say it already.

    Threads of torch's OpenMP pool wait for each other several times an operation, and unless told
    otherwise they spin meanwhile, on the very core that a thread they wait for may want: on a
    machine with one busy process more than it has cores, steps of small models took ten times as
    long. So they sleep. The runtimes are GNU's in torch's wheels, LLVM's and Intel's elsewhere.

    :param quiet_torch: no warnings of torch's C++ code, whose profiler has one for every tensor
        from before it began.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if quiet_torch:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
