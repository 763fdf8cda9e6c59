"""Gradients in bf16 are added to their sums in fp32 in one kernel.

DeepSpeed makes a copy of each in fp32 first: four fifths more memory traffic, in every micro-step.
The sum is the same number, since every bf16 number is one of fp32.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def fuse_sums(optimizer: Any) -> bool:
    """Makes a DeepSpeed optimiser of stage 2 add so.

    :return: False: it has no such method, and goes on as it did.
    """
    if not hasattr(optimizer, "_add_to_grad_partition_buffer"):
        return False
    optimizer._add_to_grad_partition_buffer = add_to
    return True


def add_to(total: Tensor | None, gradient: Tensor) -> None:
    """Adds in place; None: the sum is another rank's."""
    if total is not None:
        total.add_(gradient)
