"""What a field's value may be, written beside the field: bounds of numbers, places of files.

`Annotated[int, Bound(...)]`, `Annotated[str, Choice(...)]` and `Annotated[str, Place(...)]` stand
in the dataclasses of the configuration; `checks.py` reads them in one loop. What else stands there
is in `resume_marks.py`.
"""

from __future__ import annotations

import functools
import math
import os
import re
import types
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

# Counts end up in 32-bit index tensors and in tables of 64-bit numbers that multiply them.
MOST_COUNT = 2**31 - 1
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Bound:
    """The finite numbers from `least` to `most`.

    :param words: what is expected, for messages.
    :param open_least: `least` itself is not among them; `open_most` says so of `most`.
    """

    least: float
    most: float = math.inf
    words: str = ""
    open_least: bool = False
    open_most: bool = False

    def refusal(self, name: str, value: Any) -> str | None:
        """What was expected instead of this value; None where it is one of the numbers."""
        if not math.isfinite(value):
            return f"{self.words}, and finite"
        if value < self.least or (self.open_least and value == self.least):
            return self.words
        if value > self.most or (self.open_most and value == self.most):
            return f"{self.words}, and at most {self.most:,}" if self.most >= 1e3 else self.words
        return None


@dataclass(frozen=True)
class Sizes:
    """Numbers of a free-form section by name; of others only that they are finite.

    What is no number is not looked at.
    """

    numbers: Mapping[str, Bound]

    def refusal(self, name: str, value: Any) -> str | None:
        """What was expected instead of this value; `name` ends with its name in the section."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        bound = self.numbers.get(name.rpartition(".")[2], Bound(-math.inf, words="a number"))
        return bound.refusal(name, value)


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    words: tuple[str, ...]

    def __init__(self, *words: str) -> None:
        object.__setattr__(self, "words", words)

    def refusal(self, name: str, value: Any) -> str | None:
        """What was expected instead of this value; None where it is one of the words."""
        if value in self.words:
            return None
        return f"{', '.join(self.words[:-1])} or {self.words[-1]}"


@dataclass(frozen=True)
class Switch:
    """true, false, or the word of a third way."""

    word: str

    def refusal(self, name: str, value: Any) -> str | None:
        """What was expected instead of this value; None where it is one of the three."""
        known = isinstance(value, bool) or value == self.word
        return None if known else f"true, false or {self.word}"


PositiveInt = Annotated[int, Bound(1, MOST_COUNT, "at least 1")]
NonNegativeInt = Annotated[int, Bound(0, MOST_COUNT, "0 or more")]
PositiveFloat = Annotated[float, Bound(0, words="a positive number", open_least=True)]
NonNegativeFloat = Annotated[float, Bound(0, words="0 or more")]
Share = Annotated[float, Bound(0, 1, "a share 0..1")]


@dataclass(frozen=True)
class Place:
    """A path on a disk of this machine: `~` is expanded, a URL refused.

    :param hub: whether a hub id may stand there, too.
    """

    hub: bool = False

    def resolve(self, name: str, value: str) -> str:
        """The path without `~`.

        :raises ValueError: saying what was found and expected.
        """
        expected = "a directory or a hub id" if self.hub else "a path"
        if URL.search(value):
            raise ValueError(
                f"{name} is {value!r}, a URL; expected {expected}: what lies there is read and "
                "written as plain files. Copy or mount it"
            )
        expanded = os.path.expanduser(value)
        if expanded.startswith("~") and expanded == value:
            raise ValueError(
                f"{name} is {value!r}, but there is no such home directory; expected {expected}. "
                f"Write it in full, or ./{value} for a folder of that name"
            )
        return expanded


LocalPath = Annotated[str, Place()]
PathOrHubId = Annotated[str, Place(hub=True)]


def local_path(value: str) -> Path:
    """The type of a command's argument that is a path: `~` is expanded, a URL refused.

    :raises ArgumentTypeError: for argparse to print behind the argument's name.
    """
    return Path(_argument(value, Place()))


def path_or_hub_id(value: str) -> str:
    """As `local_path`, where a hub id may stand, too."""
    return _argument(value, Place(hub=True))


def whole_from(least: int) -> Callable[[str], int]:
    """The type of a command's argument that is a whole number from `least` on."""

    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ArgumentTypeError(f"it is {text!r}; expected a whole number from {least} on")
        return int(text)

    return whole


def _argument(value: str, place: Place) -> str:
    try:
        return place.resolve("it", value)
    except ValueError as error:
        raise ArgumentTypeError(f"{error}.") from error


Kind = Bound | Sizes | Choice | Switch | Place


@dataclass(frozen=True)
class Resume:
    """A mark of `resume_marks.py`.

    :param why: the reason, for messages.
    """

    why: str


@dataclass(frozen=True)
class Leaf:
    """One field, or the entries of one dict or list.

    :param path: names from the root; "*" stands for every key of a dict or item of a list.
    :param type: int, float, str, bool or Any.
    :param kind: what it may be.
    :param resume: the mark beside it or beside a section that it lies in; :param marked: the path
        that this stands beside.
    """

    path: tuple[str, ...]
    type: Any
    kind: Kind | None = None
    resume: Resume | None = None
    marked: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ".".join(self.path)


@functools.cache
def leaves(root: type) -> tuple[Leaf, ...]:
    """Every field below a dataclass, in the order in which they are written."""
    return tuple(_leaves(Leaf((), root)))


def _leaves(at: Leaf) -> Iterator[Leaf]:
    """:param at: what was passed on the way: of kinds the inmost holds, of marks the outmost."""
    origin, arguments = get_origin(at.type), get_args(at.type)
    if origin is Annotated:
        for note in arguments[1:]:
            if isinstance(note, Kind):
                at = replace(at, kind=note)
            elif isinstance(note, Resume) and at.resume is None:
                at = replace(at, resume=note, marked=at.path)
        yield from _leaves(replace(at, type=arguments[0]))
    elif origin in (Union, types.UnionType):
        for argument in arguments:
            if argument is not type(None):
                yield from _leaves(replace(at, type=argument))
    elif origin in (dict, list):
        yield from _leaves(replace(at, path=(*at.path, "*"), type=arguments[-1]))
    elif is_dataclass(at.type):
        hints = get_type_hints(at.type, include_extras=True)
        for field in fields(at.type):
            yield from _leaves(replace(at, path=(*at.path, field.name), type=hints[field.name]))
    else:
        yield at


@dataclass(frozen=True)
class FieldValue:
    """A value of a configuration, and how to set another in its place."""

    name: str
    value: Any
    set: Callable[[Any], None]


def values(root: Any, path: tuple[str, ...], name: str = "") -> Iterator[FieldValue]:
    """Every value that stands at the path of a leaf.

    :param root: dataclasses, dicts and lists; what is absent or null has no values.
    """
    head, *rest = path
    if isinstance(root, dict):
        found = [
            (str(key), root[key], functools.partial(root.__setitem__, key))
            for key in (root if head == "*" else [head] if head in root else [])
        ]
    elif isinstance(root, list):
        found = [
            (str(i), root[i], functools.partial(root.__setitem__, i)) for i in range(len(root))
        ]
    elif is_dataclass(root):
        found = [(head, getattr(root, head), functools.partial(setattr, root, head))]
    else:
        found = []
    for key, value, put in found:
        inner = f"{name}.{key}" if name else key
        if value is None:
            continue
        if rest:
            yield from values(value, tuple(rest), inner)
        else:
            yield FieldValue(inner, value, put)
