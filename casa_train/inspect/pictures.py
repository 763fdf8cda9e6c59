"""Small JPEGs for pages that load nothing: data URIs."""

from __future__ import annotations

import base64
import io
import math

from PIL import Image
from torch import Tensor

from casa_train.modeling.image_sources import FORMATS

SIDE = 112  # CSS pixels of a picture's longer side; twice as many are embedded for dense screens
FULL_SIZE = 160  # with more pictures on a page each gets smaller, so that the page does not grow


def side_for(pictures: int) -> int:
    """CSS pixels of the longer side where a page holds so many pictures."""
    return SIDE if pictures <= FULL_SIZE else max(24, round(SIDE * math.sqrt(FULL_SIZE / pictures)))


def of_pixels(pixels: Tensor, side: int = SIDE) -> str:
    """A data URI of what the model reads.

    :param pixels: (3, H, W) uint8.
    """
    return _jpeg(Image.fromarray(pixels.permute(1, 2, 0).numpy()), side)


def of_file(data: bytes, side: int = SIDE) -> tuple[str, str] | None:
    """A data URI of an image file, on white, and its kind and size; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            about = f"{image.format} {image.width}×{image.height} {image.mode}"
            image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction
            layered = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered)
    return _jpeg(flat, side), about


def _jpeg(image: Image.Image, side: int) -> str:
    image.thumbnail((2 * side, 2 * side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, subsampling=0)  # sharp edges: drawings, text are common
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
