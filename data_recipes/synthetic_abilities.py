"""Conversations that each ask for one ability, to tell ways to bring images in apart.

Sample i of a split is a pure function of (seed, split, i, families), as in `synthetic_scenes`. The
last turn of a conversation is the question of its ability; the turns before it are its history,
which says nothing about the answer. A held-out conversation has one such question, so questions are
independent of each other; training asks up to five where there is more to ask. What a question
names begins its answer: there a small model finds it again soonest.

For every question the answers are uniform over their options, so without the right image a model is
right as often as by chance; all but the questions that need no image. Pictures are made of cells of
28 x 28 pixels: what one image token of the demo's tower sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_recipes.synthetic_drawing import (
    COLOURS,
    KINDS,
    Canvas,
    Region,
    draw_bars,
    pick,
    print_capital,
    random_background,
    random_levels,
    shuffled,
)
from data_recipes.synthetic_scenes import (
    NUMBERS,
    Example,
    SplitName,
    generator,
    png,
    text_turns,
)

CELL = 28  # pixels
NAMES = ("ant", "bed", "cup", "dog", "egg", "fox", "hat", "jam", "key", "owl", "pig", "sun")
TALK = 10  # images of a conversation about earlier ones
BACK = (2, 4, 8)  # images back that held-out questions ask about
SIDES = ("left", "right", "above", "below")
LETTERS = "ACEHLOTX"  # told apart at a few pixels
SPELLED = 3  # letters of a word
CHART = (3, 3)  # cells of a bar chart
FRAMES = 6  # of a clip
STREAMS = (32, 64, 128, 256)  # frames of a held-out stream
LENGTHS = {8: 32, 16: 16, 32: 8, 64: 4, 128: 2, 256: 1}  # of one that trains: how often of 63
NEEDLES = 3  # frames of a stream that show a shape
MOST = 9  # shapes that are counted
BARS = 3
NOTHING = "nothing"  # what words say of an empty frame or cell
MOST_DESCRIBED = 64  # frames: as words they take more room
RECITED = 12  # colours that one answer tells
ASKED = 5  # questions at the end of a conversation that trains
ORDERS = ("tallest", "middle", "shortest")

Turn = tuple[str, str]
Seen = tuple[Image.Image, str]  # a picture, and in words what it shows


@dataclass(frozen=True)
class Drawn:
    """A conversation: its pictures in order, what was said, and what may be asked at the end.

    :param name: of the ability, with its degree.
    :param history: turns before the questions; `<image>` stands for the next picture.
    :param asked: questions, none of which gives another's answer away.
    """

    name: str
    pictures: Sequence[Seen]
    history: Sequence[Turn]
    asked: Sequence[Turn]


@dataclass(frozen=True)
class Family:
    """Conversations about one ability.

    :param draw: draws one of a degree; None: one that trains.
    :param degrees: what held-out ones are drawn of in turn, such as how far back they ask.
    :param share: of what trains, beside the others': what is learned late comes more often.
    """

    draw: Callable[[np.random.Generator, Any], Drawn]
    degrees: Sequence[Any] = ("",)
    share: int = 1


# --------------------------------------------------------------------------------------- pictures


def _picture(rng: np.random.Generator, shapes: Sequence[tuple[str, str]], side: int) -> Seen:
    """Shapes (kind, colour) in different ones of side x side cells."""
    canvas = Canvas(rng, side * CELL, side * CELL)
    cells = shuffled(rng, canvas.region.split(side, side))
    for (kind, colour), cell in zip(shapes, cells, strict=False):
        canvas.shape(kind, colour, cell)
    return canvas.finish(), " ".join(f"{colour} {kind}" for kind, colour in shapes)


def _empty(rng: np.random.Generator) -> Seen:
    """A frame with nothing but a grey stroke."""
    image = Image.new("RGB", (2 * CELL, 2 * CELL), random_background(rng))
    level = int(rng.integers(120, 200))
    ends = tuple(rng.uniform(0, 2 * CELL, 4).tolist())
    ImageDraw.Draw(image).line(ends, fill=(level, level, level), width=3)
    return image.reduce(2), NOTHING


def _any_kind(rng: np.random.Generator) -> str:
    return pick(rng, list(KINDS))


def _any_colour(rng: np.random.Generator) -> str:
    return pick(rng, list(COLOURS))


# ----------------------------------------------------------------------------------- many pictures


def _talk(rng: np.random.Generator, images: int) -> tuple[list[Seen], str, list[Turn]]:
    """Pictures of one shape, the words that show them by name, and for each what colour it has."""
    names = shuffled(rng, NAMES)[:images]
    seen = [(_any_kind(rng), _any_colour(rng)) for _ in names]
    pictures = [_picture(rng, [shape], side=2) for shape in seen]
    shown = "".join(f"<image>{name} " for name in names)
    asked = [
        (f"{name}: which colour?", f"{name} {colour}")
        for name, (_, colour) in zip(names, seen, strict=True)
    ]
    return pictures, shown, asked


def _newest(rng: np.random.Generator, degree: Any) -> Drawn:
    images = TALK if degree is not None else int(rng.integers(1, TALK + 1))
    pictures, shown, colours = _talk(rng, images)
    return _after("newest", pictures, shown, colours[-1:])


def _earlier(rng: np.random.Generator, degree: Any) -> Drawn:
    if degree is None:
        images = np.arange(2, TALK + 1)  # few of them more often: learned first
        pictures, shown, colours = _talk(
            rng, int(rng.choice(images, p=1 / images / sum(1 / images)))
        )
        return _after("earlier", pictures, shown, shuffled(rng, colours))
    pictures, shown, colours = _talk(rng, TALK)
    return _after(f"earlier_{degree}", pictures, shown, [colours[-1 - degree]])


def _after(name: str, pictures: Sequence[Seen], shown: str, asked: Sequence[Turn]) -> Drawn:
    """A conversation whose first turn shows all pictures."""
    (first, answer), *others = asked
    return Drawn(name, pictures, [], [(f"{shown}{first}", answer), *others])


def _recite(rng: np.random.Generator, degree: Any) -> Drawn:
    """Named pictures again, many asked about in one answer: what teaches to look back, if nothing
    else comes between.
    """
    pictures, shown, asked = _talk(rng, int(rng.integers(2, TALK + 1)))
    turns = [pick(rng, asked)[1] for _ in range(RECITED)]
    names = " ".join(turn.split()[0] for turn in turns)
    return _after("recite", pictures, shown, [(f"Which colours have {names}?", " ".join(turns))])


def _compare(rng: np.random.Generator, degree: Any) -> Drawn:
    """Two pictures that have one colour in common, of two or three each."""
    both, *others = shuffled(rng, COLOURS)
    each = int(rng.integers(1, 3))
    seen = [[both, *others[:each]], [both, *others[each : 2 * each]]]
    pictures = [
        _picture(rng, [(_any_kind(rng), colour) for colour in colours], side=2) for colours in seen
    ]
    return _after("compare", pictures, "<image><image>", [("Which colour is in both?", both)])


def _text(rng: np.random.Generator, degree: Any) -> Drawn:
    """Pictures with questions that need none behind them."""
    seen = [(_any_kind(rng), _any_colour(rng)) for _ in range(3)]
    turns: list[Turn] = []
    for kind, colour in seen:
        turns += [(f"<image>Which colour is the {kind}?", colour), text_turns(rng)[0]]
    pictures = [_picture(rng, [shape], side=2) for shape in seen]
    return Drawn("text_between", pictures, turns[:-1], turns[-1:])


# ------------------------------------------------------------------------------------ one picture


def _counting(rng: np.random.Generator, degree: Any) -> Drawn:
    number = int(rng.integers(1, MOST + 1))
    shapes = [(_any_kind(rng), _any_colour(rng)) for _ in range(number)]
    return _after(
        "counting", [_picture(rng, shapes, side=3)], "<image>", [("How many shapes?", str(number))]
    )


def _spelling(rng: np.random.Generator, degree: Any) -> Drawn:
    """Capitals of 10 pixels in one row of three by three cells, each in one of its cell's four
    patches. In training also words that are shorter.
    """
    letters = SPELLED if degree is not None else int(rng.integers(1, SPELLED + 1))
    word = [pick(rng, LETTERS) for _ in range(letters)]
    image = Image.new("RGB", (3 * CELL, 3 * CELL), random_background(rng))
    draw, row = ImageDraw.Draw(image), int(rng.integers(3))
    for cell, letter in zip(Region(0, row * CELL, 3 * CELL, CELL).split(3, 1), word, strict=False):
        print_capital(rng, draw, letter, pick(rng, cell.split(2, 2)))
    return _after(
        "spelling", [(image, " ".join(word))], "<image>", [("Spell the word.", " ".join(word))]
    )


def _relation(rng: np.random.Generator, degree: Any) -> Drawn:
    """Two shapes in one row or one column of two by two cells."""
    side = pick(rng, SIDES)
    canvas = Canvas(rng, 2 * CELL, 2 * CELL)
    cells = canvas.region.split(2, 2)
    near, far = (1, 0) if side in ("right", "below") else (0, 1)
    line = int(rng.integers(2))
    places = [2 * line + i if side in SIDES[:2] else 2 * i + line for i in (near, far)]
    kinds = shuffled(rng, KINDS)[:2]
    words = [NOTHING] * len(cells)
    for kind, place in zip(kinds, places, strict=True):
        canvas.shape(kind, _any_colour(rng), cells[place])
        words[place] = kind
    question = f"Where is the {kinds[0]}, seen from the {kinds[1]}?"
    return _after(
        "relation",
        [(canvas.finish(), " ".join(words))],
        "<image>",
        [(question, f"{kinds[0]} {side}")],
    )


def _bars(rng: np.random.Generator, degree: Any) -> Drawn:
    """A bar chart: how high a bar is, or which bar has a place in the order."""
    colours = shuffled(rng, COLOURS)[:BARS]
    if (degree or pick(rng, ("value", "order"))) == "value":
        levels = random_levels(rng, BARS)
        asked = [
            (f"How high is the {colour} bar?", f"{colour} {level}")
            for colour, level in zip(colours, levels, strict=True)
        ]
        return _after("bars_value", [_chart(rng, colours, levels)], "<image>", shuffled(rng, asked))
    levels = random_levels(rng, BARS, distinct=True)
    ranked = [colours[i] for i in np.argsort(levels)[::-1]]
    asked = [(f"Which bar is the {o}?", c) for o, c in zip(ORDERS, ranked, strict=True)]
    # One alone: two answers would give the third away.
    chart = _chart(rng, colours, levels)
    return _after("bars_order", [chart], "<image>", [pick(rng, asked)])


def _chart(rng: np.random.Generator, colours: Sequence[str], levels: Sequence[int]) -> Seen:
    words = " ".join(f"{level} {c}" for c, level in zip(colours, levels, strict=True))
    return draw_bars(rng, colours, levels, (CHART[0] * CELL, CHART[1] * CELL)), words


# ----------------------------------------------------------------------------------- many frames


def _when(rng: np.random.Generator, degree: Any) -> Drawn:
    """A clip of one shape that changes its colour from frame to frame, each behind its time."""
    kind, colours = _any_kind(rng), shuffled(rng, COLOURS)[:FRAMES]
    frames = [_picture(rng, [(kind, colour)], side=1) for colour in colours]
    asked = [(f"When is it {c}?", f"{c} {at}") for c, at in zip(colours, NUMBERS, strict=False)]
    # One alone: what was answered cannot be the answer again.
    shown = "".join(f"{at} <image>" for at in NUMBERS[:FRAMES])
    return _after("when", frames, shown, [pick(rng, asked)])


def _stream(rng: np.random.Generator, degree: Any) -> Drawn:
    """A stream of frames, a few of which show a shape."""
    odds = np.array(list(LENGTHS.values())) / sum(LENGTHS.values())
    length = degree or int(rng.choice(list(LENGTHS), p=odds))
    shown = dict(
        zip(rng.permutation(length)[:NEEDLES].tolist(), shuffled(rng, KINDS), strict=False)
    )
    seen = {place: (kind, _any_colour(rng)) for place, kind in shown.items()}
    frames = [_picture(rng, [seen[i]], side=1) if i in seen else _empty(rng) for i in range(length)]
    questions = [(f"Which colour was the {k}?", f"{k} {colour}") for k, colour in seen.values()]
    name = "stream" if degree is None else f"stream_{length}"
    return _after(name, frames, "<image>" * length, questions)


FAMILIES = {
    "newest": Family(_newest),
    "earlier": Family(_earlier, BACK, share=3),
    "compare": Family(_compare),
    "counting": Family(_counting),
    "spelling": Family(_spelling, share=2),
    "relation": Family(_relation, share=3),
    "bars": Family(_bars, ("value", "order"), share=2),
    "text_between": Family(_text),
    "when": Family(_when, share=2),
    "stream": Family(_stream, STREAMS, share=2),
}

PRACTICE = {"recite": Family(_recite)}  # asks for no ability: what a text model begins with
TOO_LONG = [length for length in STREAMS if length > MOST_DESCRIBED]


# --------------------------------------------------------------------------------------- examples


def ability_example(
    seed: int,
    split: SplitName,
    families: Sequence[str],
    index: int,
    attempt: int = 0,
    described: bool = False,
) -> Example:
    """Sample `index` of a split; the families take turns, by their shares where they train, and by
    their degrees held out. Another `attempt` gives another sample of the same family and degree.

    :param described: words in brackets take the place of the pictures.
    """
    rng = generator(seed, split, index, attempt, purpose=3)
    known = FAMILIES | PRACTICE
    if split == "train":
        turns = [name for name in families for _ in range(known[name].share)]
        family, degree = known[turns[index % len(turns)]], None
    else:
        cases = [(known[name], d) for name in families for d in known[name].degrees]
        if described:
            cases = [case for case in cases if case[1] not in TOO_LONG]
        family, degree = cases[index % len(cases)]
    drawn = family.draw(rng, degree)
    while described and len(drawn.pictures) > MOST_DESCRIBED:
        drawn = family.draw(rng, degree)
    texts = (*drawn.history, *drawn.asked[: ASKED if split == "train" else 1])
    if not described:
        return Example(drawn.name, tuple(png(image, 1) for image, _ in drawn.pictures), texts)
    words = iter(drawn.pictures)
    texts = tuple(
        (re.sub("<image>", lambda _: f"[ {next(words)[1]} ] ", question), answer)
        for question, answer in texts
    )
    return Example(drawn.name, (), texts)


def ability_corpus() -> list[str]:
    """What these conversations say beside `synthetic_scenes.corpus`, for a tokenizer."""
    questions = [
        *(text for name in NAMES for text in (f"{name}: which colour?", *[name] * 20)),
        *(f"Where is the {a}, seen from the {b}?" for a in KINDS for b in KINDS if a != b),
        *(f"How high is the {colour} bar?" for colour in COLOURS),
        *(f"Which bar is the {order}?" for order in ORDERS),
        *(f"When is it {colour}?" for colour in COLOURS),
        *(f"Which colour was the {kind}?" for kind in KINDS),
    ]
    alone = [
        *SIDES,
        f"[ {NOTHING} ] [ {NOTHING} ]",
        "Which colours have",
        "How many shapes?",
        "Spell the word.",
        "Which colour is in both?",
    ]
    letters = [" ".join(LETTERS), *LETTERS]
    return [*questions, *(text for text in (*alone, *letters) for _ in range(20))]
