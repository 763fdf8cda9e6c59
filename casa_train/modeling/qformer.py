"""Insertion of compressed images: learned queries read an image's tokens, then join the stream.

A small Q-Former (BLIP-2, arXiv 2301.12597) as the paper's baseline has it: Q queries a picture, the
same for every size of picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .attention import varlen_attention
from .block_work import Paper
from .fusion import WIDEST, register
from .insertion import Insertion
from .segments import Segments
from .windows import Chunk


@register
class QFormerInsertion(Insertion):
    """Options: `queries` tokens a picture; `layers` of the resampler; its `heads` (0: width / 64);
    `ffn_width` of its feed-forward networks (0: four times its width, which is the backbone's).

    Under multimodal RoPE the queries stand in one row.
    """

    name = "qformer_insertion"
    options = {"queries": 128, "layers": 2, "heads": 0, "ffn_width": 0}

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        width = text_config.hidden_size
        for key, least, most in (("queries", 1, 1 << 16), ("layers", 1, 1000), ("heads", 0, width)):
            self.check_whole(key, least, most)
        self.check_whole("ffn_width", 0, WIDEST)
        self.ffn_width: int = self.fusion["ffn_width"] or 4 * width
        self.heads = self.fusion["heads"] or max(1, width // 64)
        if width % self.heads:
            raise ValueError(
                f"fusion.heads is {self.heads}, which does not divide the backbone's width {width}"
            )

    def make_resampler(self) -> nn.Module:
        return QFormer(
            self.text_config.hidden_size,
            self.heads,
            self.fusion["queries"],
            self.fusion["layers"],
            self.text_config.initializer_range,
            self.ffn_width,
        )

    def count_resampler(self, paper: Paper, width: int, pack: Sequence[Chunk], z: bool) -> bool:
        queries, images = self.fusion["queries"], sum(len(chunk.images) for chunk in pack)
        tokens, count = sum(chunk.image_tokens for chunk in pack), images * queries

        def linear(rows: int, inputs: int = width, outputs: int = width) -> None:
            paper.linear("resampler", rows, inputs, outputs, True, True)  # all of it is new

        for _ in range(self.fusion["layers"]):
            for _ in range(3):
                linear(count)
            paper.attention("resampler", images * queries**2, width, True, True, True)
            linear(count)
            linear(count)
            for _ in range(2):
                linear(tokens)
            paper.attention("resampler", tokens * queries, width, True, True, True)
            linear(count)
            linear(count, outputs=self.ffn_width)
            linear(count, inputs=self.ffn_width)
        return z or images > 0

    def compress(self, chunks: Sequence[Chunk]) -> Sequence[Chunk]:
        queries = self.fusion["queries"]
        return [
            replace(c, images=(queries,) * len(c.images), rows=(1,) * len(c.images)) for c in chunks
        ]


class QFormer(nn.Module):
    """Pre-norm transformer of learned queries; every image is read by its own copy of them.

    :param width: C; :param heads: H; :param queries: Q; :param std: of the queries' first values.
    :param ffn: width of the feed-forward networks.
    """

    def __init__(
        self, width: int, heads: int, queries: int, layers: int, std: float, ffn: int
    ) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(queries, width))
        self.layers = nn.ModuleList([QFormerLayer(width, heads, ffn) for _ in range(layers)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.std = std
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries, std=self.std)

    def forward(self, images: Tensor, counts: Sequence[int], backend: str) -> Tensor:
        """Image tokens (N, C) of images with `counts` tokens each -> (images * Q, C)."""
        q, device = len(self.queries), images.device
        own = [[(i * q, (i + 1) * q)] for i in range(len(counts))]
        starts = np.cumsum([0, *counts]).tolist()
        theirs = [[pair] for pair in zip(starts, starts[1:], strict=False)]
        among = Segments(own, own, causal=False, device=device)
        across = Segments(own, theirs, causal=False, device=device)
        s = repeat(self.queries, "q c -> (n q) c", n=len(counts))
        for layer in self.layers:
            s = layer(s, images, among, across, backend)
        out: Tensor = self.norm(s)
        return out


class QFormerLayer(nn.Module):
    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.self_norm, self.cross_norm, self.image_norm, self.ffn_norm = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(4)
        )
        self.self_attn = QFormerAttention(width, heads)
        self.cross_attn = QFormerAttention(width, heads)
        self.ffn = QFormerFFN(width, ffn)

    def forward(
        self, s: Tensor, images: Tensor, among: Segments, across: Segments, backend: str
    ) -> Tensor:
        x = self.self_norm(s)
        s = s + self.self_attn(x, x, among, backend)
        s = s + self.cross_attn(self.cross_norm(s), self.image_norm(images), across, backend)
        out: Tensor = s + self.ffn(self.ffn_norm(s))
        return out


class QFormerAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(3))
        # A bias of the keys shifts all scores of a query alike: softmax does not see it.
        self.k_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, y: Tensor, segments: Segments, backend: str) -> Tensor:
        q, k, v = (
            rearrange(t, "n (h d) -> n h d", h=self.heads)
            for t in (self.q_proj(x), self.k_proj(y), self.v_proj(y))
        )
        out: Tensor = self.o_proj(varlen_attention(q, k, v, segments, backend).flatten(1))
        return out


class QFormerFFN(nn.Module):
    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, ffn)
        self.down = nn.Linear(ffn, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out
