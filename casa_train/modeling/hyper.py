"""Hyper attention (mPLUG-Owl3, arXiv 2408.04840): cross-attention inside a few blocks.

It shares queries and input norm with self-attention, has its own keys and values for images, and
each text token weighs both reads by a sigmoid gate of its own: g = sigmoid(w x + b),
read = (1 - g) SA + g CA, through the block's output projection. A text token reads all images of
its sample that stand before it; their keys stand at the position of the image, as in the paper's
interleaved RoPE.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import (
    DecoderContext,
    Heads,
    feed_forward,
    plain_block,
    project,
    query_mask,
    self_attention,
)
from .block_work import BlockWork
from .fusion import register
from .image_attention import IMAGE_GATE
from .lean import linear
from .regions import normed
from .windowed import (
    WindowedMechanism,
    head_norms,
    image_heads,
    linear_like,
    norm_like,
    read_windows,
)

# sigmoid(-2) = 0.12: the model starts near its backbone, and images already have a gradient.
GATE_START = -2.0
# What may begin as a copy of the layer's self-attention. There is a norm of keys where the backbone
# norms its heads: the queries come through theirs, too.
COPIED = ("k_proj", "v_proj", "k_norm")


@register
class HyperAttention(WindowedMechanism):
    """Options: `layers`, indices of the blocks (null: four, spread over the depth); `init` of keys
    and values: from_self_attention or random.
    """

    name = "hyper_attention"
    options = {"layers": None, "init": "from_self_attention"}
    choices = {"init": ("from_self_attention", "random")}
    history = True
    positions = "frozen"
    decode_steps = True

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        depth = text_config.num_hidden_layers
        chosen = self.fusion["layers"]
        if chosen is None:
            chosen = [0, depth // 3, 2 * depth // 3, depth - 1]
        valid = isinstance(chosen, list | tuple) and all(type(i) is int for i in chosen)
        if not valid or not chosen or not all(0 <= i < depth for i in chosen):
            raise ValueError(
                f"fusion.layers is {chosen!r}; expected a list of block indices from 0 to "
                f"{depth - 1}"
            )
        self.layers = sorted(set(chosen))

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        return HyperLayer(layer, layer_idx) if layer_idx in self.layers else None

    @torch.no_grad()
    def initialise(self, layer: Any) -> None:
        fusion = layer.fusion
        if fusion is None:
            return
        fusion.gate.weight.zero_()
        fusion.gate.bias.fill_(GATE_START)
        if self.fusion["init"] == "from_self_attention":
            for name in filter(fusion._modules.get, COPIED):
                getattr(fusion, name).load_state_dict(getattr(layer.self_attn, name).state_dict())

    def copied(self, name: str) -> bool:
        own = self.fusion["init"] == "from_self_attention"
        return own and any(f".fusion.{part}." in name for part in COPIED)

    def run_layer(
        self, layer: Any, h: Tensor, images: Tensor, context: DecoderContext
    ) -> tuple[Tensor, Tensor]:
        if layer.fusion is None:
            return plain_block(layer, h, context), images
        attention = layer.self_attn
        x = normed(layer.input_layernorm, h)
        heads = project(attention, x, attention.head_dim)
        read = self_attention(layer, heads, context)
        pictures = image_heads(
            layer.fusion, layer.input_layernorm, images, attention.head_dim, context
        )
        combined = layer.fusion(x, pictures, heads, read, context)
        return feed_forward(layer, h, linear(attention.o_proj, combined)), images

    def count_layer(self, work: BlockWork, layer_idx: int, h: bool, z: bool) -> tuple[bool, bool]:
        if layer_idx not in self.layers:
            return work.plain_block(h), z
        x = work.norm(h)
        q, k = work.project(x)
        read = work.self_attention(q, k)
        seen = work.cross_attention(q, work.image_keys(True, work.norm(z)))
        gate = work.text_linear(work.sizes.width, 1, True, x)
        return work.feed_forward(h | work.project_out(read or seen or gate)), z


class HyperLayer(nn.Module):
    """Keys and values for images, and the gate."""

    def __init__(self, layer: Any, layer_idx: int) -> None:
        super().__init__()
        attention = layer.self_attn
        self.layer_idx = layer_idx
        self.head_dim: int = attention.head_dim
        self.k_proj = linear_like(attention.k_proj)
        self.v_proj = linear_like(attention.v_proj)
        if "k_norm" in head_norms(attention):
            self.k_norm = norm_like(attention.k_norm)
        self.gate = nn.Linear(attention.q_proj.in_features, 1)

    def forward(
        self, x: Tensor, pictures: Heads, heads: Heads, read: Tensor, context: DecoderContext
    ) -> Tensor:
        """Text's self-attention read (T, H * D), mixed with what it reads in images.

        :param x: (T, C) normed text; :param pictures: keys and values of the image tokens.
        """
        cross = context.plan.cross
        assert cross is not None
        seen, _ = read_windows(self.layer_idx, Heads(heads.q, None, None), pictures, context)
        gate = linear(self.gate, x).sigmoid()
        if not cross.covers(len(x)):
            gate = gate * query_mask(cross, len(x), gate.dtype)
        if context.image_attention is not None:
            context.image_attention.gate(self.layer_idx, IMAGE_GATE, gate)
        mixed: Tensor = read + gate * (seen - read)
        return mixed
