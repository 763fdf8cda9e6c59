"""PackedInputs: what a pack looks like to the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .image_attention import ImageAttention
from .windows import Chunk


@dataclass
class PackedInputs:
    """Samples of one pack, concatenated; the training input of `forward`.

    :param input_ids: (T,) token ids of all samples.
    :param chunks: lengths, insertion points and image tokens of each sample.
    :param images: (3, H, W) uint8 each, in order.
    :param logits_index: (A,) rows of the text for which logits are wanted; None: all.
    :param image_attention: listens to what text reads from images in this pass.
    """

    input_ids: Tensor
    chunks: list[Chunk]
    images: list[Tensor]
    logits_index: Tensor | None = None
    image_attention: ImageAttention | None = None
