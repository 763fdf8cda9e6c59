"""SigLIP2's vision tower of any aspect (NaFlex) from uint8 images, patches packed without padding.

Its blocks are those of transformers' `Siglip2VisionModel`, with the names of its parameters inside
of `patch_embed`, `blocks` and `merger`. The pooling head, which makes one vector of an image, is
left out. 2x2 patches side by side make an image token of four times the width (pixel unshuffle), so
the tower adds no weights to the published ones: the model's adapter leads to the text's width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .attention import varlen_attention
from .regions import Compiler
from .segments import Segments, on_device
from .tower_kinds import MERGE, TOWER_KINDS, tower_shape
from .vision import VisionTower, by_size, segments_of

ACTIVATION = "gelu_pytorch_tanh"


class PositionTable(nn.Module):
    """Learned positions of a square of patches, resized to the grid of each image.

    Bilinear with antialiasing, corners not aligned, in float32, as transformers' `Siglip2`
    does it: along each axis a matrix of weights, applied as products, which give the same
    gradients in every run.
    """

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.empty(side * side, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, axes: Sequence[tuple[Tensor, Tensor]], of_image: Sequence[int]) -> Tensor:
        """Positions of the patches of all images.

        One tensor: ranks whose images have another number of sizes would run another number of
        ZeRO-3's hooks.

        :param axes: for each size, the weights of its rows (h, side) and columns (w, side),
            float32.
        :param of_image: for each image which of the sizes it has.
        :return: (patches, C), in the order of 2x2 cells.
        """
        table = rearrange(self.weight.float(), "(g k) c -> g (k c)", g=self.side)
        found = []
        with _exact(self.weight.device):
            for rows, columns in axes:
                lines = rearrange(rows @ table, "h (k c) -> k (h c)", k=self.side)
                grid = rearrange(
                    columns @ lines,
                    "(w mw) (h mh c) -> (h w mh mw) c",
                    mh=MERGE,
                    mw=MERGE,
                    c=self.weight.shape[1],
                )
                found.append(grid.to(self.weight.dtype))
        return torch.cat([found[size] for size in of_image])


class SiglipPatches(nn.Module):
    """Patches as one linear; the positions that are added lie beside it."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        shape = tower_shape(config)
        self.patch_embedding = nn.Linear(shape.patch, shape.width)
        self.position_embedding = PositionTable(shape.table, shape.width)

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, 3 * patch * patch) -> (patches, C), without positions."""
        out: Tensor = self.patch_embedding(patches)
        return out


class SiglipAttention(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: Tensor, segments: Segments, backend: str) -> Tensor:
        """(patches, C) -> (patches, C)."""
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1))
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.out_proj(varlen_attention(q, k, v, segments, backend).flatten(1))
        return out


class SiglipMLP(nn.Module):
    """Two linears with the tanh form of GELU between them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return out


class SiglipBlock(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.self_attn = SiglipAttention(config)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = SiglipMLP(config)

    def forward(
        self, x: Tensor, segments: Segments, backend: str, compiler: Compiler | None = None
    ) -> Tensor:
        """(patches, C) -> (patches, C).

        :param compiler: nothing here is compiled: norms and activation are one kernel each already.
        """
        x = x + self.self_attn(self.layer_norm1(x), segments, backend)
        out: Tensor = x + self.mlp(self.layer_norm2(x))
        return out


class PixelUnshuffle(nn.Module):
    """The last norm, and the patches of a cell side by side, row-major."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """(N * 4, C) -> (N, 4 * C)."""
        normed: Tensor = self.post_layernorm(x)
        return rearrange(normed, "(n cell) c -> n (cell c)", cell=MERGE**2)


@dataclass(frozen=True)
class _PackLayout:
    """What one call reads, on the device.

    :param segments: of the images' patches.
    :param axes: for each size of image, what `PositionTable` wants to know of it.
    :param of_image: which of these each image has.
    """

    segments: Segments
    axes: tuple[tuple[Tensor, Tensor], ...]
    of_image: tuple[int, ...]


class SiglipTower(VisionTower):
    """SigLIP2's: patch 16, learned positions, every block sees the whole image, LayerNorm, GELU.

    :param config: a `Siglip2VisionConfig`.
    :raises ValueError: settings that no published tower has.
    """

    patch_order = "(p q c)"

    def __init__(self, config: Any) -> None:
        for name, fits, expected in (
            ("hidden_act", config.hidden_act == ACTIVATION, repr(ACTIVATION)),
            ("num_channels", config.num_channels == 3, "3"),
            ("attention_dropout", not config.attention_dropout, "0"),
            ("patch_size", isinstance(config.patch_size, int), "a whole number"),
            (
                "num_attention_heads",
                config.hidden_size % config.num_attention_heads == 0,
                f"a divisor of hidden_size, {config.hidden_size}",
            ),
            ("num_patches", config.num_patches == int(config.num_patches**0.5) ** 2, "a square"),
        ):
            if not fits:
                raise ValueError(
                    f"vision_config.{name} is {getattr(config, name)!r}; for SigLIP2's tower it "
                    f"must be {expected}"
                )
        super().__init__(config, TOWER_KINDS["siglip2"], config.patch_size, MERGE)
        self.patch_embed = SiglipPatches(config)
        self.blocks = nn.ModuleList([SiglipBlock(config) for _ in range(config.num_hidden_layers)])
        self.merger = PixelUnshuffle(config)

    def _lay_out(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> _PackLayout:
        distinct = list(dict.fromkeys(sizes))
        side = tower_shape(self.config).table
        axes = tuple(
            (_axis(h // self.patch, side, device), _axis(w // self.patch, side, device))
            for h, w in distinct
        )
        patches = by_size(sizes, lambda h, w: (h // self.patch) * (w // self.patch))
        of_image = tuple(distinct.index(size) for size in sizes)
        return _PackLayout(segments_of(patches, device), axes, of_image)

    def _arrange(self, x: Tensor, layout: _PackLayout) -> Tensor:
        """Patches with their positions."""
        positions = self.patch_embed.get_submodule("position_embedding")
        where: Tensor = positions(layout.axes, layout.of_image)
        return x + where

    def _block_inputs(self, number: int, layout: _PackLayout) -> tuple[Any, ...]:
        return (layout.segments,)

    def _merge(self, x: Tensor, layout: _PackLayout, compiler: Compiler | None) -> Tensor:
        tokens: Tensor = self.merger(x)
        return tokens


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """A stretch whose products autocast does not round."""
    if not torch.amp.is_autocast_available(device.type):  # on the meta device
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _axis(length: int, side: int, device: torch.device) -> Tensor:
    """Weights of the table's rows (or columns) in each of an image's: (length, side) float32.

    Those of torch's bilinear interpolation with antialiasing: a triangle around the place of each
    patch in the table, as wide as a patch of the table or of the image, whichever is wider.
    """
    scale = np.float32(side / length)
    places = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    away = np.abs(np.arange(side, dtype=np.float32) - places[:, None])
    weights = np.clip(1 - away / max(scale, np.float32(1)), 0, None)
    weights = weights / weights.sum(1, keepdims=True)
    return on_device(weights.astype(np.float32), device)
