"""A corpus of unusual and of damaged image files, each with what must become of it."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

SIDE = 28
WHITE = (255, 255, 255)
RED, BLUE = (250, 20, 30), (10, 40, 240)


def encoded(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def plain(mode: str = "RGB", colour: Any = 0, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.new(mode, size, colour)


def noise(width: int = 60, height: int = 45) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def halves() -> Image.Image:
    """Two tokens wide, one high; red on the left and blue on the right."""
    image = Image.new("RGB", (2 * SIDE, SIDE), RED)
    image.paste(BLUE, (SIDE, 0, 2 * SIDE, SIDE))
    return image


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.full((SIDE, SIDE), value, np.uint16))


def palette(**options: Any) -> bytes:
    image = plain("P", 3)
    image.putpalette([value for i in range(256) for value in (i, 10 * i % 256, 255 - i)])
    return encoded(image, **options)


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand: black pixels if there are few, else none at all."""
    rows = bytes((1 + 3 * width) * height) if width * height <= SIDE**2 else b""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in body
    )


def zeros(megabytes: int) -> bytes:
    """Compressed."""
    return zlib.compress(bytes(megabytes * 1_000_000), 9)


def zero_tail(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes(len(data) - half)


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def thumbnailed(data: bytes) -> bytes:
    """A JPEG with another, whole one in its EXIF block, as cameras write it."""
    return with_block(data, 0xE1, b"Exif\0\0" + encoded(plain(), "JPEG"))


def with_block(data: bytes, marker: int, block: bytes) -> bytes:
    """A JPEG with one more application block."""
    head = bytes([0xFF, marker]) + struct.pack(">H", len(block) + 2)
    return data[:2] + head + block + data[2:]


ANIMATION = {"save_all": True, "append_images": [plain("RGB", BLUE), plain("RGB", WHITE)]}

# Files that can be used, with the colour that the upper left pixel must have.
USABLE: dict[str, tuple[Callable[[], bytes], tuple[int, int, int]]] = {
    "1-bit": (lambda: encoded(plain("1", 1)), WHITE),
    "grey": (lambda: encoded(plain("L", 77)), (77, 77, 77)),
    "16-bit grey PNG": (lambda: encoded(grey16(40000)), (156, 156, 156)),
    "16-bit grey TIFF": (lambda: encoded(grey16(40000), "TIFF"), (156, 156, 156)),
    "16-bit grey, transparent": (lambda: encoded(grey16(300), transparency=300), WHITE),
    "palette": (palette, (3, 30, 252)),
    "palette with a transparent colour": (lambda: palette(transparency=3), WHITE),
    "palette with alpha bytes": (lambda: palette(transparency=b"\xff\xff\xff\0"), WHITE),
    "PA": (lambda: encoded(plain("RGBA", (9, 9, 9, 0)).convert("PA"), "TIFF"), WHITE),
    "LA": (lambda: encoded(plain("LA", (90, 0))), WHITE),
    "RGBA": (lambda: encoded(plain("RGBA", (100, 0, 0, 51))), (224, 204, 204)),
    "RGB with a transparent colour": (lambda: encoded(plain(), transparency=(0, 0, 0)), WHITE),
    "CMYK JPEG": (lambda: encoded(plain("CMYK", (0, 255, 255, 0)), "JPEG"), (255, 0, 0)),
    "CMYK TIFF": (lambda: encoded(plain("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "animated GIF": (lambda: encoded(plain("RGB", RED), "GIF", **ANIMATION), RED),
    "animated PNG": (lambda: encoded(plain("RGB", RED), "PNG", **ANIMATION), RED),
    "animated WebP": (lambda: encoded(plain("RGB", RED), "WEBP", lossless=True, **ANIMATION), RED),
    "lossless WebP": (lambda: encoded(plain("RGB", RED), "WEBP", lossless=True), RED),
    "two-picture JPEG": (lambda: encoded(plain("RGB", WHITE), "MPO", **ANIMATION), WHITE),
    "broken ICC profile": (lambda: encoded(plain("RGB", RED), icc_profile=b"no profile"), RED),
    "ICC profile that is no zlib": (lambda: png(SIDE, SIDE, (b"iCCP", b"a\0\0broken")), (0, 0, 0)),
    "broken EXIF": (lambda: encoded(plain("RGB", WHITE), "JPEG", exif=b"Exif\0\0broken"), WHITE),
    "EXIF orientation 9": (lambda: encoded(plain("RGB", RED), exif=exif(9)), RED),
    "JPEG with a thumbnail": (lambda: thumbnailed(encoded(plain(colour=WHITE), "JPEG")), WHITE),
    "broken list of pictures": (  # Pillow warns
        lambda: with_block(encoded(plain("RGB", WHITE), "JPEG"), 0xE2, b"MPF\0broken"),
        WHITE,
    ),
    "bytes behind the end": (lambda: encoded(plain("RGB", WHITE), "JPEG") + bytes(50), WHITE),
}

# Files that cannot, with the reason and a word of the message.
REFUSED: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "zero bytes": (lambda: b"", "unreadable_image", "no bytes"),
    "text": (lambda: b"404: no such picture\n" * 9, "unreadable_image", "any of JPEG, PNG"),
    "random": (lambda: np.random.default_rng(1).bytes(999), "unreadable_image", "any of JPEG"),
    "EPS": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "unreadable_image",
        "any",
    ),
    "half a PNG": (lambda: half(encoded(noise())), "unreadable_image", "truncated"),
    "half a JPEG": (lambda: half(encoded(noise(), "JPEG")), "unreadable_image", "its end"),
    "half a progressive JPEG": (
        lambda: half(encoded(noise(), "JPEG", progressive=True)),
        "unreadable_image",
        "its end",
    ),
    "half a JPEG with a thumbnail": (
        lambda: half(thumbnailed(encoded(noise(300, 200), "JPEG"))),
        "unreadable_image",
        "its end",
    ),
    "half a GIF": (lambda: half(encoded(noise(), "GIF")), "unreadable_image", "truncated"),
    "half a WebP": (lambda: half(encoded(noise(), "WEBP")), "unreadable_image", "cannot be read"),
    "PNG ending in zeros": (lambda: zero_tail(encoded(noise())), "unreadable_image", "broken"),
    "JPEG ending in zeros": (
        lambda: zero_tail(encoded(noise(), "JPEG")),
        "unreadable_image",
        "its end",
    ),
    "1x10,000": (lambda: encoded(plain(size=(1, 10_000))), "extreme_aspect", "1x10000"),
    "no width": (lambda: png(0, 9), "unreadable_image", "cannot be read"),
    "claims 60,000x60,000": (lambda: png(60_000, 60_000), "too_many_pixels", "3600000000"),
    "claims 10,000x10,000": (lambda: png(10_000, 10_000), "too_many_pixels", "10000x10000"),
    "WebP, claims 16,383x16,383": (
        lambda: (
            b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0"
            + (16382).to_bytes(3, "little") * 2
            + b"ANIM"
        ),
        "too_many_pixels",
        "268402689",
    ),
    "zTXt bomb": (
        lambda: png(SIDE, SIDE, (b"zTXt", b"a\0\0" + zeros(200))),
        "unreadable_image",
        "too large",
    ),
    "iTXt bomb": (
        lambda: png(SIDE, SIDE, (b"iTXt", b"a\0\1\0\0\0" + zeros(200))),
        "unreadable_image",
        "too large",
    ),
    "a hundred zTXt of 1 MB": (
        lambda: png(SIDE, SIDE, *[(b"zTXt", b"%d\0\0" % i + zeros(1)) for i in range(100)]),
        "unreadable_image",
        "Too much memory used in text chunks",
    ),
    "ICC bomb": (
        lambda: png(SIDE, SIDE, (b"iCCP", b"a\0\0" + zeros(200))),
        "unreadable_image",
        "too large",
    ),
    "32-bit grey": (
        lambda: encoded(Image.fromarray(np.ones((SIDE, SIDE), np.int32)), "TIFF"),
        "unsupported_mode",
        "mode I,",
    ),
    "float grey": (
        lambda: encoded(Image.fromarray(np.ones((SIDE, SIDE), np.float32)), "TIFF"),
        "unsupported_mode",
        "mode F,",
    ),
}
