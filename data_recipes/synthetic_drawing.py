"""Drawing for the synthetic recipe: shapes in the cells of a grid, printed text, bar charts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont

T = TypeVar("T")
Rgb = tuple[int, int, int]

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (240, 215, 30),
    "green": (40, 155, 60),
    "blue": (40, 75, 220),
    "purple": (130, 45, 165),
}
KINDS = {  # kind of shape -> its plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "cross": "crosses",
}
MAX_LEVEL = 5  # of a bar

# A tiny vision tower learns shapes soonest where one fits what an image token sees: 28 x 28 pixels.
GRIDS = ((2, 2), (3, 2), (2, 3), (3, 3), (4, 2), (2, 4))
CELL_SIDE = (27.0, 33.0)
LONGEST_SIDE, LARGEST_ASPECT = 168, 2.0  # of pictures without a grid


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def shuffled(rng: np.random.Generator, options: Iterable[T]) -> list[T]:
    items = list(options)
    return [items[i] for i in rng.permutation(len(items))]


def random_size(rng: np.random.Generator, shortest: int) -> tuple[int, int]:
    """Width and height: independent of what will be drawn, so that they give nothing away."""
    aspect = LARGEST_ASPECT ** rng.random()
    short = rng.uniform(shortest, LONGEST_SIDE / aspect)
    sides = round(short), min(round(short * aspect), LONGEST_SIDE)
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def random_background(rng: np.random.Generator) -> Rgb:
    level = rng.integers(222, 242)
    red, green, blue = (level + rng.integers(-7, 8, 3)).tolist()
    return red, green, blue


def paint(rng: np.random.Generator, colour: str) -> Rgb:
    """The named colour, a little off."""
    red, green, blue = np.clip(COLOURS[colour] + rng.integers(-10, 11, 3), 0, 255).tolist()
    return red, green, blue


POLYGONS = {  # corners in the unit square
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)],
    "cross": [(0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)]
    + [(0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)],
}


@dataclass(frozen=True)
class Region:
    """A rectangle, in pixels or in parts of a picture."""

    left: float
    top: float
    width: float
    height: float

    def split(self, columns: int, rows: int) -> list[Region]:
        """Equal parts, row by row."""
        width, height = self.width / columns, self.height / rows
        return [
            Region(self.left + column * width, self.top + row * height, width, height)
            for row in range(rows)
            for column in range(columns)
        ]

    def halves(self) -> list[Region]:
        """Two equal parts, as nearly square as can be."""
        return self.split(2, 1) if self.width > self.height else self.split(1, 2)


def random_grid(rng: np.random.Generator, cells: int) -> tuple[int, int]:
    """Columns and rows of a grid with at least so many cells."""
    return pick(rng, [grid for grid in GRIDS if grid[0] * grid[1] >= cells])


class Canvas:
    """A picture under construction, drawn at twice its size: shapes get smooth edges cheaply."""

    SCALE = 2

    @classmethod
    def with_grid(cls, rng: np.random.Generator, columns: int, rows: int) -> Canvas:
        """A picture of columns x rows cells, each about as large as one image token sees."""
        cell = rng.uniform(*CELL_SIDE)
        stretch = rng.uniform(0.94, 1.06)
        return cls(rng, round(columns * cell * stretch), round(rows * cell / stretch))

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.region = Region(0, 0, width, height)
        size = (width * self.SCALE, height * self.SCALE)
        self._image = Image.new("RGB", size, random_background(rng))
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, kind: str, colour: str, cell: Region) -> None:
        """One shape, of random size and place within its cell; neighbours never touch."""
        room = min(cell.width, cell.height)
        side, gap = room * self.rng.uniform(0.72, 0.9), room * 0.07
        left = cell.left + gap / 2 + self.rng.random() * (cell.width - side - gap)
        top = cell.top + gap / 2 + self.rng.random() * (cell.height - side - gap)
        side, left, top = side * self.SCALE, left * self.SCALE, top * self.SCALE
        fill, box = paint(self.rng, colour), (left, top, left + side, top + side)
        if kind == "circle":
            self._draw.ellipse(box, fill=fill)
        else:
            corners = [(left + x * side, top + y * side) for x, y in POLYGONS[kind]]
            self._draw.polygon(corners, fill=fill)

    def finish(self) -> Image.Image:
        return self._image.reduce(self.SCALE)


STROKE = 32  # printed text is emboldened by a stroke of 1 / STROKE of its size


@cache
def _font(pixels: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=pixels)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def random_ink(rng: np.random.Generator, background: Rgb) -> Rgb:
    """A colour for thin strokes, which need more contrast than shapes."""

    def luminance(colour: Rgb) -> float:
        return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]

    base = luminance(background)
    strong = [name for name, rgb in COLOURS.items() if base - luminance(rgb) > 70]
    return paint(rng, pick(rng, strong))


def print_text(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, text: str, ink: Rgb, cell: Region
) -> None:
    """Prints `text` at 72 to 92 % of the size that fits into the cell."""

    def box(pixels: int) -> tuple[float, float, float, float]:
        return _font(pixels).getbbox(text, stroke_width=pixels // STROKE)

    left, top, right, bottom = box(100)
    fit = min(cell.width / (right - left), cell.height / (bottom - top))
    pixels = max(8, int(100 * fit * rng.uniform(0.72, 0.92)))
    left, top, right, bottom = box(pixels)
    x = cell.left + rng.random() * max(0.0, cell.width - (right - left)) - left
    y = cell.top + rng.random() * max(0.0, cell.height - (bottom - top)) - top
    at, stroke = (round(x), round(y)), pixels // STROKE
    draw.text(at, text, fill=ink, font=_font(pixels), stroke_width=stroke)


def print_capital(
    rng: np.random.Generator, draw: ImageDraw.ImageDraw, letter: str, cell: Region
) -> None:
    """Prints a dark capital in the middle of a cell, 10 pixels high in one of 14."""
    font = _font(round(1.1 * cell.height))
    level = int(rng.integers(0, 60))
    middle = cell.left + cell.width / 2, cell.top + cell.height / 2
    left, top, right, bottom = font.getbbox(letter)
    at = round(middle[0] - (left + right) / 2), round(middle[1] - (top + bottom) / 2)
    draw.text(at, letter, fill=(level, level, level), font=font)


def random_levels(rng: np.random.Generator, bars: int, distinct: bool = False) -> list[int]:
    """Heights of bars, each uniform."""
    levels = range(1, MAX_LEVEL + 1)
    return shuffled(rng, levels)[:bars] if distinct else [pick(rng, levels) for _ in range(bars)]


def draw_bars(
    rng: np.random.Generator,
    colours: Sequence[str],
    levels: Sequence[int],
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """A bar chart with ticks 1 to 5 and a line at each.

    :param size: width and height; None: random.
    """
    width, height = random_size(rng, shortest=84) if size is None else size
    background = random_background(rng)
    ink = (40, 40, 40)
    faint = tuple((3 * b + i) // 4 for b, i in zip(background, ink, strict=True))
    image = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(image)
    font = _font(max(11, height // 9))
    left, bottom = 4 + round(font.getlength("5")), height - 4
    step = (bottom - font.size * 0.6) / MAX_LEVEL
    for level in range(1, MAX_LEVEL + 1):
        y = round(bottom - level * step)
        draw.line((left, y, width, y), fill=faint)
        draw.text((1, y), str(level), fill=ink, font=font, anchor="lm")
    cell = (width - left - 2) / len(colours)
    bar = cell * rng.uniform(0.55, 0.8)
    for i, (colour, level) in enumerate(zip(colours, levels, strict=True)):
        x = left + 1 + i * cell + (cell - bar) / 2
        box = (round(x), round(bottom - level * step), round(x + bar), bottom)
        draw.rectangle(box, fill=paint(rng, colour))
    draw.line((left, 0, left, bottom), fill=ink)
    draw.line((left, bottom, width, bottom), fill=ink)
    return image
