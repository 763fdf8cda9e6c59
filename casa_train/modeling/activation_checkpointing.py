"""Activation checkpointing: a block keeps its inputs and runs once more in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint

# Which blocks may be checkpointed: none, the decoder's with their fusion, the trained ones of the
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

    Blocks draw no random numbers, so no generator's state is kept for the second run, unless they
    have been given a dropout, as adapters have: it has to leave out the same numbers again.
    """
    if not checkpointed:
        return block(*inputs)
    draws = any(isinstance(m, _DropoutNd) and m.training and m.p > 0 for m in block.modules())
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=draws)


class CheckpointedBlocks:
    """The part of a model that says which of its blocks are checkpointed.

    A matter of the run, not of the model: no configuration and no export carries it.
    """

    training: bool
    checkpointed = "none"

    def checkpoint_activations(self, blocks: str) -> None:
        """Trades memory for work: these blocks keep only their inputs for the backward pass.

        :param blocks: none, decoder (fusion included), vision (the trained blocks) or all. In
            training mode alone; values and gradients stay what they are.
        """
        check_blocks(blocks)
        self.checkpointed = blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers' `is_gradient_checkpointing` reads."""
        return self.checkpointed != "none"

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        """What `gradient_checkpointing_enable` comes down to in both transformers generations: all
        blocks or none, always without re-entering autograd.
        """
        wanted = getattr(gradient_checkpointing_func, "func", checkpoint)
        if every_n_layers != 1 or wanted is not checkpoint:
            raise ValueError(
                f"activation checkpointing with every_n_layers={every_n_layers} or with "
                "offload=True is not supported: leave both out, or choose blocks with "
                "checkpoint_activations('decoder') or ('vision')"
            )
        self.checkpoint_activations("all" if enable else "none")

    def _checkpoints(self, part: str) -> bool:
        """Whether the blocks of a part run again in the backward pass of this forward pass."""
        return self.training and torch.is_grad_enabled() and self.checkpointed in (part, "all")
