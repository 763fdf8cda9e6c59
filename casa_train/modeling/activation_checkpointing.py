"""Activation checkpointing: a block keeps its inputs and runs once more in the backward pass."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

# What may be recomputed: nothing, the decoder's blocks with their fusion, the trained blocks of the
# vision tower, or both.
CHECKPOINTED = ("none", "decoder", "vision", "all")


def check_blocks(blocks: str) -> None:
    """:raises ValueError: no name in `CHECKPOINTED`."""
    if blocks not in CHECKPOINTED:
        raise ValueError(
            f"activation checkpointing of {blocks!r} is unknown; choose one of {list(CHECKPOINTED)}"
        )


def run_block(block: nn.Module, *inputs: Any, checkpointed: bool) -> Any:
    """`block(*inputs)`, of which autograd keeps `inputs` alone if `checkpointed`.

    Blocks draw no random numbers, so no generator's state is kept for the second run.
    """
    if not checkpointed:
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
