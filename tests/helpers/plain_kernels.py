"""Generated kernels for a CPU without its vector instructions."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Inductor writes plain C++ meanwhile; which vector instructions work it would find out by
    compiling for each. What it once found a process keeps, so all its tests of kernels take these.
    """
    settings = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    with importlib.import_module("torch._inductor.config").patch(settings):
        yield
