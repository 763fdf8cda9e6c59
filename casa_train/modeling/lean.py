"""What a decode step calls in place of modules that do no more than their weights say.

A step's matrices meet one token a row: on a CPU the way through a module costs a tenth of what it
computes. A norm written out in Python launches eight kernels on a GPU where there is one, in all
forward passes. Modules that anybody watches or has changed (hooks, adapters, another forward) are
called as they are.
"""

from __future__ import annotations

import functools
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as modules

from .backbones import BACKBONES

# Backbones' norms. In half precision some of them round before the weight and again behind it:
# `F.rms_norm`, which rounds once, is nearer to the true value than these.
RMS_NORMS = {backbone.norm for backbone in BACKBONES.values()}

_lean: ContextVar[bool] = ContextVar("lean", default=False)


class Lean:
    """A stretch without gradients and without autocast, whose modules may be cut short."""

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted

    def __enter__(self) -> None:
        self.before = _lean.set(self.wanted)

    def __exit__(self, *error: Any) -> None:
        _lean.reset(self.before)


def is_lean() -> bool:
    """Whether modules are cut short here; not where torch.compile looks through them itself."""
    return not torch.compiler.is_compiling() and _lean.get()


def untouched(module: nn.Module) -> bool:
    """Whether calling a module is calling the forward of its class, and nobody watches."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or modules._global_forward_hooks
        or modules._global_forward_pre_hooks
        or modules._global_backward_hooks
        or modules._global_backward_pre_hooks
    )


def linear(module: Any, x: Tensor) -> Tensor:
    """module(x), of a linear most of the time: (tokens, in) -> (tokens, out)."""
    if type(module) is nn.Linear and is_lean() and untouched(module):
        weights = module._parameters
        return F.linear(x, weights["weight"], weights["bias"])  # type: ignore[arg-type]
    out: Tensor = module(x)
    return out


def one_kernel_pays(x: Tensor) -> bool:
    """Whether torch's RMS norm is one kernel there, in a forward pass of any kind."""
    half = x.is_cuda and x.element_size() == 2
    return half and not (torch.compiler.is_compiling() or torch.is_autocast_enabled())


def rms_norm(norm: Any, x: Tensor) -> Tensor | None:
    """norm(x): (tokens, C), or (tokens, H, D) for norms of heads; None where it is to be called as
    a module.
    """
    if type(norm) not in RMS_NORMS or not (is_lean() or one_kernel_pays(x)) or not untouched(norm):
        return None
    weight = norm._parameters["weight"]
    if weight.dtype != x.dtype:
        return None
    if x.is_cpu and x.ndim == 2 and len(x) == 1 and x.dtype in (torch.float32, torch.float64):
        return _norm_of_one_row(x, weight, norm.variance_epsilon)
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


def _norm_of_one_row(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`F.rms_norm` of (1, C), which on a CPU is six operations."""
    mean = torch.addmm(_scalar(epsilon, x.dtype), x, x.t(), alpha=1 / x.shape[1])
    return (x * mean.rsqrt_()).mul_(weight)


@functools.cache
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    return torch.full((1, 1), value, dtype=dtype, device="cpu")
