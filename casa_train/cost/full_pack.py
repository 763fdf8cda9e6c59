"""A pack with both budgets full: its shapes, its tensors, and the memory of a rank that trains it.

`dry_run` prints the estimate, and `training/memory_probe.py` runs such a pack before the first
step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import torch

from casa_train.config.schema import Config
from casa_train.cost.memory import logits_bytes, saved_bytes, state_bytes
from casa_train.data.processor import token_side_of
from casa_train.io.precision import DTYPES
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.packed import PackedInputs
from casa_train.modeling.windows import Chunk
from casa_train.setup.fp8 import fp8_bytes
from casa_train.setup.model import joins_image_keys
from casa_train.setup.optim import build_groups
from casa_train.setup.parts import part_of

# Modules that activation checkpointing may run again, by its setting.
BLOCKS = {"decoder": r"model\.layers\.\d+", "vision": r"visual\.blocks\.\d+"}
BLOCKS["all"] = "|".join(BLOCKS.values())


def full_pack(config: Config) -> list[Chunk]:
    """A pack at both budgets: square images of the largest size, a smaller one for the rest.

    Each is a sample, with an even share of the text behind it.
    """
    budget = config.data.image_tokens
    side = max(1, isqrt(config.data.max_pixels) // token_side_of(config))
    side = min(side, isqrt(budget))
    grids = [(side, side)] * (budget // side**2)
    if rest := (budget - len(grids) * side**2) // side:
        grids.append((rest, side))
    count, text = len(grids), config.data.text_tokens
    shares = [text * (i + 1) // count - text * i // count for i in range(count)]
    return [Chunk.of_grids(share, (0,), (grid,)) for share, grid in zip(shares, grids, strict=True)]


def full_inputs(pack: Sequence[Chunk], device: torch.device | str, side: int) -> PackedInputs:
    """The pack as a model reads it: token 0 everywhere, black images, logits for every token.

    :param side: pixels of an image token's side.
    """
    texts = sum(sample.text for sample in pack)
    images = [
        torch.zeros(3, side * rows, side * columns, dtype=torch.uint8, device=device)
        for sample in pack
        for rows, columns in sample.grids
    ]
    return PackedInputs(
        input_ids=torch.zeros(texts, dtype=torch.long, device=device),
        chunks=list(pack),
        images=images,
        logits_index=torch.arange(texts, device=device),
    )


@dataclass(frozen=True)
class MemoryOfRank:
    """Bytes of one rank, by what they hold.

    :param state: parameters, gradients and optimiser under ZeRO, exact.
    :param activations: what a full pack's forward pass leaves for its backward pass.
    """

    state: dict[str, int]
    activations: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.state.values()) + sum(self.activations.values())


def memory_of_rank(config: Config, model: CasaForConditionalGeneration, world: int) -> MemoryOfRank:
    """Counts the memory of each of `world` ranks while it trains on a full pack.

    :param model: on the meta device, frozen as the run does it; its precision becomes the run's.
    """
    precision = config.parallel.precision
    model.to(DTYPES[precision]).train()
    groups = build_groups(model.named_parameters(), config.optim.groups)
    sizes = [[parameter.numel() for parameter in group["params"]] for group in groups]
    frozen = [p.numel() for p in model.parameters() if not p.requires_grad]
    state = state_bytes(sizes, frozen, config.parallel.zero_stage, world, precision)

    if config.parallel.frozen_precision == "fp8":
        state["fp8 copies of frozen blocks"] = fp8_bytes(model.visual)
    model.joint_image_keys = joins_image_keys(config.parallel)
    inputs = full_inputs(full_pack(config), "meta", token_side_of(config))

    def saved(blocks: str) -> dict[str, int]:
        model.checkpoint_activations(blocks)
        return saved_bytes(model, lambda: model(packed=inputs))

    blocks = config.parallel.activation_checkpointing
    kept = everything = saved("none")
    if blocks != "none":
        kept = saved(blocks)
    activations: dict[str, int] = defaultdict(int)
    for name, size in kept.items():
        activations[part_of(f"{name}.")] += size  # a module is part of itself
    vocabulary: int = model.config.text_config.vocab_size
    logits = logits_bytes(config.data.text_tokens, vocabulary, precision)
    if blocks == "none":
        activations["logits"] = logits
    else:  # what belongs to the logits is gone when a block runs again
        block = _largest_block(everything, BLOCKS[blocks])
        activations["logits, or a checkpointed block"] = max(logits, block)
    return MemoryOfRank(state, dict(activations))


def _largest_block(saved: dict[str, int], blocks: str) -> int:
    """What the block that saves most keeps while its own backward pass runs."""
    sizes: dict[str, int] = defaultdict(int)
    for name, size in saved.items():
        if block := re.match(rf"(?:{blocks})(?![^.])", name):
            sizes[block.group()] += size
    return max(sizes.values(), default=0)
