"""Regions: the elementwise stretches of a block, which a run may compile into one kernel each.

A region is a function of tensors whose first axis counts the same tokens or patches, which change
from pack to pack; all else is constant, so that one graph serves all packs and all layers of a
kind. Matrix products and attention stay outside: they have kernels of their own, and layouts with
Python lists never enter a region.

A region reads one parameter at most. The gradients of a compiled region come out of one node of the
graph, in no order that ranks share, and ZeRO-2 adds up what arrives at the same time: with the
weights of whole blocks inside, its gradients were wrong without a word.

Whether a block compiles its regions is a matter of the run: the model says so when it calls the
block, and the block says it around what it runs (`compiling`), also when activation checkpointing
runs it again on another thread.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from .lean import linear, rms_norm

P = ParamSpec("P")
R = TypeVar("R")
# What torch.compile takes as a backend.
Compiler = str | Callable[..., Any]

# Graphs that a region may have: one for each kind of layer and what of it trains.
GRAPHS = 64

# What compiles the regions of the block around; None: they run eagerly.
_compiler: ContextVar[Compiler | None] = ContextVar("compiler", default=None)


@contextlib.contextmanager
def compiling(compiler: Compiler | None) -> Iterator[None]:
    """Regions inside are compiled by this; None: they run eagerly."""
    before = _compiler.set(compiler)
    try:
        yield
    finally:
        _compiler.reset(before)


def _current() -> Compiler | None:
    """What compiles a region here; None also inside of what is compiled as a whole."""
    return None if torch.compiler.is_compiling() else _compiler.get()


def compiles() -> bool:
    """Whether a region that is called here is compiled."""
    return _current() is not None


def region(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function as a region: it runs as it stands, or compiled inside `compiling`."""

    @functools.wraps(function)
    def call(*inputs: P.args, **options: P.kwargs) -> R:
        compiler = _current()
        tensors = [] if compiler is None else list(_tensors(inputs))
        # torch.compile takes an axis of 0 or 1 for a constant.
        if compiler is None or any(len(tensor) < 2 for tensor in tensors):
            return function(*inputs, **options)
        for tensor in tensors:
            torch._dynamo.mark_dynamic(tensor, 0)
        # Here, since torch keeps its settings by thread, and a backward pass may run blocks again
        # on one of its own. By default the ninth kind of layer is refused.
        settings: Any = torch._dynamo.config
        if settings.recompile_limit < GRAPHS:
            settings.recompile_limit = GRAPHS
        try:
            result: R = _compiled(function, compiler)(*inputs, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise RuntimeError(
                f"{function.__name__} of a block could not be compiled by {compiler}: "
                f"{str(error).splitlines()[0]} Set parallel.compile=off to train without"
            ) from error
        return result

    return call


def _tensors(inputs: Any) -> Iterator[Tensor]:
    """The tensors among the inputs of a region; a weight comes inside its module."""
    for value in inputs:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


@functools.cache
def _compiled(function: Callable[..., Any], compiler: Compiler) -> Callable[..., Any]:
    # dynamic=False: sizes that are not marked are constants, also those of a second kind of layer.
    compiled: Callable[..., Any] = torch.compile(
        function, backend=compiler, dynamic=False, fullgraph=True
    )
    return compiled


def in_region(norm: nn.Module) -> bool:
    """Whether a block that compiles computes this norm inside a region, past its hooks.

    It does where the norm's name and its only parameter, `weight`, say that it is an ordinary one.
    Any other norm is called as a module: a bias would be a second parameter, and ZeRO-3 gathers for
    regions the weights of these norms alone.
    """
    named = type(norm).__name__.endswith("Norm") and "forward" not in vars(norm)
    if not named or any(child is not None for child in norm._modules.values()):
        return False
    return [name for name, p in norm._parameters.items() if p is not None] == ["weight"]


def normed(norm: Any, x: Tensor) -> Tensor:
    """norm(x): (tokens, C)."""
    if _current() is not None and in_region(norm):
        return _normed(norm, x)
    short = rms_norm(norm, x)
    out: Tensor = norm(x) if short is None else short
    return out


def add_normed(norm: nn.Module, h: Tensor, *added: Tensor) -> tuple[Tensor, Tensor]:
    """h and all that is added to it, and the norm of that: (tokens, C) each."""
    if added and _current() is not None and in_region(norm):
        return _add_normed(norm, h, *added)
    for more in added:
        h = h + more
    return h, normed(norm, h)


# On ranks that compile, hooks of these norms do not run, not even for a pack with a single row:
# under ZeRO-3 all ranks must call the same modules.
@region
def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = norm.forward(x)
    return out


@region
def _add_normed(norm: nn.Module, h: Tensor, *added: Tensor) -> tuple[Tensor, Tensor]:
    for more in added:
        h = h + more
    return h, norm.forward(h)


@region
def gated_product(act: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up: (tokens, width). :param act: a function, or a module, without its hooks."""
    called: Callable[[Tensor], Tensor] = act.forward if isinstance(act, nn.Module) else act
    return called(gate) * up


def _learned(act: Any) -> bool:
    """Whether an activation has parameters, which ZeRO-3 gathers by hooks."""
    return isinstance(act, nn.Module) and next(act.parameters(), None) is not None


class RegionMLP(nn.Module):
    """The forward of a gated feed-forward network, with a region between its matrix products."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: Any

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, C) -> (tokens, C)."""
        act = self.act_fn
        gate, up = linear(self.gate_proj, x), linear(self.up_proj, x)
        if _current() is None or _learned(act):
            return linear(self.down_proj, act(gate) * up)
        return linear(self.down_proj, gated_product(act, gate, up))


class CompiledRegions:
    """The part of a model that says what compiles its blocks' regions.

    A matter of the run, not of the model: no configuration and no export carries it.
    """

    training: bool
    compiler: Compiler | None = None

    def compile_regions(self, compiler: Compiler | None = "inductor") -> None:
        """Compiles the blocks' regions in training mode; generation and evaluation stay eager.

        :param compiler: a backend of torch.compile; None: eager again.
        """
        self.compiler = compiler

    def _compiler_now(self) -> Compiler | None:
        """What compiles the regions of this forward pass."""
        return self.compiler if self.training else None
