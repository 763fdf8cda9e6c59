"""Subtitles drawn over a picture: white letters with a black edge, at the bottom, wrapped."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from casa_train.errors import UserError

LINES = 18  # of text that a picture is high
SMALLEST = 9  # pixels of a letter that can still be read
MARGIN = 0.04  # of the picture's sides, left free
MOST = 0.6  # of the picture's height that text may cover


@dataclass(frozen=True)
class Overlay:
    """Text as it lies over rows of a picture.

    :param top: the first row that it covers, an even one.
    :param alpha: (rows, width) float32 of 0 to 1, how much of the picture it hides.
    :param light: (rows, width) float32 of 0 (black) to 1 (white).
    """

    top: int
    alpha: Any
    light: Any


def load_font(font: Path | None, size: int) -> Any:
    """:param font: a TrueType file; None: DejaVu Sans, which comes with matplotlib.

    Pillow's own has no more than English letters.

    :raises UserError: the file is no font.
    """
    matplotlib = importlib.util.find_spec("matplotlib")
    if font is None and matplotlib and matplotlib.origin:
        found = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        font = found if found.is_file() else None
    try:
        return ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    except OSError as error:
        raise UserError(
            f"{font}: cannot be read as a font ({error}); expected a TrueType or OpenType file"
        ) from error


def draw_text(text: str, width: int, height: int, font: Path | None = None) -> Overlay:
    """Text over a picture of `width` x `height`; what is too long for it loses its beginning."""
    room = max(1, round(width * (1 - 2 * MARGIN)))
    size = max(SMALLEST, min(height // LINES, width // 12))
    letters = load_font(font, size)
    edge = max(1, size // 12)
    lines = wrapped(text, letters, room - 2 * edge)
    step = sum(letters.getmetrics()) + edge
    most = max(1, int(height * MOST) // step)
    lines = lines[-most:]
    bottom = height - max(edge, round(height * MARGIN))
    top = max(0, bottom - step * len(lines) - edge) // 2 * 2  # colours stand for two rows each
    area = (width, height - top)
    # The edge is drawn with the letters: first where either is, then where the letters are.
    both, inner = Image.new("L", area), Image.new("L", area)
    for number, line in enumerate(lines):
        place = (width / 2, bottom - top - step * (len(lines) - number - 1))
        pens = ImageDraw.Draw(both), ImageDraw.Draw(inner)
        pens[0].text(place, line, 255, letters, anchor="md", stroke_width=edge)
        pens[1].text(place, line, 255, letters, anchor="md")
    alpha = np.asarray(both, np.float32) / 255
    return Overlay(top, alpha, np.asarray(inner, np.float32) / 255)


def wrapped(text: str, font: Any, room: float) -> list[str]:
    """Lines of at most `room` pixels, broken between words, or inside one that is longer."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            for piece in _pieces(word, font, room):
                longer = f"{line} {piece}" if line else piece
                if line and font.getlength(longer) > room:
                    lines.append(line)
                    longer = piece
                line = longer
        lines += [line] if line else []
    return lines


def _pieces(word: str, font: Any, room: float) -> Sequence[str]:
    if font.getlength(word) <= room:
        return [word]
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > room:
            pieces.append("")
        pieces[-1] += letter
    return pieces
