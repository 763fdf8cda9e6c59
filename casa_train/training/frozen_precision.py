"""Frozen vision blocks in fp8 once a run's weights are in, and how far that moves image tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from casa_train.config.schema import Config
from casa_train.cost.full_pack import full_inputs, full_pack
from casa_train.data.processor import token_side_of
from casa_train.distributed.ranks import Ranks
from casa_train.io.numbers import count
from casa_train.setup.fp8 import check_fp8, use_fp8


def lower_frozen(config: Config, model: Any, ranks: Ranks) -> None:
    """Makes frozen vision blocks what `parallel.frozen_precision` asks for, and says how far that
    moves the tower's output, on a full pack's images of noise.

    :param model: the whole model with its values, those of a checkpoint included.
    :raises UserError: as `check_fp8`, which a benchmark has not asked before.
    """
    if config.parallel.frozen_precision != "fp8":
        return
    check_fp8(config, model.visual)
    generator = torch.Generator().manual_seed(config.seed)
    side = token_side_of(config)
    sizes = [image.shape for image in full_inputs(full_pack(config), "meta", side).images]
    images = [
        torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(ranks.device)
        for size in sizes
    ]

    @torch.no_grad()
    def tokens() -> Tensor:
        found: Tensor = model.visual(images, model.attention_backend)
        return found.float()

    before = tokens()
    use_fp8(model.visual)
    error = float((tokens() - before).norm() / before.norm())
    ranks.log(
        f"fp8: {count(model.visual.frozen_blocks, 'frozen vision block')}; the tower's output on a "
        f"full pack of {count(len(images), 'image')} of noise is {error:.2%} from bf16's"
    )
