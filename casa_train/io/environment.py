"""What commands read from the environment, and what they set there for torch.

A library sets nothing when it is imported, so the `__main__` of each command calls
`set_environment` before its other imports.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

MECHANISMS_VARIABLE = "CASA_MECHANISMS"


def set_environment(training: bool = False, quiet_torch: bool = False) -> None:
    """Sets what torch reads once, at its import, where the environment does not say it already.

    Threads of torch's OpenMP pool wait for each other several times an operation, and unless told
    otherwise they spin meanwhile, on the very core that a thread they wait for may want: on a
    machine with one busy process more than it has cores, steps of small models took ten times as
    long. So they sleep. The runtimes are GNU's in torch's wheels, LLVM's and Intel's elsewhere.

    :param training: steps are taken: every pack has other shapes, which would leave holes in blocks
        of GPU memory of a fixed size, so blocks grow. torch 2.9 renamed the variable for it.
    :param quiet_torch: no warnings of torch's C++ code, whose profiler has one for every tensor
        from before it began.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if training and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        renamed = tuple(map(int, metadata.version("torch").split(".")[:2])) >= (2, 9)
        name = "PYTORCH_ALLOC_CONF" if renamed else "PYTORCH_CUDA_ALLOC_CONF"
        os.environ[name] = "expandable_segments:True"
    if quiet_torch:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def own_mechanism_files() -> list[Path]:
    """The Python files with fusion mechanisms of the user's own, joined by `:` in the variable."""
    named = os.environ.get(MECHANISMS_VARIABLE, "").split(os.pathsep)
    return [Path(name).expanduser().absolute() for name in named if name]
