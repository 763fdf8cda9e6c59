"""Images: header checks, decoding, resizing to multiples of 28; out come uint8 (3, H, W) tensors.

Training and every export run this file, so an image reaches the model with the same bits. Sizes
follow Qwen2.5-VL: aspect kept, both sides multiples of 28, at most `max_pixels`. The model
normalises.
"""

from __future__ import annotations

import io
import math
import os
import urllib.request
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 28  # pixels of an image token's side: patch 14, 2x2 merge
MAX_PIXELS = 952 * 952
MAX_ASPECT = 200
URLS = ("http://", "https://", "data:")
TIMEOUT = 30  # seconds for an image of a URL


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def target_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) that an image of this size is resized to; H * W / 784 image tokens.

    :raises ImageError: an empty image, or an aspect ratio over 200.
    """
    if width < 1 or height < 1:
        raise ImageError("empty_image", f"image of {width}x{height} pixels is empty")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            "extreme_aspect", f"image of {width}x{height} pixels: aspect ratio over {MAX_ASPECT}"
        )
    rows, columns = max(1, round(height / SIDE)), max(1, round(width / SIDE))
    budget = max_pixels // SIDE**2
    if rows * columns > budget:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / SIDE))
        columns = max(1, math.floor(width / shrink / SIDE))
        # A very long image keeps one row (or column); only then can the other side be too long.
        rows, columns = min(rows, budget), min(columns, budget)
    return rows * SIDE, columns * SIDE


class CasaImageProcessor:
    """Turns paths, PIL images, encoded bytes or uint8 frames into resized uint8 tensors.

    :param max_pixels: upper bound on H * W; 952 * 952 in the paper.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS) -> None:
        if max_pixels < SIDE**2:
            raise ValueError(
                f"max_pixels is {max_pixels}; one image token needs {SIDE**2} pixels "
                f"({SIDE}x{SIDE})"
            )
        self.max_pixels = int(max_pixels)

    def token_count(self, width: int, height: int) -> int:
        """Image tokens of an image of this size."""
        h, w = target_size(width, height, self.max_pixels)
        return h * w // SIDE**2

    def load(self, image: Any) -> Tensor:
        """One image, resized.

        :param image: path, http(s) or data URL, bytes of an image file, PIL image, or a uint8
            (3, H, W) tensor.
        :return: (3, H, W) uint8.
        :raises ImageError: unreadable, empty or extreme images.
        """
        if isinstance(image, Tensor):
            return self._resize(image)
        if isinstance(image, Image.Image):
            return self._resize(_to_tensor(image))
        try:
            source: Any = io.BytesIO(image) if isinstance(image, bytes) else os.fspath(image)
        except TypeError as error:
            raise ImageError(
                "unreadable_image",
                f"image is a {type(image).__name__}; expected a path, a URL, bytes, a PIL image or "
                "a tensor",
            ) from error
        name = "image" if isinstance(image, bytes) else f"image {str(image)[:200]}"
        try:
            if isinstance(source, str) and source.startswith(URLS):
                with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
                    source = io.BytesIO(response.read())
            with Image.open(source) as opened:
                target_size(
                    opened.width, opened.height, self.max_pixels
                )  # before any pixel is decoded
                return self._resize(_to_tensor(opened))
        except ImageError:
            raise
        except Exception as error:  # Pillow and urllib raise many types
            raise ImageError(
                "unreadable_image", f"{name} cannot be read: {error}; expected a whole image file"
            ) from error

    def process_images(self, images: Any, img_size: int | None = None) -> Tensor:
        """A PIL image, or a uint8 frame tensor (F, 3, H, W).

        :param img_size: at most img_size * img_size pixels instead of `max_pixels`.
        :return: (3, H, W) uint8, or (F, 3, H, W) uint8 for frames.
        """
        processor = self if img_size is None else CasaImageProcessor(img_size**2)
        if isinstance(images, Tensor) and images.ndim == 4:
            return processor._resize(images)
        return processor.load(images)

    def _resize(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> the same, resized."""
        height, width = pixels.shape[-2:]
        size = target_size(width, height, self.max_pixels)
        if size == (height, width):
            return pixels
        batch = pixels if pixels.ndim == 4 else pixels[None]
        out = F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)
        return out if pixels.ndim == 4 else out[0]


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 RGB; transparent pixels stand on white, an animation gives its first
    frame.
    """
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, rgba)
    elif image.mode.startswith("I;16") or image.mode == "I":
        # Pillow clips 16-bit grey to 255 on conversion; scale it instead.
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    array = np.array(image.convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()
