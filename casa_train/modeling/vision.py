"""Qwen2.5-VL's vision tower from uint8 images, with transformers' parameter names.

Its own forward, because the library's runs one attention call a window and waits for the device
between them. Patches are in 2x2-cell order; cells are regrouped into windows of 4x4 cells (112 px)
for all blocks but `fullatt_block_indexes`, as in `Qwen2_5_VisionTransformerPretrainedModel`.
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

from .activation_checkpointing import run_block
from .regions import Compiler, compiling, normed
from .repeated_frames import RepeatedFrames
from .segments import Segments, on_device
from .vision_block import RMSNorm, VisionBlock, VisionMLP

# CLIP's statistics, which Qwen2.5-VL's image processor uses.
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

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


class VisionTower(nn.Module):
    """uint8 images -> image tokens.

    :param config: a `Qwen2_5_VLVisionConfig`.
    :ivar repeats: whether frames that come again may become CUDA graphs (`repeated_frames.py`).

    `train_last_blocks` (set by `set_trainable`) counts the blocks that train; everything before
    them runs without autograd and keeps no activations.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise ValueError(
                f"vision_config.hidden_act is {config.hidden_act!r}; Qwen2.5-VL's tower uses 'silu'"
            )
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList([VisionBlock(config) for _ in range(config.depth)])
        self.merger = PatchMerger(config)
        self.frozen_blocks = 0
        self.frozen_patches = False
        self.repeats = True
        self._repeated = RepeatedFrames()

    @property
    def token_side(self) -> int:
        """Side of the square of pixels that becomes one image token."""
        return int(self.config.patch_size * self.config.spatial_merge_size)

    def set_trainable(self, last_blocks: int) -> None:
        """Freezes all but the last blocks and the merger.

        :param last_blocks: blocks that train; 0 freezes the merger too, -1 trains everything.
        :raises ValueError: more blocks than the tower has.
        """
        depth = len(self.blocks)
        if not -1 <= last_blocks <= depth:
            raise ValueError(
                f"model.vision.train_last_blocks is {last_blocks}; the tower has {depth} blocks, "
                f"so expected 0..{depth}, or -1 to train everything"
            )
        self.frozen_patches = last_blocks >= 0
        self.frozen_blocks = 0 if last_blocks < 0 else depth - last_blocks
        self.requires_grad_(last_blocks != 0)
        for module in (self.patch_embed, *self.blocks[: self.frozen_blocks]):
            module.requires_grad_(not self.frozen_patches)

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

    def token_counts(self, images: Sequence[Tensor]) -> list[int]:
        """Image tokens of each (3, H, W) image.

        :raises ValueError: a side that is not a multiple of 28 (patch times merge).
        """
        side = self.token_side
        for i, image in enumerate(images):
            if (
                image.ndim != 3
                or image.shape[0] != 3
                or image.shape[1] % side
                or image.shape[2] % side
            ):
                raise ValueError(
                    f"image {i} has shape {tuple(image.shape)}; expected (3, H, W) with H and W "
                    f"multiples of {side}: pass images through the processor first"
                )
        return [(image.shape[1] // side) * (image.shape[2] // side) for image in images]

    def forward(
        self,
        images: Sequence[Tensor],
        backend: str = "auto",
        checkpointed: bool = False,
        compiler: Compiler | None = None,
    ) -> Tensor:
        """Image tokens of all images, one after another.

        :param images: (3, H, W) each, any dtype with values 0..255, sides multiples of 28.
        :param backend: attention backend.
        :param checkpointed: trained blocks keep their inputs alone and run twice.
        :param compiler: what compiles the blocks' regions; None: they run eagerly.
        :return: (N, out_hidden_size), row-major within each image.
        """
        weight = self.patch_embed.proj.weight
        # Weights that accelerate offloaded lie nowhere; its hooks move what enters a module.
        entry = images[0].device if weight.is_meta else weight.device
        sizes = tuple((image.shape[1], image.shape[2]) for image in images)
        patches = self._patches(images, entry, weight.dtype)
        if self.repeats and compiler is None and self._repeated.take(self, patches):

            def tokens(patches: Tensor, layout: _PackLayout) -> Tensor:
                return self._blocks(self.patch_embed(patches), layout, backend)

            kind = sizes, backend
            return self._repeated.run(kind, lambda: self._lay_out(sizes, entry), tokens, patches)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_patches):
            x = self.patch_embed(patches)
        return self._blocks(x, self._lay_out(sizes, x.device), backend, checkpointed, compiler)

    def _blocks(
        self,
        x: Tensor,
        layout: _PackLayout,
        backend: str,
        checkpointed: bool = False,
        compiler: Compiler | None = None,
    ) -> Tensor:
        """(patches, C) -> (N, out_hidden_size), row-major within each image."""
        cell_patches = self.config.spatial_merge_size**2
        x = rearrange(x, "(n cell) c -> n cell c", cell=cell_patches)[layout.order].flatten(0, 1)
        for i, block in enumerate(self.blocks):
            whole = i in self.config.fullatt_block_indexes
            segments = layout.full if whole else layout.windowed
            frozen = self.frozen_patches and i < self.frozen_blocks
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                again = checkpointed and torch.is_grad_enabled()
                given = layout.table, segments, backend, compiler
                x = run_block(block, x, *given, checkpointed=again)
            if frozen and x.requires_grad:
                raise AssertionError(
                    f"frozen vision block {i} keeps activations for a backward pass"
                )
        tokens = self.merger(x, compiler)
        return torch.empty_like(tokens).index_copy(0, layout.order, tokens)

    def _lay_out(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> _PackLayout:
        """Of images of these heights and widths, one after another."""
        of_size = {size: self._layout(*size) for size in set(sizes)}
        layouts = [of_size[size] for size in sizes]
        cells = [len(layout.order) for layout in layouts]
        starts = np.cumsum([0, *cells])
        order = np.concatenate(
            [s + layout.order for s, layout in zip(starts, layouts, strict=False)]
        )
        patches = self.config.spatial_merge_size**2
        return _PackLayout(
            self._rope_table(layouts, device),
            _segments([n * patches for n in cells], device),
            _segments([n * patches for x in layouts for n in x.windows], device),
            on_device(order, device),
        )

    def _patches(
        self, images: Sequence[Tensor], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Normalised patches in 2x2-cell order, (patches, 3 * patch * patch)."""
        mean, std = (
            on_device(np.array(s, np.float32) * np.float32(255), device)[:, None, None]
            for s in (IMAGE_MEAN, IMAGE_STD)
        )
        merge, patch = self.config.spatial_merge_size, self.config.patch_size
        pieces = []
        for image in images:
            pixels = (image.to(device, non_blocking=True).float() - mean) / std
            pieces.append(
                rearrange(
                    pixels,
                    "c (h mh p) (w mw q) -> (h w mh mw) (c p q)",
                    mh=merge,
                    mw=merge,
                    p=patch,
                    q=patch,
                )
            )
        return torch.cat(pieces).to(dtype)

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


def _segments(lengths: Sequence[int], device: torch.device) -> Segments:
    """Consecutive runs of patches, each attending to itself."""
    starts = np.cumsum([0, *lengths]).tolist()
    ranges = [[pair] for pair in zip(starts, starts[1:], strict=False)]
    return Segments(ranges, ranges, causal=False, device=device)
