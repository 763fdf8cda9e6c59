"""Images: header checks, decoding, resizing to multiples of 28; out come uint8 (3, H, W) tensors.

Training and every export run this file, so an image reaches the model with the same bits. Sizes
follow Qwen2.5-VL: aspect kept, both sides multiples of 28, at most `max_pixels`. The model
normalises.

What becomes of unusual files: transparent pixels stand on white, an animation gives its first
frame, 16-bit grey is scaled to 8 bits, and EXIF orientation is applied, as `datasets` and
transformers' `load_image` do. Whatever cannot be used is an `ImageError` with a reason. The header
is judged before a pixel is decoded.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SIDE = 28  # pixels of an image token's side: patch 14, 2x2 merge
MAX_PIXELS = 952 * 952
MAX_ASPECT = 200
URLS = ("http://", "https://", "data:")
TIMEOUT = 30  # seconds for an image of a URL
MAX_SOURCE_PIXELS = 89_478_485  # of an image as it is stored; from here on Pillow warns of bombs

# Pillow's other readers include some that start programs (EPS) or that no training data needs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM")
END_OF_JPEG = b"\xff\xd9"
ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa")
MODES = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", *ALPHA_MODES)

_ORIENTATION = 0x0112  # the EXIF tag, and what turns each of its values upright
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def target_size(width: int, height: int, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(H, W) that an image of this size is resized to; H * W / 784 image tokens.

    :raises ImageError: an empty image, an aspect ratio over 200, or over `MAX_SOURCE_PIXELS`.
    """
    if width < 1 or height < 1:
        raise ImageError("empty_image", f"image of {width}x{height} pixels is empty")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(
            "extreme_aspect", f"image of {width}x{height} pixels: aspect ratio over {MAX_ASPECT}"
        )
    if width * height > MAX_SOURCE_PIXELS:
        raise ImageError(
            "too_many_pixels",
            f"image of {width}x{height} pixels: over the limit of {MAX_SOURCE_PIXELS:,} pixels",
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


def read_header(data: bytes, name: str = "image") -> tuple[str, int, int]:
    """(Pillow's name of the format, width, height) of an image file, without decoding its pixels.

    Width and height are those of the upright image: what `load` resizes.

    :raises ImageError: whatever the header tells cannot be used.
    """
    with _named(name), _open(data) as image:
        return str(image.format), *_checked(image)[:2]


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

    def load(self, image: Any, name: str | None = None) -> Tensor:
        """One image, resized.

        :param image: path, http(s) or data URL, bytes of an image file, PIL image, or a uint8
            (3, H, W) tensor.
        :param name: what messages call it; the path or URL, where there is one.
        :return: (3, H, W) uint8.
        :raises ImageError: an image that cannot be used.
        """
        if name is None:
            known = isinstance(image, str | os.PathLike)
            name = f"image {str(image)[:200]}" if known else "image"
        with _named(name):
            if isinstance(image, Tensor):
                pixels = _checked_tensor(image)
            elif isinstance(image, Image.Image):
                pixels = _to_tensor(image)
            else:
                with _open(image) as opened:
                    pixels = _to_tensor(opened)
            return self._resize(pixels)

    def process_images(self, images: Any, img_size: int | None = None) -> Tensor:
        """A PIL image, or a uint8 frame tensor (F, 3, H, W).

        :param img_size: at most img_size * img_size pixels instead of `max_pixels`.
        :return: (3, H, W) uint8, or (F, 3, H, W) uint8 for frames.
        """
        processor = self if img_size is None else CasaImageProcessor(img_size**2)
        if isinstance(images, Tensor) and images.ndim == 4:
            return processor._resize(_checked_tensor(images))
        return processor.load(images)

    def _resize(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> the same, resized."""
        height, width = pixels.shape[-2:]
        size = target_size(width, height, self.max_pixels)
        if size == (height, width):
            return pixels.contiguous()
        batch = pixels if pixels.ndim == 4 else pixels[None]
        out = F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)
        return (out if pixels.ndim == 4 else out[0]).contiguous()


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Turns whatever an image raises into an ImageError that names it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(error.reason, f"{name}: {error}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError("too_many_pixels", f"{name}: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(
            "unreadable_image", f"{name} cannot be read as any of {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # Pillow and urllib raise many types
        raise ImageError(
            "unreadable_image", f"{name} cannot be read: {error}; expected a whole image file"
        ) from error


def _open(source: Any) -> Image.Image:
    """Reads the header of a file, given as bytes, path or URL."""
    if isinstance(source, str) and source.startswith(URLS):
        with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
            source = response.read()
    elif isinstance(source, str | os.PathLike):
        source = Path(source).read_bytes()
    if not isinstance(source, bytes):
        raise ImageError(
            "unreadable_image",
            f"found is a {type(source).__name__}; expected a path, a URL, bytes, a PIL image or a "
            "tensor",
        )
    if not source:
        raise ImageError("unreadable_image", "the file holds no bytes")
    file = io.BytesIO(source)
    image = Image.open(file, formats=FORMATS)
    # Pillow now stands where the pixels start. Lost bytes that came back as zeros, as after a
    # broken download, still decode: into grey. Only the missing end tells.
    if image.format == "JPEG" and source.find(END_OF_JPEG, file.tell()) < 0:
        raise ImageError("unreadable_image", "a JPEG without its end; expected a whole image file")
    return image


def _checked(image: Image.Image) -> tuple[int, int, int]:
    """(width, height, orientation) of an image whose header is fit for use; the size is upright."""
    if image.mode not in MODES and not _is_deep(image):
        raise ImageError(
            "unsupported_mode",
            f"pixels of mode {image.mode}, whose white is not defined; expected 8-bit colour or "
            "grey, or 16-bit grey",
        )
    orientation = _orientation(image)
    width, height = image.size
    if orientation in _SIDEWAYS:
        width, height = height, width
    target_size(width, height)
    return width, height, orientation


def _checked_tensor(pixels: Tensor) -> Tensor:
    if pixels.dtype != torch.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-3] != 3:
        raise ImageError(
            "unreadable_image",
            f"found is a tensor {tuple(pixels.shape)} of {pixels.dtype}; expected uint8 "
            "(3, H, W), or (F, 3, H, W) for frames",
        )
    return pixels


def _is_deep(image: Image.Image) -> bool:
    """16-bit grey. Some versions of Pillow read such a PNG in mode I, which is 32-bit elsewhere."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF block is damaged."""
    # Pillow itself turns TIFF upright. It would decode a whole PNG to look for EXIF behind the
    # pixels.
    if image.format == "TIFF" or (image.format == "PNG" and "exif" not in image.info):
        return 1
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # as many types as damaged headers; the pixels may be whole
        return 1
    return orientation if orientation in _TURNS else 1


def _to_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8 RGB, upright, a view of (H, W, 3)."""
    *_, orientation = _checked(image)
    image.load()
    if _is_deep(image):
        image = _eight_bits(image)
    elif image.mode in ALPHA_MODES or "transparency" in image.info:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", rgba.size, "white")
        image.paste(rgba, mask=rgba)
    if image.mode != "RGB":  # convert would copy an RGB image
        image = image.convert("RGB")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    # Not made contiguous: the resize is faster on interleaved channels, with the same bits.
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; Pillow would clip every value above 255."""
    values = np.asarray(image)
    grey = (values.astype(np.uint32) >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
