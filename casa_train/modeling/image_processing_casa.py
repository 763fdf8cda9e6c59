"""Images: header checks, decoding, resizing to whole tokens; out come uint8 (3, H, W) tensors.

Training and every export run this file, so an image reaches the model with the same bits. Sizes
follow Qwen2.5-VL's rule: aspect kept, both sides multiples of a token's, at most `max_pixels` and,
where it is set, at least `min_pixels`. A token's side is the vision tower's own: 28 pixels for
Qwen2.5-VL's, 32 for SigLIP2's. The model normalises.

What becomes of unusual files: transparent pixels stand on white, an animation gives its first
frame, 16-bit grey is scaled to 8 bits, and EXIF orientation is applied, as `datasets` and
transformers' `load_image` do. Whatever cannot be used is an `ImageError` with a reason. The header
is judged before a pixel is decoded.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .image_sources import Bounded, ImageError, name_of, named, open_file, open_image

SIDE = 28  # pixels of an image token's side where nothing says: Qwen2.5-VL's tower
MAX_PIXELS = 952 * 952
MAX_ASPECT = 200
MAX_SOURCE_PIXELS = 89_478_485  # of an image as it is stored; from here on Pillow warns of bombs

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


def target_size(
    width: int,
    height: int,
    max_pixels: int = MAX_PIXELS,
    min_pixels: int = 0,
    side: int = SIDE,
) -> tuple[int, int]:
    """(H, W) that an image of this size is resized to; H * W / side**2 image tokens.

    The rule of Qwen2.5-VL's image processor, which has no upper bound for very long images.

    :param max_pixels: upper bound on H * W, whatever `min_pixels` is.
    :param min_pixels: smaller images are enlarged to so many pixels at least; 0 enlarges none, but
        to the side of a token.
    :param side: pixels of a token's side.
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
    rows, columns = round(height / side), round(width / side)
    if rows * columns * side**2 < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * enlarge / side)
        columns = math.ceil(width * enlarge / side)
    rows, columns = max(1, rows), max(1, columns)
    budget = max_pixels // side**2
    if rows * columns > budget:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(1, math.floor(height / shrink / side))
        columns = max(1, math.floor(width / shrink / side))
        # A very long image keeps one row (or column); only then can the other side be too long.
        rows, columns = min(rows, budget), min(columns, budget)
    return rows * side, columns * side


def read_header(data: bytes, name: str = "image") -> tuple[str, int, int]:
    """(Pillow's name of the format, width, height) of an image file, without decoding its pixels.

    Width and height are those of the upright image: what `load` resizes.

    :raises ImageError: whatever the header tells cannot be used.
    """
    with named(name), open_file(data) as image:
        return str(image.format), *_checked(image)[:2]


class CasaImageProcessor:
    """Turns whatever `image_sources` takes into resized uint8 tensors.

    :param max_pixels: upper bound on H * W; 952 * 952 in the paper.
    :param min_pixels: lower bound, to which smaller images are enlarged; 0: none.
    :param side: pixels of an image token's side, the vision tower's.
    :raises ValueError: bounds that no image can meet.
    """

    def __init__(self, max_pixels: int = MAX_PIXELS, min_pixels: int = 0, side: int = SIDE) -> None:
        self.side = side
        self.max_pixels = _whole("max_pixels", max_pixels)
        self.min_pixels = _whole("min_pixels", min_pixels)
        if self.max_pixels < side**2:
            raise ValueError(
                f"max_pixels is {max_pixels}; one image token needs {side**2} pixels "
                f"({side}x{side})"
            )
        if not 0 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                f"min_pixels is {min_pixels}; expected 0 (enlarge nothing) to max_pixels, "
                f"{max_pixels}"
            )

    def at_most(self, max_pixels: int) -> CasaImageProcessor:
        """The same with another upper bound, which goes before the lower one."""
        max_pixels = _whole("max_pixels", max_pixels)
        if max_pixels == self.max_pixels:
            return self
        return CasaImageProcessor(max_pixels, min(self.min_pixels, max_pixels), self.side)

    def within(self, max_pixels: int | None, min_pixels: int | None) -> CasaImageProcessor:
        """The same with other bounds; None: this one's.

        :raises ValueError: bounds that no image can meet.
        """
        if min_pixels is None:
            return self if max_pixels is None else self.at_most(max_pixels)
        most = self.max_pixels if max_pixels is None else max_pixels
        return CasaImageProcessor(most, min_pixels, self.side)

    def token_count(self, width: int, height: int) -> int:
        """Image tokens of an image of this size."""
        h, w = target_size(width, height, self.max_pixels, self.min_pixels, self.side)
        return h * w // self.side**2

    def load(self, image: Any, name: str | None = None) -> Tensor:
        """One image, resized.

        :param image: a path, a URL (http, https, file, data), base64, bytes of an image file,
            `{"bytes": ...}`, a PIL image, or an array or tensor of pixels; see `image_sources`. As
            `Bounded`, within its own bounds.
        :param name: what messages call it; the path or URL, where there is one.
        :return: (3, H, W) uint8.
        :raises ImageError: an image that cannot be used.
        :raises ValueError: bounds that no image can meet.
        """
        name = name_of(image) if name is None else name
        if isinstance(image, Bounded):
            try:
                processor = self.within(image.max_pixels, image.min_pixels)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            return processor.load(image.image, name)
        with named(name):
            opened = open_image(image)
            pixels = opened if isinstance(opened, Tensor) else _to_tensor(opened)
            if pixels.ndim != 3:
                raise ImageError(
                    "unreadable_image", f"found are {len(pixels)} frames; expected one image"
                )
            return self._resize(pixels)

    def process_images(self, images: Any, img_size: int | None = None) -> Tensor:
        """One image as `load` takes it, or frames: (F, 3, H, W), or (F, H, W, 3).

        :param img_size: at most img_size * img_size pixels instead of `max_pixels`.
        :return: (3, H, W) uint8, or (F, 3, H, W) uint8 for frames.
        """
        processor = (
            self if img_size is None else self.at_most(square(img_size, "img_size", self.side))
        )
        if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
            with named("frames"):
                frames = open_image(images)
                assert isinstance(frames, Tensor)  # pictures have three axes
                return processor._resize(frames)
        return processor.load(images)

    def _resize(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) uint8 -> the same, resized."""
        height, width = pixels.shape[-2:]
        size = target_size(width, height, self.max_pixels, self.min_pixels, self.side)
        if size == (height, width):
            return pixels.contiguous()
        batch = pixels if pixels.ndim == 4 else pixels[None]
        out = F.interpolate(batch, size=size, mode="bicubic", antialias=True, align_corners=False)
        return (out if pixels.ndim == 4 else out[0]).contiguous()


def square(pixels: int, name: str, side: int = SIDE) -> int:
    """Pixels of a square image.

    :param pixels: of its side; :param name: what that is called.
    :param side: of an image token.
    :raises ValueError: no number, or less than a token's.
    """
    if _whole(name, pixels) < side:
        raise ValueError(f"{name} is {pixels}; one image token is {side}x{side} pixels")
    return int(pixels) ** 2


def _whole(name: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name} is {value!r}; expected a whole number of pixels") from None


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


def _is_deep(image: Image.Image) -> bool:
    """16-bit grey. Pillow may read such a PNG or PGM in mode I, which is 32-bit elsewhere."""
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


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


__all__ = ["CasaImageProcessor", "ImageError", "read_header", "square", "target_size"]
