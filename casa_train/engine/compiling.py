"""Whether a run compiles the blocks of its model, what that needs, and how long it took."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch

from casa_train.config.schema import ParallelConfig
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.numbers import count
from casa_train.modeling.regions import Compiler

COMPILER = "inductor"
# Inductor's kernels need it (Volta).
LEAST_CAPABILITY = (7, 0)


def choose_compiler(parallel: ParallelConfig, ranks: Ranks) -> str | None:
    """What compiles the blocks of this run; None: they run eagerly. Collective.

    :raises UserError: on every rank, where `parallel.compile` is on and something is missing.
    """
    device, wanted = ranks.device, parallel.compile
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return None
    missing = next((m for m in ranks.gather(what_is_missing(device)) if m is not None), None)
    if missing is None:
        _configure()
        return COMPILER
    if wanted == "on":
        raise UserError(
            f"parallel.compile is 'on', but torch.compile cannot run here: {missing}. Mend "
            "that, or set parallel.compile=off: the same numbers within rounding."
        )
    ranks.log(f"note: blocks are not compiled: {missing}")
    return None


def _configure() -> None:
    """With deterministic algorithms, kernels are the same at every start.

    Otherwise sums are cut as a measurement at the first call says. Torch keeps these settings by
    thread, so what a backward pass needs is compiled with the forward pass, not on a thread of
    autograd's.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    for module, name in (
        ("torch._inductor.config", "deterministic"),
        ("torch._functorch.config", "force_non_lazy_backward_lowering"),
    ):
        settings: Any = importlib.import_module(module)
        if hasattr(settings, name):
            setattr(settings, name, True)


def what_is_missing(device: torch.device) -> str | None:
    """What torch.compile lacks on this machine, in words; None: nothing.

    Last it compiles a function for the device, once a process: seconds, most of them for what the
    first block would need as well.
    """
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            return f"it needs a GPU of compute capability {least}"
        if importlib.util.find_spec("triton") is None:
            return "there is no package triton"
        names = [os.environ.get("CC"), "gcc", "clang", "cc"]  # which builds Triton's launchers
        found, kind = any(name and shutil.which(name) for name in names), "C compiler"
    else:
        name = os.environ.get("CXX", "g++")  # as Inductor looks for it
        found, kind = shutil.which(name) is not None, f"C++ compiler {name}"
    return failure(device, COMPILER) if found else f"there is no {kind}"


@functools.cache
def failure(device: torch.device, compiler: Compiler) -> str | None:
    """What torch.compile says to a small function with one kernel; None: it ran.

    Names tell nothing of headers that are missing, a compiler that does not work, or a disk that
    is full, which would end a run at its first step.
    """

    def small(x: torch.Tensor) -> torch.Tensor:
        x = x * x.sigmoid()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1)

    try:
        compiled = torch.compile(small, backend=compiler, dynamic=False, fullgraph=True)
        compiled(torch.ones(4, 8, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except Exception as error:  # of torch, a backend, a compiler or a driver
        cause = getattr(error, "inner_exception", error)
        line = next(iter(str(cause).strip().splitlines()), "")
        return f"compiling a small function failed with {type(cause).__name__}: {line}"
    return None


class CompileClock:
    """Counts graphs and the seconds that torch.compile takes for them, in this process.

    :ivar graphs: of forward passes; each has one for the backward pass where it needs any.
    """

    def __init__(self) -> None:
        self.graphs, self.seconds = 0, 0.0
        self._began: tuple[float, int] | None = None
        self._told = False
        torch._dynamo.callback.on_compile_start(self._start)
        torch._dynamo.callback.on_compile_end(self._end)

    def _start(self, *_: Any) -> None:
        self._began = time.perf_counter(), _graphs()

    def _end(self, *_: Any) -> None:
        if self._began is not None:
            began, before = self._began
            self.graphs += _graphs() - before  # none where a backward pass is compiled
            self.seconds += time.perf_counter() - began
        self._began = None

    def tell(self, log: Callable[[str], None]) -> None:
        """Says once what there was to compile up to now."""
        if not self._told:
            log(f"compiled {count(self.graphs, 'graph')} of the blocks in {self.seconds:.1f} s")
        self._told = True

    def close(self) -> None:
        """Stops counting."""
        handler = torch._dynamo.callback.callback_handler
        with contextlib.suppress(ValueError):  # torch._dynamo.reset() forgets them by itself
            handler.remove_start_callback(self._start)
            handler.remove_end_callback(self._end)


def _graphs() -> int:
    """Graphs that this process has traced."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
