"""Small JPEGs for pages that load nothing: data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from PIL import Image

from casa_train.modeling.image_sources import FORMATS

SIDE = 112  # CSS pixels of a picture's longer side; twice as many are embedded for dense screens
QUALITIES = (75, 65, 55, 45, 35)  # tried in turn where there is little room, then fewer pixels


def thumbnail(image: Image.Image, side: int = SIDE) -> str:
    """A data URI of a picture, on white, never enlarged.

    :param side: CSS pixels of the longer side.
    :raises OSError, ValueError, SyntaxError, DecompressionBombError: its file cannot be read.
    """
    return uri(jpeg(image, 2 * side))


def jpeg(image: Image.Image, side: int) -> bytes:
    """A picture as JPEG, on white, never enlarged.

    :param side: pixels of the longer side.
    :raises OSError, ValueError, SyntaxError, DecompressionBombError: its file cannot be read.
    """
    image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
    layered = image.convert("RGBA")
    layered.thumbnail((side, side))
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered)
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=85, subsampling=0)  # sharp edges: drawings, text are common
    return file.getvalue()


def uri(data: bytes) -> str:
    """A JPEG as a data URI."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def fitted(jpegs: Sequence[bytes], room: int) -> list[bytes]:
    """JPEGs that take so many bytes together at most: those over a common limit get coarser.

    :param room: bytes of all; each may take 1 KiB in any case.
    """
    left, limit = room, room
    for number, size in enumerate(sorted(map(len, jpegs))):
        limit = left // (len(jpegs) - number)
        if size > limit:
            break
        left -= size  # what small ones leave, large ones get
    return [data if len(data) <= limit else coarser(data, limit) for data in jpegs]


def coarser(data: bytes, room: int) -> bytes:
    """A JPEG in fewer bytes, by its quality first and then by its size.

    :param room: bytes that it may take; 1 KiB it may take in any case.
    """
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        image.load()
        while True:
            for quality in QUALITIES:
                file = io.BytesIO()
                image.save(file, "JPEG", quality=quality, optimize=True)
                if file.tell() <= max(room, 1024):
                    return file.getvalue()
            image = image.resize([max(1, round(0.8 * side)) for side in image.size])


def of_file(data: bytes, side: int = SIDE) -> tuple[str, str] | None:
    """A thumbnail of an image file, and its kind, size and mode; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            about = f"{image.format} {image.width}×{image.height} {image.mode}"
            return thumbnail(image, side), about
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
