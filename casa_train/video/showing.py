"""What a player shows at a moment: the last picture that begins by then, upright."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from PIL import Image

EXACT = 1e-4
"""Seconds by which a picture may begin after a moment and still be shown at it: clocks of
containers count in steps that no decimal fraction meets."""

MAX_PIXELS = 504 * 504
"""Most pixels of a frame, as the recipes store it; decoded pictures are made smaller at once."""

Picture = TypeVar("Picture")


def moments(start: float, fps: float, end: float = math.inf) -> Iterator[float]:
    """The seconds `start`, `start + 1/fps`, ... before `end`, for ever where that is infinite."""
    for number in itertools.count():
        moment = round(start + number / fps, 6)
        if moment >= end - EXACT:
            return
        yield moment


def shown_at(
    pictures: Iterable[tuple[float, Picture]], moments: Iterable[float]
) -> Iterator[tuple[float, Picture]]:
    """(moment, the picture on the screen) for each moment.

    :param pictures: (second at which it begins, picture), in order; the last one only ends the one
        before it. A moment before the first picture waits for it.
    :param moments: seconds, increasing.
    """
    shown: list[Picture] = []
    wanted = iter(moments)
    moment = next(wanted, None)
    for begins, picture in pictures:
        while shown and moment is not None and moment < begins - EXACT:
            yield moment, shown[0]
            moment = next(wanted, None)
        if moment is None:
            return
        shown = [picture]


def fitting(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Width and height in whole pixels, of the same shape and at most `max_pixels`.

    :raises ValueError: a picture without pixels.
    """
    if width < 1 or height < 1:
        raise ValueError(f"a frame of {width}x{height} pixels")
    scale = min(1.0, math.sqrt(max_pixels / (width * height)))
    return max(1, math.floor(width * scale)), max(1, math.floor(height * scale))


def upright(frame: Any, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A decoded picture as RGB, turned as its display matrix says.

    It is scaled while it is converted, so that a large one is never held as RGB.

    :param frame: av.VideoFrame.
    :raises ValueError: a picture without pixels.
    """
    width, height = fitting(frame.width, frame.height, max_pixels)
    image: Image.Image = frame.to_image(width=width, height=height, interpolation="BICUBIC")
    if rotation := getattr(frame, "rotation", 0):
        image = image.rotate(rotation, expand=True)
    return image
