"""Synthetic question answering about small rendered pictures, in FineVision's schema.

Sample i of a split is a pure function of (seed, split, i, tasks): it can be rendered by any number
of processes. For every question the answers are uniformly distributed, so what a model scores
above 1 / (number of answers) it has read from the pictures.

Two pictures in one sample come in two layouts. *Interleaved*: each question stands right after the
picture it is about. *In front*: both pictures stand before the first question. A mechanism that
gives images no position cannot order the second kind, so what is asked about there occurs in one of
the two pictures only.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from casa_train.errors import UserError

# The shard writer and the tokenizer load torch: they are imported where a dataset is written, so
# that rendering processes and `--help` start at once.

VERSION = 1  # raise when the same arguments would render something else

T = TypeVar("T")
Rgb = tuple[int, int, int]
SplitName = Literal["validation", "train"]
SPLITS: tuple[SplitName, ...] = ("validation", "train")

COLOURS: dict[str, Rgb] = {
    "red": (215, 30, 35),
    "orange": (245, 130, 20),
    "yellow": (240, 215, 30),
    "green": (40, 155, 60),
    "cyan": (45, 200, 220),
    "blue": (40, 75, 220),
    "purple": (130, 45, 165),
    "pink": (250, 135, 195),
}
KINDS = {  # kind of shape -> its plural
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
ORDINALS = ("first", "second")
WORDS = (
    "ant bag bat bed bird boat book bus cake cat cow cup dog duck egg fish fox frog goat hat "
    "hill jam key lamp leaf lion milk moon nest nut owl pen pig rain road shoe sun tent tree wolf"
).split()
NUMBERS = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty"
).split()
MAX_COUNT = 4
MAX_LEVEL = 5
MAX_TURNS = 3

SHORTEST_SIDE, LONGEST_SIDE, LARGEST_ASPECT = 56, 168, 2.0
CHUNK = 64  # samples a process draws at a time
PAIR_SHARE = 0.1
TEXT_PERIOD = 25  # one text-only training sample in so many
TASK_NAMES = ("colour", "shape", "count", "position", "digit", "word", "chart", "text")

VOCABULARY = 512  # bytes, special tokens and room for every answer as one token or two
PAD, BOS, USER, ASSISTANT, END = "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"


@dataclass(frozen=True)
class Question:
    """A question with a `{where}` slot for "in the first image", and its answer."""

    text: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """One picture and what can be asked about it; no answer gives another one away."""

    image: Image.Image
    questions: list[Question]
    # Whether a pair of such scenes can be told apart by what is asked, without their order.
    distinct: bool = True


@dataclass(frozen=True)
class Example:
    """One sample before it is written: encoded pictures and (question, answer) turns."""

    task: str
    images: tuple[bytes, ...]
    texts: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        return f"synthetic_{self.task}"

    @property
    def digests(self) -> frozenset[bytes]:
        """What identifies the pictures."""
        return frozenset(hashlib.blake2b(image, digest_size=16).digest() for image in self.images)

    def row(self) -> dict[str, Any]:
        """FineVision's columns, without `images`. Ratings say whether a turn needs a picture."""
        visual = 5 if self.images else 1
        row: dict[str, Any] = {
            "texts": [{"user": user, "assistant": assistant} for user, assistant in self.texts],
            "source": self.source,
        }
        for name, rating in (
            ("relevance", 5),
            ("image_correspondence", visual),
            ("visual_dependency", visual),
            ("formatting", 5),
        ):
            row[f"{name}_ratings"] = [rating] * len(self.texts)
            row[f"{name}_min"] = rating
        return row


# ---------------------------------------------------------------------------------------- drawing


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _shuffled(rng: np.random.Generator, options: Iterable[T]) -> list[T]:
    items = list(options)
    return [items[i] for i in rng.permutation(len(items))]


def _size(rng: np.random.Generator, shortest: int = SHORTEST_SIDE) -> tuple[int, int]:
    """Width and height: independent of what will be drawn, so that they give nothing away."""
    aspect = LARGEST_ASPECT ** rng.random()
    short = rng.uniform(shortest, LONGEST_SIDE / aspect)
    sides = round(short), min(round(short * aspect), LONGEST_SIDE)
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def _background(rng: np.random.Generator) -> Rgb:
    low, high = (222, 242) if rng.random() < 0.5 else (14, 44)
    level = rng.integers(low, high)
    red, green, blue = (level + rng.integers(-7, 8, 3)).tolist()
    return red, green, blue


def _paint(rng: np.random.Generator, colour: str) -> Rgb:
    """The named colour, a little off."""
    red, green, blue = np.clip(COLOURS[colour] + rng.integers(-10, 11, 3), 0, 255).tolist()
    return red, green, blue


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius, angle = (0.53 if i % 2 == 0 else 0.22), math.pi * (i / 5 - 0.5)
        points.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return points


POLYGONS = {  # corners in the unit square
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)],
    "star": _star(),
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

    def cells(self, count: int) -> list[Region]:
        """At least `count` equal parts, as nearly square as can be."""
        columns = max(
            range(1, count + 1),
            key=lambda c: min(self.width / c, self.height / math.ceil(count / c)),
        )
        return self.split(columns, math.ceil(count / columns))


class Canvas:
    """A picture under construction, drawn at twice its size: shapes get smooth edges cheaply."""

    SCALE = 2

    def __init__(self, rng: np.random.Generator, width: int, height: int) -> None:
        self.rng = rng
        self.region = Region(0, 0, width, height)
        size = (width * self.SCALE, height * self.SCALE)
        self._image = Image.new("RGB", size, _background(rng))
        self._draw = ImageDraw.Draw(self._image)

    def shape(self, kind: str, colour: str, cell: Region) -> None:
        """One shape, of random size and place within its cell; neighbours never touch."""
        room = min(cell.width, cell.height)
        side, gap = room * self.rng.uniform(0.72, 0.9), room * 0.07
        left = cell.left + gap / 2 + self.rng.random() * (cell.width - side - gap)
        top = cell.top + gap / 2 + self.rng.random() * (cell.height - side - gap)
        side, left, top = side * self.SCALE, left * self.SCALE, top * self.SCALE
        fill, box = _paint(self.rng, colour), (left, top, left + side, top + side)
        if kind == "circle":
            self._draw.ellipse(box, fill=fill)
        elif kind == "ring":
            self._draw.ellipse(box, outline=fill, width=round(side * 0.25))
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


def _ink(rng: np.random.Generator, background: Rgb) -> Rgb:
    """A colour for thin strokes, which need more contrast than shapes."""

    def luminance(colour: Rgb) -> float:
        return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]

    base = luminance(background)
    strong = [name for name, rgb in COLOURS.items() if abs(luminance(rgb) - base) > 70]
    return _paint(rng, _pick(rng, strong))


def _print(
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


# ------------------------------------------------------------------------------------------ tasks
# A task draws `pictures` scenes. What it asks of each is in random order, ready to be cut to the
# first one to three questions.


def _assortment(
    rng: np.random.Generator, kinds: Sequence[str], colours: Sequence[str]
) -> Image.Image:
    """A picture with one shape for each (kind, colour)."""
    canvas = Canvas(rng, *_size(rng))
    cells = _shuffled(rng, canvas.region.cells(len(kinds)))
    for kind, colour, cell in zip(kinds, colours, cells, strict=False):
        canvas.shape(kind, colour, cell)
    return canvas.finish()


def _crowd(rng: np.random.Generator, most: int) -> int:
    """How many shapes a picture shows: half the time one, so that looking pays off from the
    start.
    """
    return min(most, int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1])) + 1)


def _colour(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = _shuffled(rng, KINDS)  # two pictures share no kind
    most = len(KINDS) // 2 if pictures == 2 else 4
    scenes = []
    for _ in range(pictures):
        kinds = [remaining.pop() for _ in range(_crowd(rng, most))]
        colours = _shuffled(rng, COLOURS)[: len(kinds)]
        form = _pick(rng, COLOUR_FORMS)
        questions = [
            Question(form.replace("{kind}", kind), colour)
            for kind, colour in zip(kinds, colours, strict=True)
        ]
        scenes.append(Scene(_assortment(rng, kinds, colours), questions))
    return scenes


def _shape(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = _shuffled(rng, COLOURS)  # two pictures share no colour
    scenes = []
    for _ in range(pictures):
        colours = [remaining.pop() for _ in range(_crowd(rng, 4))]
        kinds = _shuffled(rng, KINDS)[: len(colours)]
        form = _pick(rng, SHAPE_FORMS)
        questions = [
            Question(form.replace("{colour}", colour), kind)
            for kind, colour in zip(kinds, colours, strict=True)
        ]
        scenes.append(Scene(_assortment(rng, kinds, colours), questions))
    return scenes


def _count(rng: np.random.Generator, pictures: int) -> list[Scene]:
    kinds = _shuffled(rng, KINDS)
    total = rng.random() < 0.5
    scenes = []
    for _ in range(pictures):
        canvas = Canvas(rng, *_size(rng, shortest=84))
        form = _pick(rng, COUNT_FORMS)
        if total:  # asked alone: the number of all shapes bounds that of each kind
            number = int(rng.integers(1, MAX_COUNT + 1))
            shown = [_pick(rng, list(KINDS)) for _ in range(number)]
            questions = [Question(form.replace("{plural}", "shapes"), str(number))]
        else:
            shown, questions = [], []
            for kind in (kinds.pop(), kinds.pop()):
                number = int(rng.integers(1, MAX_COUNT + 1))
                shown += [kind] * number
                questions.append(Question(form.replace("{plural}", KINDS[kind]), str(number)))
        # Always the same cells: the size of a shape must not tell how many there are.
        cells = _shuffled(rng, canvas.region.cells(2 * MAX_COUNT))
        for kind, cell in zip(shown, cells, strict=False):
            canvas.shape(kind, _pick(rng, list(COLOURS)), cell)
        scenes.append(Scene(canvas.finish(), questions, distinct=not total))
    return scenes


def _position(rng: np.random.Generator, pictures: int) -> list[Scene]:
    kinds = _shuffled(rng, KINDS)
    scenes = []
    for _ in range(pictures):
        canvas = Canvas(rng, *_size(rng, shortest=72))
        present = [kinds.pop() for _ in range(_crowd(rng, 3))]
        # Quadrants are drawn independently, or a known answer would rule out one for the next.
        # Only three in one place are redrawn: there is room for two.
        while True:
            quadrants = rng.integers(len(QUADRANTS), size=len(present)).tolist()
            if max(Counter(quadrants).values()) <= 2:
                break
        colours = _shuffled(rng, COLOURS)
        form = _pick(rng, POSITION_FORMS)
        corners = canvas.region.split(2, 2)
        rooms = {q: corners[q].cells(quadrants.count(q)) for q in set(quadrants)}
        questions = []
        for kind, quadrant, colour in zip(present, quadrants, colours, strict=False):
            canvas.shape(kind, colour, rooms[quadrant].pop())
            questions.append(Question(form.replace("{kind}", kind), QUADRANTS[quadrant]))
        scenes.append(Scene(canvas.finish(), questions))
    return scenes


def _printed(
    rng: np.random.Generator,
    pictures: int,
    options: Sequence[str],
    forms: Sequence[str],
    place_form: str,
    places: dict[str, Region],
) -> list[Scene]:
    """One of `options` alone, or one at each of `places` (parts of the unit square)."""
    scenes = []
    for _ in range(pictures):
        width, height = _size(rng, shortest=64)
        background = _background(rng)
        image = Image.new("RGB", (width, height), background)
        draw = ImageDraw.Draw(image)
        if rng.random() < 0.5:
            asked = {_pick(rng, forms): Region(0, 0, 1, 1)}
        else:
            asked = {place_form.replace("{place}", p): part for p, part in places.items()}
        questions = []
        for question, part in asked.items():
            answer = _pick(rng, options)
            cell = Region(
                part.left * width + 2,
                part.top * height + 2,
                part.width * width - 4,
                part.height * height - 4,
            )
            _print(rng, draw, answer, _ink(rng, background), cell)
            questions.append(Question(question, answer))
        scenes.append(Scene(image, _shuffled(rng, questions), distinct=False))
    return scenes


def _digit(rng: np.random.Generator, pictures: int) -> list[Scene]:
    return _printed(rng, pictures, "0123456789", DIGIT_FORMS, DIGIT_PLACE_FORM, DIGIT_PLACES)


def _word(rng: np.random.Generator, pictures: int) -> list[Scene]:
    return _printed(rng, pictures, WORDS, WORD_FORMS, WORD_PLACE_FORM, WORD_PLACES)


def _chart(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = _shuffled(rng, COLOURS)  # two pictures share no colour
    most = len(COLOURS) // 2 if pictures == 2 else 5
    # Either kind of question alone: the height of a bar says something about the tallest.
    extremes = rng.random() < 0.5
    scenes = []
    for _ in range(pictures):
        colours = [remaining.pop() for _ in range(int(rng.integers(3, most + 1)))]
        while True:
            levels = rng.integers(1, MAX_LEVEL + 1, size=len(colours)).tolist()
            if not extremes or levels.count(max(levels)) == levels.count(min(levels)) == 1:
                break
        if extremes:
            named = {
                "tallest": colours[levels.index(max(levels))],
                "shortest": colours[levels.index(min(levels))],
            }
            questions = [
                Question(EXTREME_FORM.replace("{extreme}", word), named[word])
                for word in _shuffled(rng, named)
            ]
        else:
            questions = [
                Question(HEIGHT_FORM.replace("{colour}", colour), str(level))
                for colour, level in zip(colours, levels, strict=True)
            ]
        order = rng.permutation(len(colours))
        image = _bars(rng, [colours[i] for i in order], [levels[i] for i in order])
        scenes.append(Scene(image, questions, distinct=not extremes))
    return scenes


def _bars(rng: np.random.Generator, colours: list[str], levels: list[int]) -> Image.Image:
    """A bar chart with ticks 1 to 5 and a line at each."""
    width, height = _size(rng, shortest=84)
    background = _background(rng)
    ink = (40, 40, 40) if background[0] > 128 else (215, 215, 215)
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
        draw.rectangle(box, fill=_paint(rng, colour))
    draw.line((left, 0, left, bottom), fill=ink)
    draw.line((left, bottom, width, bottom), fill=ink)
    return image


COLOUR_FORMS = ("What colour is the {kind}{where}?", "Which colour does the {kind}{where} have?")
SHAPE_FORMS = ("Which shape{where} is {colour}?", "What is the {colour} shape{where}?")
COUNT_FORMS = ("How many {plural} are there{where}?", "Count the {plural}{where}.")
POSITION_FORMS = ("Where is the {kind}{where}?", "In which corner is the {kind}{where}?")
DIGIT_FORMS = ("Which digit is shown{where}?", "Read the digit{where}.")
DIGIT_PLACE_FORM = "Which digit is on the {place}{where}?"
DIGIT_PLACES = {"left": Region(0, 0, 0.5, 1), "right": Region(0.5, 0, 0.5, 1)}
WORD_FORMS = ("Which word is printed{where}?", "Read the word{where}.")
WORD_PLACE_FORM = "Which word is at the {place}{where}?"
WORD_PLACES = {"top": Region(0, 0, 1, 0.5), "bottom": Region(0, 0.5, 1, 0.5)}
EXTREME_FORM = "Which bar is the {extreme}{where}?"
HEIGHT_FORM = "How high is the {colour} bar{where}?"

TASKS: dict[str, Callable[[np.random.Generator, int], list[Scene]]] = {
    "colour": _colour,
    "shape": _shape,
    "count": _count,
    "position": _position,
    "digit": _digit,
    "word": _word,
    "chart": _chart,
}


def _text_turns(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Questions that need no picture."""
    turns: dict[str, str] = {}
    while len(turns) < MAX_TURNS:
        i = int(rng.integers(len(NUMBERS) - 1))
        a, b = rng.integers(1, 10, 2).tolist()
        question, answer = [
            (f"What comes after {NUMBERS[i]}?", NUMBERS[i + 1]),
            (f"What comes before {NUMBERS[i + 1]}?", NUMBERS[i]),
            (f"What is {a} + {b}?", str(a + b)),
        ][int(rng.integers(3))]
        turns[question] = answer
    return list(turns.items())[: int(rng.integers(1, MAX_TURNS + 1))]


# --------------------------------------------------------------------------------------- examples


def task_of(seed: int, split: SplitName, index: int, tasks: Sequence[str]) -> str:
    """The task of one sample: shares are even in every stretch, text is rare and never held out."""
    visual = [task for task in tasks if task != "text"]
    if not visual:
        return "text"
    block, place = divmod(index, TEXT_PERIOD)
    slot = int(_generator(seed, split, block, 0, purpose=0).permutation(TEXT_PERIOD)[place])
    if split == "train":
        if slot == TEXT_PERIOD - 1:
            return "text"
        return visual[(block * (TEXT_PERIOD - 1) + slot) % len(visual)]
    return visual[(block * TEXT_PERIOD + slot) % len(visual)]


def example(
    seed: int, split: SplitName, tasks: Sequence[str], index: int, attempt: int = 0
) -> Example:
    """Sample `index` of a split. Another `attempt` gives another sample of the same task."""
    task = task_of(seed, split, index, tasks)
    rng = _generator(seed, split, index, attempt, purpose=1)
    if task == "text":
        return Example(task, (), tuple(_text_turns(rng)))
    pictures = 2 if rng.random() < PAIR_SHARE else 1
    scenes = TASKS[task](rng, pictures)
    turns = int(rng.integers(1, MAX_TURNS + 1))
    texts: list[tuple[str, str]]
    if pictures == 1:
        texts = [(q.text.replace("{where}", ""), q.answer) for q in scenes[0].questions[:turns]]
    else:
        texts = _ask_about_pair(rng, scenes, turns)
    return Example(task, tuple(_png(scene.image) for scene in scenes), tuple(texts))


def _ask_about_pair(
    rng: np.random.Generator, scenes: list[Scene], turns: int
) -> list[tuple[str, str]]:
    asked = [
        [(q.text.replace("{where}", f" in the {ordinal} image"), q.answer) for q in scene.questions]
        for scene, ordinal in zip(scenes, ORDINALS, strict=True)
    ]
    if all(scene.distinct for scene in scenes) and rng.random() < 0.5:
        pool = asked[0] + asked[1]
        return [pool[i] for i in rng.permutation(len(pool))[:turns]]
    (first, answer), second = asked[0][0], asked[1][: max(1, turns - 1)]
    texts = [(f"<image>{first}", answer), (f"<image>{second[0][0]}", second[0][1]), *second[1:]]
    return texts


def _generator(
    seed: int, split: SplitName, index: int, attempt: int, purpose: int
) -> np.random.Generator:
    key = (SPLITS.index(split), purpose, index, attempt)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------- tokenizer


def corpus() -> list[str]:
    """Every question and answer this recipe can write, whatever its arguments."""
    places = ("", *(f" in the {ordinal} image" for ordinal in ORDINALS))
    fields = {
        "{kind}": list(KINDS),
        "{plural}": [*KINDS.values(), "shapes"],
        "{colour}": list(COLOURS),
        "{place}": [*DIGIT_PLACES, *WORD_PLACES],
        "{extreme}": ["tallest", "shortest"],
    }
    texts = [
        *(*COLOUR_FORMS, *SHAPE_FORMS, *COUNT_FORMS, *POSITION_FORMS, *DIGIT_FORMS),
        *(DIGIT_PLACE_FORM, *WORD_FORMS, WORD_PLACE_FORM, EXTREME_FORM, HEIGHT_FORM),
    ]
    for field, values in fields.items():
        texts = [t.replace(field, v) for t in texts for v in (values if field in t else [""])]
    texts = [text.replace("{where}", place) for text in texts for place in places]
    # Answers are as frequent as questions in the data, here they are few: they count more.
    answers = [*COLOURS, *KINDS, *QUADRANTS, *WORDS, *NUMBERS, *map(str, range(19))]
    sums = [f"What is {a} + {b}?" for a in range(1, 10) for b in range(1, 10)]
    order = [f"What comes {side} {number}?" for side in ("after", "before") for number in NUMBERS]
    return [*texts, *sums, *order, *(answer for answer in answers for _ in range(20))]


def build_tokenizer() -> Any:
    """A small byte-level BPE tokenizer: any text encodes, the usual answers are one or two tokens.

    It does not depend on the arguments of the recipe, so datasets of several runs can be mixed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------- writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where train/, validation/, tokenizer/ and summary.json go",
    )
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="training samples")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="0 or more")
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="held-out samples (default: a tenth of --samples, at most 2000)",
    )
    parser.add_argument(
        "--tasks",
        default="all",
        metavar="A,B,...",
        help=f"out of {', '.join(TASK_NAMES)} (default: all of them; text-only "
        "samples are always a small part of the training split)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR_OR_HUB_ID",
        help="tokenizer to count with and to copy (default: one built here)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=os.cpu_count() or 1,
        help="rendering processes (default: one a core)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Renders and writes the dataset, or says that it is there already.

    :raises UserError: bad numbers or tasks, or a directory that holds something else.
    """
    tasks = _tasks(arguments.tasks)
    validation = arguments.validation
    if validation is None:
        validation = 0 if tasks == ["text"] else min(max(arguments.samples // 10, 1), 2000)
    for name, value, least in (
        ("--samples", arguments.samples, 1),
        ("--seed", arguments.seed, 0),
        ("--validation", validation, 0),
        ("--workers", arguments.workers, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; expected a whole number of at least {least}.")
    if tasks == ["text"] and validation:
        raise UserError(
            f"--validation is {validation} with --tasks text; text-only samples are never held "
            "out. Add a task with pictures, or set --validation 0."
        )
    wanted = {
        "version": VERSION,
        "samples": arguments.samples,
        "validation": validation,
        "seed": arguments.seed,
        "tasks": tasks,
        "tokenizer": arguments.tokenizer,
    }
    try:
        _prepare(arguments.out, wanted, arguments.workers)
    except OSError as error:  # no permission, no space
        raise UserError(f"--out {arguments.out} cannot be written: {error}") from error


def _prepare(out: Path, wanted: dict[str, Any], workers: int) -> None:
    if _finished(out, wanted):
        print(f"{out} already holds this dataset: nothing to do.")
        return
    from casa_train.data.tokens import load_tokenizer, save_tokenizer

    name = wanted["tokenizer"]
    tokenizer = build_tokenizer() if name is None else load_tokenizer(name)
    out.mkdir(parents=True, exist_ok=True)
    header = {"recipe": "synthetic", "arguments": wanted}
    _save_summary(out, {**header, "finished": False})
    for part in (*SPLITS, "tokenizer"):  # what an interrupted run left
        shutil.rmtree(out / part, ignore_errors=True)
    save_tokenizer(tokenizer, out / "tokenizer")
    summary = _write_splits(out, wanted, tokenizer, workers)
    _save_summary(out, {**header, "finished": True, **summary})
    _print_summary(out, summary)


def _tasks(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if chosen == ["all"]:
        return list(TASK_NAMES)
    unknown = [name for name in chosen if name not in TASK_NAMES]
    if unknown or not chosen:
        raise UserError(
            f"--tasks names {', '.join(map(repr, unknown)) or 'nothing'}; expected a comma-"
            f"separated list out of {', '.join(TASK_NAMES)}, or 'all'."
        )
    # "text" always takes part: with or without it the same samples come out.
    return [name for name in TASK_NAMES if name in chosen or name == "text"]


def _finished(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds this dataset; False when it is free or an earlier run was interrupted.

    :raises UserError: when anything else is there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a directory to write to.")
    path = out / "summary.json"
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(
                f"--out {out} is not empty and was not written by this recipe; choose another "
                "directory or empty it."
            )
        return False
    try:
        found = json.loads(path.read_text())
        there, finished = dict(found["arguments"]), bool(found["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the summary of a synthetic dataset ({error!r}); choose another --out "
            "or delete the directory."
        ) from error
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {out} holds a different dataset: {'; '.join(different)}. Choose another --out, "
            "delete the directory, or repeat the arguments it was made with."
        )
    if not finished:
        print(f"{out} was left unfinished: starting over.")
    return finished


def _save_summary(out: Path, summary: dict[str, Any]) -> None:
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(temporary, out / "summary.json")


def _write_splits(
    out: Path, wanted: dict[str, Any], tokenizer: Any, workers: int
) -> dict[str, Any]:
    """Validation, then training without its pictures; returns what was written, by split."""
    from casa_train.data.shards import ShardWriter, Split
    from casa_train.data.tokens import count_tokens, tokenizer_fingerprint

    fingerprint = tokenizer_fingerprint(tokenizer)
    count = lru_cache(maxsize=1 << 16)(partial(count_tokens, tokenizer))
    seed, tasks = wanted["seed"], wanted["tasks"]

    digests: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    summary: dict[str, Any] = {}
    for split, size in zip(SPLITS, (wanted["validation"], wanted["samples"]), strict=True):
        if size == 0:
            continue
        writer = ShardWriter(out / split, "finevision", count, fingerprint)
        per_task: Counter[str] = Counter()
        images = redrawn = 0
        draw = partial(example, seed, split, tasks)
        with closing(_in_order(draw, size, workers)) as drawn:
            for i, sample in enumerate(_progress(drawn, size, split)):
                if split == "train":
                    sample, attempts = draw_apart(draw, i, sample, digests["validation"])
                    redrawn += attempts > 0
                digests[split] |= sample.digests
                if writer.write(f"{split}-{i:07d}", sample.row(), sample.images):
                    per_task[sample.task] += 1
                    images += len(sample.images)
        writer.close()
        written = Split(out / split)
        summary[split] = {
            "samples": len(written),
            "images": images,
            "text_tokens": sum(
                int(written.list_column(column)[0].sum())
                for column in ("user_tokens", "assistant_tokens")
            ),
            "skipped": writer.skipped,
            "redrawn": redrawn,
            "per_task": dict(sorted(per_task.items())),
        }
    if shared := digests["validation"] & digests["train"]:
        raise RuntimeError(f"{len(shared)} pictures are in both splits")
    return summary


def draw_apart(
    draw: Callable[[int, int], Example], index: int, sample: Example, held_out: set[bytes]
) -> tuple[Example, int]:
    """`sample`, or the first later attempt at it without a held-out picture; and the attempts."""
    attempt = 0
    while sample.digests & held_out:
        attempt += 1
        sample = draw(index, attempt)
    return sample, attempt


def _in_order(
    draw: Callable[[int], Example], size: int, workers: int
) -> Generator[Example, None, None]:
    """Examples 0 to size - 1, drawn by several processes."""
    workers = min(workers, math.ceil(size / CHUNK))
    if workers == 1:
        yield from map(draw, range(size))
        return
    with ProcessPoolExecutor(
        workers,
        # Not forked: the tokenizer's threads do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        # Ctrl-C reaches every process of the terminal; only this one has something to say.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        starts = iter(range(0, size, CHUNK))
        pending: deque[Future[list[Example]]] = deque()
        try:
            while True:
                # A bounded number of chunks ahead of the writer: memory stays flat in long runs.
                for start in islice(starts, 3 * workers - len(pending)):
                    chunk = range(start, min(start + CHUNK, size))
                    pending.append(pool.submit(_draw_chunk, draw, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a rendering process was ended from outside (out of memory?); run the same "
                "command again with a smaller --workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _draw_chunk(draw: Callable[[int], Example], chunk: range) -> list[Example]:
    return [draw(i) for i in chunk]


def _progress(items: Iterator[Example], total: int, label: str) -> Iterator[Example]:
    """A bar on a terminal; in a log a line every ten seconds and one at the end."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit="sample")
        return
    start = last = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if i == total or now - last > 10:
            last = now
            rate = i / max(now - start, 1e-9)
            print(f"{label}: {i}/{total} samples, {rate:.0f} a second", flush=True)


def _print_summary(out: Path, summary: dict[str, Any]) -> None:
    print(f"finished: {out}")
    for split, found in summary.items():
        tasks = ", ".join(f"{task} {number}" for task, number in found["per_task"].items())
        skipped = ", ".join(f"{reason} {n}" for reason, n in found["skipped"].items()) or "none"
        print(
            f"  {split}: {found['samples']} samples, {found['images']} images, "
            f"{found['text_tokens']} text tokens; skipped: {skipped}; {tasks}"
        )
