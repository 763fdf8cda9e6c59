"""Whatever names or holds an image -> an opened picture, or its pixels as uint8 (..., 3, H, W).

Taken are paths, `file:`, http(s) and data URLs, base64 without a prefix and in either alphabet,
bytes of an image file or of base64,
`{"bytes": ..., "path": ...}` as `datasets` hands out undecoded images, PIL images, and numpy arrays
and tensors. Arrays follow transformers' rules: the channels, 1 or 3 of them, stand first or last
(first, where both would do), and floats from 0 to 1 are scaled. An array may also be grey (H, W) or
have 4 channels, whose alpha counts.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
import re
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

URLS = ("http://", "https://", "data:", "file:")
TIMEOUT = 30  # seconds for an image of a URL
SOURCES = (
    "a path, a URL (http, https, file, data), base64, bytes of an image file, {'bytes': ...}, a "
    "PIL image, or a numpy array or tensor of pixels"
)

# Pillow's other readers include some that start programs (EPS) or that no training data needs.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]
if "avif" in features.modules and features.check("avif"):  # from Pillow 11.3 on, if built with it
    FORMATS.append("AVIF")
END_OF_JPEG = b"\xff\xd9"
BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
URL_SAFE = str.maketrans("-_", "+/")  # base64's other alphabet
LONGEST_NAME = 255  # of a file, in any usual file system


class ImageError(ValueError):
    """An image that cannot be used; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Bounded:
    """An image with bounds of its own on its pixels; None: the processor's."""

    image: Any
    max_pixels: int | None = None
    min_pixels: int | None = None


def name_of(source: Any) -> str:
    """What messages call an image: by its path or URL, where it has one."""
    if isinstance(source, Bounded):
        source = source.image
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    if not isinstance(source, str | os.PathLike) or source == "":
        return "image"
    text = str(source)
    pixels = len(text) > 100 and (_is_base64(text) or _is_no_path(text))
    # Of pixels a few characters suffice.
    return f"image {_cut(text, 40 if pixels or text.startswith('data:') else 200)}"


@contextlib.contextmanager
def named(name: str) -> Iterator[None]:
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
            "unreadable_image",
            f"{name} cannot be read: {_cut(str(error), 160)}; expected a whole image file",
        ) from error


def open_image(source: Any) -> Image.Image | Tensor:
    """A picture of which the header alone has been read, or pixels as `pixels_of` gives them.

    :raises ImageError: a source of another kind.
    """
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, Tensor | np.ndarray):
        return pixels_of(source)
    if isinstance(source, Mapping):
        data, path = source.get("bytes"), source.get("path")
        if data is None and path is None:
            raise _unknown(f"a mapping of {sorted(map(str, source))}, neither 'bytes' nor 'path'")
        source = path if data is None else data
    return open_file(source)


def open_file(source: Any) -> Image.Image:
    """Reads the header of a file, given as bytes, path, URL or base64.

    :raises ImageError: a source of another kind, no bytes, or a JPEG without its end.
    """
    if source == "":
        raise _unknown("an empty string")
    if isinstance(source, str) and source[:8].lower().startswith(URLS):
        head, comma, coded = source.partition(",")
        if head[:5].lower() == "data:" and head.endswith(";base64"):
            source = head + comma + _standard(urllib.parse.unquote(coded))
        with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
            source = response.read()
    elif isinstance(source, str) and not os.path.exists(source) and _is_base64(source):
        source = _from_base64(source)
    elif isinstance(source, str) and _is_no_path(source):
        raise _unknown(f"a string of {len(source):,} characters, which names no file")
    elif isinstance(source, str | os.PathLike):
        source = Path(source).read_bytes()
    elif isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if not isinstance(source, bytes):
        raise _unknown(f"of type {type(source).__name__}")
    if not source:
        raise ImageError("unreadable_image", "the file holds no bytes")
    file = io.BytesIO(source)
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        if not source.isascii() or not _is_base64(text := source.decode()):
            raise
        with contextlib.suppress(ImageError):
            source = _from_base64(text)
        file = io.BytesIO(source)
        image = Image.open(file, formats=FORMATS)
    # Pillow now stands where the pixels start. Lost bytes that came back as zeros, as after a
    # broken download, still decode: into grey. Only the missing end tells.
    if image.format == "JPEG" and source.find(END_OF_JPEG, file.tell()) < 0:
        raise ImageError("unreadable_image", "a JPEG without its end; expected a whole image file")
    return image


def pixels_of(array: np.ndarray | Tensor) -> Image.Image | Tensor:
    """Pixels as uint8 (..., 3, H, W); a picture, where they have alpha.

    :param array: grey (H, W), or 1, 3 or 4 channels first or last; levels 0..255 of any type, or
        floats 0..1. Four axes are frames, with 1 or 3 channels.
    :raises ImageError: another shape, or other values.
    """
    found = f"a {type(array).__name__} {tuple(array.shape)} of {array.dtype}"
    if isinstance(array, Tensor):
        pixels = array.detach()
    else:
        if array.dtype.kind not in "uif":
            raise _unknown(f"{found}, which holds no levels")
        # A copy of plain strides: torch takes no others, and the caller's array stays his own.
        pixels = torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))
    if pixels.ndim == 2:
        pixels = pixels[None]
    channels = pixels.shape[-3:]
    if pixels.ndim not in (3, 4):
        raise _unknown(f"{found}; pixels have the axes (H, W), (H, W, 3) or (3, H, W)")
    first = channels[0] in (1, 3) or (channels[0] == 4 and channels[2] not in (1, 3, 4))
    if not first and channels[2] not in (1, 3, 4):
        raise _unknown(f"{found}; its channels, 1, 3 or 4, stand neither first nor last")
    if not first:
        pixels = pixels.movedim(-1, -3)
    pixels = _levels(pixels, found)
    if pixels.shape[-3] == 4:
        if pixels.ndim == 4:
            raise _unknown(f"{found}; frames have 1 or 3 channels")
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().contiguous().numpy())
    return pixels if pixels.shape[-3] == 3 else pixels.expand(*pixels.shape[:-3], 3, -1, -1)


def _levels(pixels: Tensor, found: str) -> Tensor:
    """Values as uint8 levels.

    :raises ImageError: values that are none, such as a normalised image's.
    """
    if pixels.dtype == torch.uint8 or not pixels.numel():
        return pixels.to(torch.uint8)
    if pixels.dtype == torch.bool or pixels.is_complex():
        raise _unknown(f"{found}, which holds no levels")
    # Not every type has its extremes on every device.
    pixels = pixels.float() if pixels.is_floating_point() else pixels.long()
    low, high = float(pixels.min()), float(pixels.max())
    if not (0 <= low and high <= 255):  # NaN is neither
        raise _unknown(
            f"{found} with values from {low:g} to {high:g}; levels are 0..255, floats may be 0..1 "
            "(an image that was normalised must be turned back)"
        )
    if pixels.is_floating_point() and high <= 1:
        pixels = pixels * 255
    return (pixels.round() if pixels.is_floating_point() else pixels).to(torch.uint8)


def _unknown(found: str) -> ImageError:
    return ImageError("unreadable_image", f"found is {found}; expected {SOURCES}")


def _is_base64(text: str) -> bool:
    return BASE64.fullmatch(text) is not None


def _is_no_path(text: str) -> bool:
    return any(len(name) > LONGEST_NAME for name in text.split("/"))


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _standard(coded: str) -> str:
    """Base64 of either alphabet in the usual one, with its padding."""
    coded = "".join(coded.split()).translate(URL_SAFE)
    return coded + "=" * (-len(coded) % 4)


def _from_base64(text: str) -> bytes:
    """:raises ImageError: neither a path nor base64 of an image."""
    try:
        data = base64.b64decode(_standard(text), validate=True)
    except binascii.Error:
        data = b""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS).close()
    except Exception as error:  # a word may be base64 as well
        raise ImageError(
            "unreadable_image", "there is no such file, nor is it base64 of an image"
        ) from error
    return data
