"""Small JPEGs for pages that load nothing: data URIs."""

from __future__ import annotations

import base64
import io

from PIL import Image

from casa_train.modeling.image_sources import FORMATS

SIDE = 112  # CSS pixels of a picture's longer side; twice as many are embedded for dense screens


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """A data URI of a picture, on white, never enlarged.

    :param side: CSS pixels of the longer side.
    :raises OSError, ValueError, SyntaxError, DecompressionBombError: its file cannot be read.
    """
    image.draft("RGB", (2 * side, 2 * side))  # a large JPEG is decoded at a fraction of its size
    layered = image.convert("RGBA")
    layered.thumbnail((2 * side, 2 * side))
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered)
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=85, subsampling=0)  # sharp edges: drawings, text are common
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def of_file(data: bytes, side: int = SIDE) -> tuple[str, str] | None:
    """A thumbnail of an image file, and its kind, size and mode; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            about = f"{image.format} {image.width}×{image.height} {image.mode}"
            return thumbnail(image, side), about
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
