"""What vision towers share: uint8 images become normalised patches, run through blocks of which the
first may be frozen, and leave as one image token for each cell of 2x2 patches.

Patches come in the order of cells, row-major, and within a cell row-major. A tower adds its own
embedding, blocks and merger, and what they read beside the patches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from .activation_checkpointing import run_block
from .regions import Compiler
from .repeated_frames import RepeatedFrames
from .segments import Segments, on_device
from .tower_kinds import TowerKind


class VisionTower(nn.Module):
    """uint8 images -> image tokens.

    :param config: of the kind's `config_class`.
    :param kind: what is known of this tower without its weights.
    :param patch: pixels of a patch's side; :param merge: patches of a token's side.
    :ivar repeats: whether frames that come again may become CUDA graphs (`repeated_frames.py`),
        where the tower is `repeatable`.
    :raises ValueError: patches that do not make tokens of the kind's side.

    `train_last_blocks` (set by `set_trainable`) counts the blocks that train; everything before
    them runs without autograd and keeps no activations.
    """

    patch_embed: nn.Module
    blocks: nn.ModuleList
    merger: nn.Module
    # Of the numbers in a patch: c channels, p rows, q columns.
    patch_order = "(c p q)"
    # Whether CUDA graphs of it have been measured to say what its eager blocks say.
    repeatable = False

    def __init__(self, config: Any, kind: TowerKind, patch: int, merge: int) -> None:
        super().__init__()
        if patch * merge != kind.side:
            raise ValueError(
                f"vision_config: patch_size {patch} times {merge} patches must be {kind.side}, the "
                f"grid that images are resized to for {kind.title}'s tower"
            )
        self.config = config
        self.kind, self.patch, self.merge = kind, patch, merge
        self.frozen_blocks = 0
        self.frozen_patches = False
        self.repeats = True
        self._repeated = RepeatedFrames()

    @property
    def token_side(self) -> int:
        """Side of the square of pixels that becomes one image token."""
        return self.kind.side

    def set_trainable(self, last_blocks: int) -> None:
        """Freezes all but the last blocks and what stands behind them.

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
        """Pads the width of feed-forward networks to a multiple of this while they run, where a
        tower's published widths need it; here none do.
        """

    def token_counts(self, images: Sequence[Tensor]) -> list[int]:
        """Image tokens of each (3, H, W) image.

        :raises ValueError: a side that is not a multiple of `token_side`.
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

        :param images: (3, H, W) each, any dtype with values 0..255, sides multiples of
            `token_side`.
        :param backend: attention backend.
        :param checkpointed: trained blocks keep their inputs alone and run twice.
        :param compiler: what compiles the blocks' regions, where they have some; None: they run
            eagerly.
        :return: (N, width of an image token), row-major within each image.
        """
        weight = next(self.patch_embed.parameters())
        # Weights that accelerate offloaded lie nowhere; its hooks move what enters a module.
        entry = images[0].device if weight.is_meta else weight.device
        sizes = tuple((image.shape[1], image.shape[2]) for image in images)
        patches = self._patches(images, entry, weight.dtype)
        repeats = self.repeats and self.repeatable and compiler is None
        if repeats and self._repeated.take(self, patches):

            def tokens(patches: Tensor, layout: Any) -> Tensor:
                return self._blocks(
                    self._arrange(self.patch_embed(patches), layout), layout, backend
                )

            kind = sizes, backend
            return self._repeated.run(kind, lambda: self._lay_out(sizes, entry), tokens, patches)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen_patches):
            x = self.patch_embed(patches)
            layout = self._lay_out(sizes, x.device)
            x = self._arrange(x, layout)
        return self._blocks(x, layout, backend, checkpointed, compiler)

    # What a tower adds. A layout is what all blocks of one call read, on the device.

    def _lay_out(self, sizes: Sequence[tuple[int, int]], device: torch.device) -> Any:
        """Of images of these heights and widths, one after another."""
        raise NotImplementedError

    def _arrange(self, x: Tensor, layout: Any) -> Tensor:
        """(patches, C) as embedded -> what the first block reads, alike."""
        raise NotImplementedError

    def _block_inputs(self, number: int, layout: Any) -> tuple[Any, ...]:
        """What a block reads beside its patches."""
        raise NotImplementedError

    def _merge(self, x: Tensor, layout: Any, compiler: Compiler | None) -> Tensor:
        """What the last block leaves, (patches, C) -> image tokens, row-major within each image."""
        raise NotImplementedError

    def _blocks(
        self,
        x: Tensor,
        layout: Any,
        backend: str,
        checkpointed: bool = False,
        compiler: Compiler | None = None,
    ) -> Tensor:
        """(patches, C), arranged -> image tokens, row-major within each image."""
        for i, block in enumerate(self.blocks):
            frozen = self.frozen_patches and i < self.frozen_blocks
            with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
                again = checkpointed and torch.is_grad_enabled()
                given = *self._block_inputs(i, layout), backend, compiler
                x = run_block(block, x, *given, checkpointed=again)
            if frozen and x.requires_grad:
                raise AssertionError(
                    f"frozen vision block {i} keeps activations for a backward pass"
                )
        return self._merge(x, layout, compiler)

    def _patches(
        self, images: Sequence[Tensor], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Normalised patches in 2x2-cell order, (patches, 3 * patch * patch)."""
        mean, std = (
            on_device(np.array(s, np.float32) * np.float32(255), device)[:, None, None]
            for s in (self.kind.mean, self.kind.std)
        )
        pieces = []
        for image in images:
            pixels = (image.to(device, non_blocking=True).float() - mean) / std
            pieces.append(
                rearrange(
                    pixels,
                    f"c (h mh p) (w mw q) -> (h w mh mw) {self.patch_order}",
                    mh=self.merge,
                    mw=self.merge,
                    p=self.patch,
                    q=self.patch,
                )
            )
        return torch.cat(pieces).to(dtype)


def segments_of(lengths: Sequence[int], device: torch.device) -> Segments:
    """Consecutive runs of patches, each attending to itself."""
    starts = np.cumsum([0, *lengths]).tolist()
    ranges = [[pair] for pair in zip(starts, starts[1:], strict=False)]
    return Segments(ranges, ranges, causal=False, device=device)


def by_size(sizes: Sequence[tuple[int, int]], make: Callable[[int, int], Any]) -> list[Any]:
    """What `make` makes of each height and width, once for images of one size."""
    made = {size: make(*size) for size in set(sizes)}
    return [made[size] for size in sizes]
