"""Short films of one shape that comes, moves, changes and goes, and what can be said about them.

Film i of a split is a pure function of (seed, split, i). There is one shape at a time, so that the
last words of a caption tell what was on the screen: what is due is what the newest frame shows
beyond that. A moment of 2 frames a second lies between any two events, and an event lies between
moments: each of its states is seen, and its words have ended when it is seen first.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_recipes.synthetic_drawing import (
    COLOURS,
    KINDS,
    POLYGONS,
    Rgb,
    paint,
    pick,
    random_background,
)
from data_recipes.synthetic_scenes import SPLITS, SplitName

FPS = 5  # more than the 2 that are sampled, and no multiple of it
SECONDS = (12, 20)
LEAST_GAP = 3  # video frames between two events: 0.6 seconds, so that a moment lies between
USUAL_GAP = (LEAST_GAP, 9)
QUIET_GAP = (20, 30)  # 4 to 6 seconds
QUIET_SHARE = 0.25  # of films with a long silence
START = 0.01, 0.04  # seconds behind an event at which its words begin, and how long each lasts
GONE = "gone"
MOST_SHAPES = 4
SIDE = (0.72, 0.9)  # of a shape, as a share of a quarter's
SPEED = 0.03  # of a shape at most, in pictures' sides a video frame
HOPS = 0.15  # chance of one, a video frame
SUPERSAMPLED = 4

COLOUR_FORM, SHAPE_FORM = "Which colour came {which}?", "Which shape came {which}?"
COUNT_FORM = "How many shapes came?"
ENDS = ("first", "last")
PROMPT = "Describe the video while it plays."  # as the captioner asks


@dataclass(frozen=True)
class State:
    """What is on the screen."""

    kind: str
    colour: str


@dataclass(frozen=True)
class Event:
    """From video frame `frame` on, `state` is shown; `words` say what is new about it."""

    frame: int
    state: State | None
    words: tuple[str, ...]

    @property
    def time(self) -> float:
        return self.frame / FPS

    def timed(self) -> list[list[Any]]:
        """(start, end, word) in seconds, right behind the event and before the next moment."""
        first, length = START
        starts = [round(self.time + first + i * length, 3) for i in range(len(self.words) + 1)]
        return [[*pair, w] for pair, w in zip(itertools.pairwise(starts), self.words, strict=True)]


@dataclass(frozen=True)
class Film:
    """A film as a plan: its events, and all that its pictures depend on.

    :param frames: video frames.
    :param look: seeds background, places and shades.
    """

    frames: int
    events: tuple[Event, ...]
    look: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.frames / FPS

    def words(self) -> list[list[Any]]:
        """(start, end, word) of all its words, in order."""
        return [word for event in self.events for word in event.timed()]

    def questions(self) -> list[tuple[str, str]]:
        """Questions and answers about the whole film, in a fixed order."""
        states = [event.state for event in self.events if event.state]
        shapes = sum(len(event.words) == 2 for event in self.events)
        found = []
        for which, state in zip(ENDS, (states[0], states[-1]), strict=True):
            found.append((COLOUR_FORM.replace("{which}", which), state.colour))
            found.append((SHAPE_FORM.replace("{which}", which), state.kind))
        return [*found, (COUNT_FORM, str(shapes))]


def film(seed: int, split: SplitName, index: int) -> Film:
    """Film `index` of a split."""
    key = (SPLITS.index(split), 2, index)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))
    frames = FPS * int(rng.integers(SECONDS[0], SECONDS[1] + 1))
    shapes = int(rng.integers(1, MOST_SHAPES + 1))
    times = _times(rng, frames)
    while len(times) < 2 * shapes - 1:  # each comes, all but the last go
        times = _times(rng, frames)
    return Film(frames, tuple(_events(rng, times, shapes)), (seed, *key))


def _times(rng: np.random.Generator, frames: int) -> list[int]:
    """Video frames of events: none at a whole second, where a moment would be."""
    quiet = rng.random() < QUIET_SHARE
    long_at = int(rng.integers(1, 5)) if quiet else -1
    times: list[int] = []
    at = int(rng.integers(2, 6))
    while at < frames - 2:
        if at % FPS:
            times.append(at)
            low, high = QUIET_GAP if len(times) == long_at else USUAL_GAP
            at += int(rng.integers(low, high + 1))
        else:
            at += 1
    return times


def _events(rng: np.random.Generator, times: Sequence[int], shapes: int) -> Iterator[Event]:
    """At each time a shape comes, changes or goes; `shapes` of them come."""
    spare = len(times) - (2 * shapes - 1)
    last_goes = spare > 0 and rng.random() < 0.5
    changes = rng.multinomial(spare - last_goes, [1 / shapes] * shapes).tolist()
    steps = [step for n in changes for step in ("come", *["change"] * n, "go")]
    state: State | None = None
    words: tuple[str, ...]
    # Without the last shape's going there is one step more than there are times.
    for time, step in zip(times, steps, strict=False):
        if step == "go":
            state, words = None, (GONE,)
        elif state is None:
            state = State(pick(rng, list(KINDS)), pick(rng, list(COLOURS)))
            words = state.colour, state.kind
        elif rng.random() < 0.5:
            state = replace(state, colour=_other(rng, COLOURS, state.colour))
            words = (state.colour,)
        else:
            state = replace(state, kind=_other(rng, KINDS, state.kind))
            words = (state.kind,)
        yield Event(time, state, words)


def _other(rng: np.random.Generator, options: Iterable[str], than: str) -> str:
    return pick(rng, [option for option in options if option != than])


# ---------------------------------------------------------------------------------------- pictures


def pictures(plan: Film, side: int) -> Iterator[Image.Image]:
    """The video frames of a film, in order: RGB, side x side pixels."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([*plan.look, 1])))
    background = Image.new("RGB", (side, side), random_background(rng))
    starts = {event.frame: event for event in plan.events}
    state: State | None = None
    ink: Rgb = (0, 0, 0)
    path = _Path(rng, side)
    for frame in range(plan.frames):
        if event := starts.get(frame):
            if state is None:
                path = _Path(rng, side)
            if event.state and (state is None or state.colour != event.state.colour):
                ink = paint(rng, event.state.colour)
            state = event.state
        picture = background.copy()
        if state is not None:
            picture.paste(ink, path.place(), _mask(state.kind, path.size))
        yield picture
        path.move()


class _Path:
    """A shape on its way: it drifts in a quarter of the picture, and hops to another now and then.

    In a quarter, because a tiny vision tower learns shapes soonest where an image token sees one.

    :param side: pixels of the picture.
    """

    def __init__(self, rng: np.random.Generator, side: int) -> None:
        self._rng, self._quarter = rng, side / 2
        self.size = round(self._quarter * rng.uniform(*SIDE))
        self._room = self._quarter - self.size
        self._corner = rng.integers(2, size=2)
        self._at = rng.random(2) * self._room
        self._speed = rng.uniform(-SPEED, SPEED, 2) * side

    def place(self) -> tuple[int, int]:
        """Left and top, in pixels."""
        left, top = np.rint(self._corner * self._quarter + self._at).astype(int).tolist()
        return left, top

    def move(self) -> None:
        """One video frame further."""
        if self._rng.random() < HOPS:
            axis = int(self._rng.integers(2))
            self._corner[axis] = 1 - self._corner[axis]
        self._at += self._speed
        outside = (self._at < 0) | (self._at > self._room)
        self._speed[outside] *= -1
        self._at = np.clip(self._at, 0, self._room)


@lru_cache(maxsize=256)
def _mask(kind: str, size: int) -> Image.Image:
    """A shape with smooth edges: (size, size), 255 inside."""
    large = size * SUPERSAMPLED
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if kind == "circle":
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    else:
        draw.polygon([(x * large, y * large) for x, y in POLYGONS[kind]], fill=255)
    return mask.reduce(SUPERSAMPLED)


def texts() -> list[str]:
    """What is said in films and about them, for a tokenizer to learn from."""
    forms = (COLOUR_FORM, SHAPE_FORM, COUNT_FORM)
    asked = [form.replace("{which}", which) for form in forms for which in ENDS]
    words = [f" {word}" for word in (*COLOURS, *KINDS, GONE)]
    return [PROMPT, *asked, *(word for word in words for _ in range(20))]
