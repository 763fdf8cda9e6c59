"""Qwen2.5-VL's vision tower from uint8 images, with transformers' parameter names.

Its own forward, because the library's runs one attention call a window and waits for the device
between them. Cells of 2x2 patches are regrouped into windows of 4x4 cells (112 px) for all blocks
but `fullatt_block_indexes`, as in `Qwen2_5_VisionTransformerPretrainedModel`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .regions import Compiler, compiling, normed
from .segments import Segments, on_device
from .tower_kinds import TOWER_KINDS
from .vision import VisionTower, by_size, segments_of
from .vision_block import RMSNorm, VisionBlock, VisionMLP

ROPE_THETA = 10000.0


class PatchProjection(nn.Module):
    """A Conv3d's parameter, applied as one linear.

    Both temporal slices of a still image are equal, so their weights are summed first.
    """

    def __init__(self, channels: int, width: int, temporal: int, patch: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, temporal, patch, patch))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    def forward(self, patches: Tensor) -> Tensor:
        """(patches, channels * patch * patch) -> (patches, width)."""
        return F.linear(patches, self.weight.sum(2).flatten(1))


class PatchEmbed(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.proj = PatchProjection(
            config.in_channels, config.hidden_size, config.temporal_patch_size, config.patch_size
        )

    def forward(self, patches: Tensor) -> Tensor:
        out: Tensor = self.proj(patches)
        return out


class PatchMerger(nn.Module):
    """Joins the 2x2 patches of a cell into one image token."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.cell = config.spatial_merge_size**2
        width = config.hidden_size * self.cell
        self.ln_q = RMSNorm(config.hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, config.out_hidden_size)
        )

    def forward(self, x: Tensor, compiler: Compiler | None = None) -> Tensor:
        with compiling(compiler):
            x = normed(self.ln_q, x)
        out: Tensor = self.mlp(rearrange(x, "(n cell) c -> n (cell c)", cell=self.cell))
        return out


@dataclass(frozen=True)
class _ImageLayout:
    """Index tables of one image size; `order` lists its cells window by window."""

    order: np.ndarray  # (n,) cell indices, row-major cells
    windows: tuple[int, ...]  # cells of each window
    rows: np.ndarray  # (patches,) patch row, in windowed order
    columns: np.ndarray  # (patches,) patch column, in windowed order


@dataclass(frozen=True)
class _PackLayout:
    """What all blocks of one call read, on the device.

    :param table: RoPE of all patches, two (patches, 1, D).
    :param full: segments of blocks that attend to whole images; :param windowed: of all others.
    :param order: (N,) int64, the cells in the order of their windows.
    """

    table: tuple[Tensor, Tensor]
    full: Segments
    windowed: Segments
    order: Tensor


class QwenTower(VisionTower):
    """Qwen2.5-VL's: patch 14, rotated positions, windows, gated feed-forward networks.

    :param config: a `Qwen2_5_VLVisionConfig`.
    """

    repeatable = True

    def __init__(self, config: Any) -> None:
        kind = TOWER_KINDS["qwen2_5_vl"]
        super().__init__(config, kind, config.patch_size, config.spatial_merge_size)
        if config.hidden_act != "silu":
            raise ValueError(
                f"vision_config.hidden_act is {config.hidden_act!r}; Qwen2.5-VL's tower uses 'silu'"
            )
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config)

    def align_ffn(self, multiple: int) -> None:
        """Pads the feed-forward networks' width to a multiple of this while they run.

        Matrix kernels of a GPU want rows of 16 bytes, and 3,420 columns in bf16 are none. The
        weights stay as they are, in memory and in every file: each forward pass pads them with
        zeros, whose products are zero, and autograd cuts the gradients again.

        :param multiple: 1: nothing is padded.
        """
        for mlp in self.modules():
            if isinstance(mlp, VisionMLP):
                mlp.aligned = multiple

    def _arrange(self, x: Tensor, layout: _PackLayout) -> Tensor:
        """Patches in the order of their windows."""
        cells = rearrange(x, "(n cell) c -> n cell c", cell=self.merge**2)
        return cells[layout.order].flatten(0, 1)

    def _block_inputs(self, number: int, layout: _PackLayout) -> tuple[Any, ...]:
        whole = number in self.config.fullatt_block_indexes
        return layout.table, layout.full if whole else layout.windowed

    def _merge(self, x: Tensor, layout: _PackLayout, compiler: Compiler | None) -> Tensor:
        tokens = self.merger(x, compiler)
        return torch.empty_like(tokens).index_copy(0, layout.order, tokens)

    def _lay_out(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> _PackLayout:
        """Of images of these heights and widths, one after another."""
        layouts = by_size(sizes, self._layout)
        cells = [len(layout.order) for layout in layouts]
        starts = np.cumsum([0, *cells])
        order = np.concatenate(
            [s + layout.order for s, layout in zip(starts, layouts, strict=False)]
        )
        patches = self.merge**2
        return _PackLayout(
            self._rope_table(layouts, device),
            segments_of([n * patches for n in cells], device),
            segments_of([n * patches for x in layouts for n in x.windows], device),
            on_device(order, device),
        )

    def _layout(self, height: int, width: int) -> _ImageLayout:
        config = self.config
        side = config.window_size // config.spatial_merge_size // config.patch_size
        return _image_layout(
            height // self.token_side, width // self.token_side, side, config.spatial_merge_size
        )

    def _rope_table(
        self, layouts: Sequence[_ImageLayout], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of patch rows and columns, float32: two (patches, 1, D)."""
        width = self.config.hidden_size // self.config.num_heads // 2
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        frequencies = 1.0 / (ROPE_THETA**exponent)
        rows, columns = (
            on_device(np.concatenate(parts), device)
            for parts in ([x.rows for x in layouts], [x.columns for x in layouts])
        )
        angles = torch.cat([p[:, None].float() * frequencies for p in (rows, columns)], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


@functools.lru_cache(maxsize=4096)
def _image_layout(rows: int, columns: int, window: int, merge: int) -> _ImageLayout:
    """Cells of an image of rows x columns cells, in row-major windows of window x window cells."""
    grid = np.arange(rows * columns).reshape(rows, columns)
    pieces = [
        grid[top : top + window, left : left + window].ravel()
        for top in range(0, rows, window)
        for left in range(0, columns, window)
    ]
    order = np.concatenate(pieces)
    corner_rows, corner_columns = (order // columns) * merge, (order % columns) * merge
    inner = np.arange(merge)
    patch_rows = corner_rows[:, None, None] + inner[:, None] + 0 * inner[None, :]
    patch_columns = corner_columns[:, None, None] + 0 * inner[:, None] + inner[None, :]
    return _ImageLayout(
        order, tuple(len(piece) for piece in pieces), patch_rows.ravel(), patch_columns.ravel()
    )
