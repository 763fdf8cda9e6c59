"""The pictures of the synthetic recipe, and what is asked about them.

Sample i of a split is a pure function of (seed, split, i, tasks, style): it can be rendered by any
number of processes. For every question the answers are uniformly distributed, so what a model
scores above 1 / (number of answers) it has read from the pictures.

Two pictures in one sample come in two layouts. *Interleaved*: each question stands right after the
picture it is about. *In front*: both pictures stand before the first question. A mechanism that
gives images no position cannot order the second kind, so what is asked about there occurs in one of
the two pictures only.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from data_recipes.synthetic_drawing import (
    COLOURS,
    KINDS,
    MAX_LEVEL,
    Canvas,
    Region,
    draw_bars,
    pick,
    print_text,
    random_background,
    random_grid,
    random_ink,
    random_size,
    shuffled,
)
from data_recipes.synthetic_wordings import WORDINGS, without_picture
from data_recipes.synthetic_wordings import ask as ask_freely
from data_recipes.whole import rated_row

SplitName = Literal["validation", "train"]
SPLITS: tuple[SplitName, ...] = ("validation", "train")

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
MAX_TURNS = 3
PAIR_SHARE = 0.1
TEXT_PERIOD = 25  # one text-only training sample in so many
REWORDED = "_reworded"  # ends the sources of held-out wordings
TASK_NAMES = ("colour", "shape", "count", "position", "digit", "word", "chart", "text")


@dataclass(frozen=True)
class Question:
    """A question with a `{where}` slot for "in the first image", and its answer.

    :param subject: what it names, for another wording of it.
    """

    text: str
    answer: str
    subject: str = ""


@dataclass(frozen=True)
class Scene:
    """One picture and what can be asked about it; no answer gives another one away."""

    image: Image.Image
    questions: list[Question]
    # Whether a pair of such scenes can be told apart by what is asked, without their order.
    distinct: bool = True


def digest(image: bytes) -> bytes:
    """What identifies a picture."""
    return hashlib.blake2b(image, digest_size=16).digest()


@dataclass(frozen=True)
class Example:
    """One sample before it is written: encoded pictures and (question, answer) turns."""

    task: str
    images: tuple[bytes, ...]
    texts: tuple[tuple[str, str], ...]
    reworded: bool = False  # asked in wordings that training never uses

    @property
    def source(self) -> str:
        return f"synthetic_{self.task}{REWORDED if self.reworded else ''}"

    @property
    def digests(self) -> frozenset[bytes]:
        """What identifies the pictures."""
        return frozenset(map(digest, self.images))

    def row(self) -> dict[str, Any]:
        """FineVision's columns, without `images`. Ratings say whether a turn needs a picture."""
        return rated_row(self.source, self.texts, visual=bool(self.images))


# ------------------------------------------------------------------------------------------ tasks
# A task draws `pictures` scenes. What it asks of each is in random order, ready to be cut to the
# first one to three questions.


def _assortment(
    rng: np.random.Generator, kinds: Sequence[str], colours: Sequence[str]
) -> Image.Image:
    """A picture with one shape for each (kind, colour), in cells of a grid."""
    columns, rows = random_grid(rng, len(kinds))
    canvas = Canvas.with_grid(rng, columns, rows)
    cells = shuffled(rng, canvas.region.split(columns, rows))
    for kind, colour, cell in zip(kinds, colours, cells, strict=False):
        canvas.shape(kind, colour, cell)
    return canvas.finish()


def _crowd(rng: np.random.Generator, most: int) -> int:
    """How many shapes a picture shows: half the time one, so that looking pays off early."""
    return min(most, int(rng.choice(4, p=[0.5, 0.25, 0.15, 0.1])) + 1)


def _colour(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = shuffled(rng, KINDS)  # two pictures share no kind
    most = len(KINDS) // 2 if pictures == 2 else 4
    scenes = []
    for _ in range(pictures):
        kinds = [remaining.pop() for _ in range(_crowd(rng, most))]
        colours = shuffled(rng, COLOURS)[: len(kinds)]
        form = pick(rng, COLOUR_FORMS)
        questions = [
            Question(form.replace("{kind}", kind), colour, kind)
            for kind, colour in zip(kinds, colours, strict=True)
        ]
        scenes.append(Scene(_assortment(rng, kinds, colours), questions))
    return scenes


def _shape(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = shuffled(rng, COLOURS)  # two pictures share no colour
    scenes = []
    for _ in range(pictures):
        colours = [remaining.pop() for _ in range(_crowd(rng, 4 if pictures == 1 else 2))]
        kinds = shuffled(rng, KINDS)[: len(colours)]
        form = pick(rng, SHAPE_FORMS)
        questions = [
            Question(form.replace("{colour}", colour), kind, colour)
            for kind, colour in zip(kinds, colours, strict=True)
        ]
        scenes.append(Scene(_assortment(rng, kinds, colours), questions))
    return scenes


def _count(rng: np.random.Generator, pictures: int) -> list[Scene]:
    kinds = shuffled(rng, KINDS)
    total = rng.random() < 0.5
    scenes = []
    for _ in range(pictures):
        columns, rows = random_grid(rng, 2 * MAX_COUNT)
        canvas = Canvas.with_grid(rng, columns, rows)
        form = pick(rng, COUNT_FORMS)
        if total:  # asked alone: the number of all shapes bounds that of each kind
            number = int(rng.integers(1, MAX_COUNT + 1))
            shown = [pick(rng, list(KINDS)) for _ in range(number)]
            questions = [Question(form.replace("{plural}", "shapes"), str(number), "shapes")]
        else:
            shown, questions = [], []
            for kind in (kinds.pop(), kinds.pop()):
                number = int(rng.integers(1, MAX_COUNT + 1))
                shown += [kind] * number
                plural = KINDS[kind]
                question = Question(form.replace("{plural}", plural), str(number), plural)
                questions.append(question)
        # The grid is chosen whatever the number: a shape's size must not tell how many there are.
        cells = shuffled(rng, canvas.region.split(columns, rows))
        for kind, cell in zip(shown, cells, strict=False):
            canvas.shape(kind, pick(rng, list(COLOURS)), cell)
        scenes.append(Scene(canvas.finish(), questions, distinct=not total))
    return scenes


def _position(rng: np.random.Generator, pictures: int) -> list[Scene]:
    kinds = shuffled(rng, KINDS)
    scenes = []
    for _ in range(pictures):
        canvas = Canvas(rng, *random_size(rng, shortest=72))
        present = [kinds.pop() for _ in range(_crowd(rng, 3 if pictures == 1 else 2))]
        # Quadrants are drawn independently, or a known answer would rule out one for the next.
        # Only three in one place are redrawn: there is room for two.
        while True:
            quadrants = rng.integers(len(QUADRANTS), size=len(present)).tolist()
            if max(Counter(quadrants).values()) <= 2:
                break
        colours = shuffled(rng, COLOURS)
        form = pick(rng, POSITION_FORMS)
        corners = canvas.region.split(2, 2)
        rooms = {
            q: corners[q].halves() if quadrants.count(q) == 2 else [corners[q]]
            for q in set(quadrants)
        }
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
        width, height = random_size(rng, shortest=64)
        background = random_background(rng)
        image = Image.new("RGB", (width, height), background)
        draw = ImageDraw.Draw(image)
        if rng.random() < 0.5:
            asked = {pick(rng, forms): Region(0, 0, 1, 1)}
        else:
            asked = {place_form.replace("{place}", p): part for p, part in places.items()}
        questions = []
        for question, part in asked.items():
            answer = pick(rng, options)
            cell = Region(
                part.left * width + 2,
                part.top * height + 2,
                part.width * width - 4,
                part.height * height - 4,
            )
            print_text(rng, draw, answer, random_ink(rng, background), cell)
            questions.append(Question(question, answer))
        scenes.append(Scene(image, shuffled(rng, questions), distinct=False))
    return scenes


def _digit(rng: np.random.Generator, pictures: int) -> list[Scene]:
    return _printed(rng, pictures, "0123456789", DIGIT_FORMS, DIGIT_PLACE_FORM, DIGIT_PLACES)


def _word(rng: np.random.Generator, pictures: int) -> list[Scene]:
    return _printed(rng, pictures, WORDS, WORD_FORMS, WORD_PLACE_FORM, WORD_PLACES)


def _chart(rng: np.random.Generator, pictures: int) -> list[Scene]:
    remaining = shuffled(rng, COLOURS)  # two pictures share no colour
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
                for word in shuffled(rng, named)
            ]
        else:
            questions = [
                Question(HEIGHT_FORM.replace("{colour}", colour), str(level))
                for colour, level in zip(colours, levels, strict=True)
            ]
        order = rng.permutation(len(colours))
        image = draw_bars(rng, [colours[i] for i in order], [levels[i] for i in order])
        scenes.append(Scene(image, questions, distinct=not extremes))
    return scenes


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


def text_turns(rng: np.random.Generator) -> list[tuple[str, str]]:
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
    slot = int(generator(seed, split, block, 0, purpose=0).permutation(TEXT_PERIOD)[place])
    if split == "train":
        if slot == TEXT_PERIOD - 1:
            return "text"
        return visual[(block * (TEXT_PERIOD - 1) + slot) % len(visual)]
    return visual[(block * TEXT_PERIOD + slot) % len(visual)]


@dataclass(frozen=True)
class Style:
    """How pictures are asked about, and how large they are.

    :param free: whether questions are worded freely and answered in sentences.
    :param hold_out: whether some of those wordings are never trained; every second held-out
        sample is asked in them.
    :param scale: of the pictures' sides.
    """

    free: bool = False
    hold_out: bool = False
    scale: float = 1.0


Ask = Callable[[Question, str], tuple[str, str]]
"""A question and where it is asked about -> its words and its answer."""


def example(
    seed: int,
    split: SplitName,
    tasks: Sequence[str],
    index: int,
    attempt: int = 0,
    style: Style = Style(),
) -> Example:
    """Sample `index` of a split. Another `attempt` gives another sample of the same task.

    Words are drawn apart from pictures: whatever the style, they show the same.
    """
    task = task_of(seed, split, index, tasks)
    rng = generator(seed, split, index, attempt, purpose=1)
    if task == "text":
        texts = text_turns(rng)
        return Example(task, (), tuple(starmap(without_picture, texts) if style.free else texts))
    pictures = 2 if rng.random() < PAIR_SHARE else 1
    scenes = TASKS[task](rng, pictures)
    turns = int(rng.integers(1, MAX_TURNS + 1))
    reworded = style.hold_out and split == "validation" and index % 2 == 1
    ask: Ask = _as_drawn
    if style.free:
        words = generator(seed, split, index, attempt, purpose=2)
        ask = _in_sentences(words, task, scenes, style, reworded)
    if pictures == 1:
        texts = [ask(question, "") for question in scenes[0].questions[:turns]]
    else:
        texts = _ask_about_pair(rng, scenes, turns, ask)
    images = tuple(png(scene.image, style.scale) for scene in scenes)
    return Example(task, images, tuple(texts), reworded)


def _as_drawn(question: Question, where: str) -> tuple[str, str]:
    return question.text.replace("{where}", where), question.answer


def _in_sentences(
    rng: np.random.Generator, task: str, scenes: list[Scene], style: Style, reworded: bool
) -> Ask:
    wordings = WORDINGS[task]
    forms = wordings.trained if style.hold_out else wordings.every
    # Of two pictures, what they show tells which one is meant: there a shape is always named.
    only = len(scenes) == len(scenes[0].questions) == 1 and task != "count"

    def ask(question: Question, where: str) -> tuple[str, str]:
        asked = wordings.held_out if reworded else forms
        return ask_freely(rng, asked, task, question.subject, question.answer, where, only)

    return ask


def _ask_about_pair(
    rng: np.random.Generator, scenes: list[Scene], turns: int, ask: Ask
) -> list[tuple[str, str]]:
    asked = [
        [ask(question, f" in the {ordinal} image") for question in scene.questions]
        for scene, ordinal in zip(scenes, ORDINALS, strict=True)
    ]
    if all(scene.distinct for scene in scenes) and rng.random() < 0.5:
        pool = asked[0] + asked[1]
        return [pool[i] for i in rng.permutation(len(pool))[:turns]]
    (first, answer), second = asked[0][0], asked[1][: max(1, turns - 1)]
    texts = [(f"<image>{first}", answer), (f"<image>{second[0][0]}", second[0][1]), *second[1:]]
    return texts


def generator(
    seed: int, split: SplitName, index: int, attempt: int, purpose: int
) -> np.random.Generator:
    key = (SPLITS.index(split), purpose, index, attempt)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def png(image: Image.Image, scale: float) -> bytes:
    if scale != 1:
        width, height = (max(1, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


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
