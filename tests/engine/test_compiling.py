"""Whether a run compiles its blocks: asked for, possible, on all ranks alike, and how long."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from casa_train.config.schema import ParallelConfig
from casa_train.distributed.ranks import Ranks
from casa_train.engine import compiling
from casa_train.engine.compiling import CompileClock, choose_compiler, what_is_missing
from casa_train.errors import UserError

GPU = torch.device("cuda", 0)


def test_a_cpu_compiles_on_demand_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "COMPILER", "aot_eager")  # it takes no C++ compiler's seconds
    chosen = [
        choose_compiler(ParallelConfig(compile=word), Ranks()) for word in ("auto", "off", "on")
    ]
    assert chosen == [None, None, "aot_eager"]


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_deterministic_compiles_with_the_forward_pass(deterministic: bool) -> None:
    """Where torch keeps what `_configure` sets, and not on a thread of autograd's."""
    inductor = importlib.import_module("torch._inductor.config")
    functorch = importlib.import_module("torch._functorch.config")
    compiled: list[tuple[str, bool]] = []

    def noting(name: str) -> Any:
        def compile_graph(graph: Any, example: Any) -> Any:
            compiled.append((name, inductor.deterministic))
            return make_boxed_func(graph.forward)

        return compile_graph

    before = torch.are_deterministic_algorithms_enabled()
    held = inductor.deterministic, functorch.force_non_lazy_backward_lowering
    torch.use_deterministic_algorithms(deterministic)
    try:
        compiling._configure()
        backend = aot_autograd(fw_compiler=noting("forward"), bw_compiler=noting("backward"))
        x = torch.ones(3, 2, requires_grad=True)
        out = torch.compile(lambda x: x * x.sigmoid(), backend=backend, dynamic=False)(x)
        at_once = list(compiled)
        out.sum().backward()
    finally:
        torch.use_deterministic_algorithms(before)
        inductor.deterministic, functorch.force_non_lazy_backward_lowering = held
    both = [("forward", deterministic), ("backward", deterministic)]
    assert compiled == both and at_once == (both if deterministic else both[:1])


def test_a_missing_compiler_is_refused_or_noted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no_such_compiler")
    missing = what_is_missing(torch.device("cpu"))
    assert missing == "there is no C++ compiler no_such_compiler"
    with pytest.raises(UserError, match=f"parallel.compile is 'on', but .*{missing.split()[-1]}"):
        choose_compiler(ParallelConfig(compile="on"), Ranks())
    lines: list[str] = []
    monkeypatch.setattr("casa_train.engine.compiling.what_is_missing", lambda _: "no triton")
    assert choose_compiler(ParallelConfig(), Ranks(device=GPU, out=lines.append)) is None
    assert len(lines) == 1 and lines[0].endswith("no triton")


def test_a_compiler_that_does_not_work_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def broken(graph: Any, inputs: list[Any]) -> Any:
        calls.append(graph)
        raise FileNotFoundError("Python.h: no such file\nand twenty lines more")

    monkeypatch.setattr(compiling, "COMPILER", broken)
    for _ in range(2):
        missing = what_is_missing(torch.device("cpu"))
        assert missing is not None and missing.endswith(
            "failed with FileNotFoundError: Python.h: no such file"
        )
    with pytest.raises(UserError, match="Python.h: no such file. Mend that, or set parallel.comp"):
        choose_compiler(ParallelConfig(compile="on"), Ranks())
    assert len(calls) == 1


class OfTwo(Ranks):
    """The first of two ranks; the second has no compiler."""

    def gather(self, value: Any) -> Sequence[Any]:
        return [value, "there is no C++ compiler"]


def test_all_ranks_compile_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("casa_train.engine.compiling.what_is_missing", lambda _: None)
    assert choose_compiler(ParallelConfig(), Ranks(device=GPU)) == "inductor"
    assert choose_compiler(ParallelConfig(), OfTwo(device=GPU)) is None
    with pytest.raises(UserError, match="there is no C"):
        choose_compiler(ParallelConfig(compile="on"), OfTwo())


def test_the_clock_counts_what_is_compiled_while_it_runs() -> None:
    torch._dynamo.reset()
    lines: list[str] = []
    clock = CompileClock()
    compiled = torch.compile(lambda x: (x.sin() * x.cos()).sum(), backend="aot_eager")
    for _ in range(3):
        compiled(torch.ones(5, requires_grad=True)).backward()  # of no graph of its own
    assert clock.graphs == 1 and clock.seconds > 0
    for _ in range(2):
        clock.tell(lines.append)
    assert lines == [f"compiled 1 graph of the blocks in {clock.seconds:.1f} s"]
    clock.close()
    torch.compile(lambda x: x.cos() + 2, backend="eager")(torch.ones(5))
    assert clock.graphs == 1
    forgotten = CompileClock()
    torch._dynamo.reset()
    forgotten.close()
