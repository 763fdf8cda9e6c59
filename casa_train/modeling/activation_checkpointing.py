"""Activation checkpointing: a block keeps its inputs and runs once more in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# What may be recomputed: nothing, the decoder's blocks with their fusion, the trained blocks of the
# vision tower, or both.
RECOMPUTED = ("none", "decoder", "vision", "all")


def check_recomputed(blocks: str) -> None:
    """:raises ValueError: no name in `RECOMPUTED`."""
    if blocks not in RECOMPUTED:
        raise ValueError(
            f"activation checkpointing of {blocks!r} is unknown; choose one of {list(RECOMPUTED)}"
        )


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Any:
    """`block(*inputs)`, of which autograd keeps `inputs` alone if `recompute`.

    Blocks draw no random numbers, so no generator's state is kept for the second run.
    """
    if not recompute:
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
