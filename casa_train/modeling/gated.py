"""Gated cross-attention (Flamingo, arXiv 2204.14198): new layers between the backbone's blocks.

Before a block, text reads the images of its window through a gate that starts at zero, then passes
a gated feed-forward network: h <- h + tanh(a) CA(norm(h), y); h <- h + tanh(b) FFN(norm(h)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import DecoderContext, plain_block, project, project_out, query_mask
from .block_work import BlockWork
from .fusion import WIDEST, register
from .image_attention import ATTENTION_GATE, FFN_GATE
from .regions import RegionMLP, normed
from .windowed import WindowedMechanism, image_heads, linear_like, norm_like, read_windows


@register
class GatedCrossAttention(WindowedMechanism):
    """Options: `every` n puts a new layer before blocks n-1, 2n-1, ...; `ffn_width` of its
    feed-forward network (0: the backbone's).

    Text without an image before it passes the new layers unchanged, so that text alone gives the
    backbone's own logits; in Flamingo the feed-forward part acts on it too. The projections are
    new, and go through no norms of heads, whatever the backbone has.
    """

    name = "gated_cross_attention"
    options = {"every": 1, "ffn_width": 0}
    decode_steps = True

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        self.check_every()
        self.check_whole("ffn_width", 0, WIDEST)
        self.ffn_width: int = self.fusion["ffn_width"] or text_config.intermediate_size

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        return GatedLayer(layer, layer_idx, self.ffn_width) if self.has_fusion(layer_idx) else None

    def zero_at_start(self, name: str) -> bool:
        # Closed gates let no gradient through to what stands behind them.
        if ".fusion." in name:
            return not name.endswith("_gate")
        return name.startswith(("visual", "adapter"))

    def run_layer(
        self, layer: Any, h: Tensor, images: Tensor, context: DecoderContext
    ) -> tuple[Tensor, Tensor]:
        if layer.fusion is not None:
            h = layer.fusion(h, images, context)
        return plain_block(layer, h, context), images

    def count_layer(self, work: BlockWork, layer_idx: int, h: bool, z: bool) -> tuple[bool, bool]:
        if self.has_fusion(layer_idx):  # everything in it is new, so all of it trains
            width, q_width = work.sizes.width, work.sizes.q_width
            q = work.text_linear(width, q_width, True, True)
            read = work.cross_attention(q, work.image_keys(True, True))
            work.text_linear(q_width, width, True, read)
            h = work.mlp("fusion, text projections", work.text, True, True, self.ffn_width)
        return work.plain_block(h), z


class GatedLayer(nn.Module):
    """Cross-attention and feed-forward network, each behind a tanh gate that starts closed."""

    def __init__(self, layer: Any, layer_idx: int, ffn: int) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.layer_idx = layer_idx
        self.head_dim: int = attention.head_dim
        self.norm = norm_like(layer.input_layernorm)
        self.image_norm = norm_like(layer.input_layernorm)
        self.q_proj = linear_like(attention.q_proj)
        self.k_proj = linear_like(attention.k_proj)
        self.v_proj = linear_like(attention.v_proj)
        self.o_proj = linear_like(attention.o_proj)
        self.ffn_norm = norm_like(layer.input_layernorm)
        self.mlp = GatedMLP(mlp, ffn)
        self.attention_gate = nn.Parameter(torch.empty(1))
        self.ffn_gate = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.attention_gate)
        nn.init.zeros_(self.ffn_gate)

    def forward(self, h: Tensor, images: Tensor, context: DecoderContext) -> Tensor:
        """(T, C) text and (N, C) image tokens -> (T, C)."""
        assert context.plan.cross is not None
        cross = context.plan.cross
        text = project(self, normed(self.norm, h), self.head_dim, keys=False)
        pictures = image_heads(self, self.image_norm, images, self.head_dim, context)
        read, _ = read_windows(self.layer_idx, text, pictures, context)
        if context.image_attention is not None:
            gates = {ATTENTION_GATE: self.attention_gate, FFN_GATE: self.ffn_gate}
            for name, gate in gates.items():
                context.image_attention.gate(self.layer_idx, name, gate.tanh().expand(len(h), 1))
        h = h + self.attention_gate.tanh() * project_out(self.o_proj, read, cross)
        passed = self.ffn_gate.tanh() * self.mlp(normed(self.ffn_norm, h))
        if not cross.covers(len(h)):
            passed = passed * query_mask(cross, len(h), h.dtype)
        out: Tensor = h + passed
        return out


class GatedMLP(RegionMLP):
    """A gated feed-forward network like the backbone's, `ffn` wide, with its activation."""

    def __init__(self, mlp: Any, ffn: int) -> None:
        super().__init__()
        self.gate_proj = linear_like(mlp.gate_proj, outputs=ffn)
        self.up_proj = linear_like(mlp.up_proj, outputs=ffn)
        self.down_proj = linear_like(mlp.down_proj, inputs=ffn)
        self.act_fn = mlp.act_fn
