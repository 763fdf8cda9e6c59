"""Insertion points and lengths -> windows, positions and interleaving. Pure integer work.

A *window* is one image, or several consecutive images with no text between them, plus the text
after it up to the next image (CASA, arXiv 2512.19535, section 3). Text before the first image of a
sample belongs to no window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]  # start, stop
Grid = tuple[int, int]  # rows and columns of an image's tokens


@dataclass(frozen=True)
class Chunk:
    """The tokens of one sample that enter the model now: a whole sample, or the next piece of one.

    :param text: number of text tokens.
    :param points: for each image, the index of the text token it stands before (0..text), sorted.
    :param images: number of image tokens of each image.
    :param rows: rows of image tokens of each image; empty where nothing asks for them.
    :param follows: for each image whether it is a frame of the same video as the image before it;
        empty: none is.
    :param past_text: text tokens of this sample that entered earlier.
    :param past_span: positions that earlier images of this sample took (see `image_spans`).
    :raises ValueError: points out of range or unsorted, or not one of everything for each image.
    """

    text: int
    points: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    rows: tuple[int, ...] = ()
    follows: tuple[bool, ...] = ()
    past_text: int = 0
    past_span: int = 0

    def __post_init__(self) -> None:
        if len(self.points) != len(self.images):
            raise ValueError(
                f"{len(self.points)} insertion points {list(self.points)} but {len(self.images)} "
                "images: a sample needs exactly one insertion point for each image"
            )
        for name, values in (("rows", self.rows), ("follows", self.follows)):
            if values and len(values) != len(self.images):
                raise ValueError(
                    f"{len(values)} values of {name} but {len(self.images)} images: expected one "
                    "for each image, or none"
                )
        if self.follows and self.follows[0] and self.past_span == 0:
            raise ValueError(
                "the first image of a sample is marked as following a frame, but there is none "
                "before it"
            )
        if list(self.points) != sorted(self.points):
            raise ValueError(
                f"insertion points {list(self.points)} are not sorted: list images in the order in "
                "which they stand in the text"
            )
        if self.points and not 0 <= self.points[0] <= self.points[-1] <= self.text:
            raise ValueError(
                f"insertion points {list(self.points)} lie outside 0..{self.text}, the text tokens "
                "of the sample"
            )

    @classmethod
    def of_grids(
        cls,
        text: int,
        points: Sequence[int] = (),
        grids: Sequence[Grid] = (),
        follows: Sequence[bool] = (),
    ) -> Chunk:
        """A whole sample from the rows and columns of each image's tokens."""
        counts = tuple(rows * columns for rows, columns in grids)
        heights = tuple(rows for rows, _ in grids)
        return cls(text, tuple(points), counts, heights, tuple(follows) if any(follows) else ())

    @property
    def image_tokens(self) -> int:
        """Tokens of all images together."""
        return sum(self.images)

    @property
    def grids(self) -> list[Grid]:
        """Rows and columns of each image's tokens.

        :raises ValueError: a chunk without rows.
        """
        if len(self.rows) != len(self.images):
            raise ValueError(
                "multimodal RoPE needs the rows of every image, but this chunk has none: give "
                "Chunk(rows=...)"
            )
        return [(rows, tokens // rows) for rows, tokens in zip(self.rows, self.images, strict=True)]


@dataclass(frozen=True)
class Window:
    """A window in packed coordinates: token ranges over all samples of the batch.

    `continues` marks leading text of a chunk: it belongs to the window left open by earlier chunks,
    or to none if there is no such window. It has no image of its own. `follows`: the window's first
    image is a frame of the same video as the image before it.
    """

    sample: int
    text: Range
    image: Range
    continues: bool = False
    follows: bool = False


def split_windows(chunks: Sequence[Chunk]) -> list[Window]:
    """Cuts the packed text of all samples at their insertion points.

    Every text token and every image token lies in exactly one returned window, in order.
    """
    windows: list[Window] = []
    text_start = image_start = 0
    for sample, chunk in enumerate(chunks):
        tokens: dict[int, int] = {}  # by insertion point, of all images there
        follows: dict[int, bool] = {}  # of the first image there
        marks = chunk.follows or (False,) * len(chunk.images)
        for point, count, mark in zip(chunk.points, chunk.images, marks, strict=True):
            tokens[point] = tokens.get(point, 0) + count
            follows.setdefault(point, mark)
        cuts = list(tokens)
        first = cuts[0] if cuts else chunk.text
        if first > 0:
            leading = (text_start, text_start + first)
            windows.append(Window(sample, leading, (image_start, image_start), continues=True))
        image = image_start
        for cut, following in zip(cuts, [*cuts[1:], chunk.text], strict=False):
            text = (text_start + cut, text_start + following)
            stop = image + tokens[cut]
            windows.append(Window(sample, text, (image, stop), follows=follows[cut]))
            image = stop
        text_start += chunk.text
        image_start += chunk.image_tokens
    return windows


def has_pair(chunks: Sequence[Chunk]) -> bool:
    """Whether any window holds both an image token and a text token."""
    return any(
        w.image[0] < w.image[1] and w.text[0] < w.text[1]
        for w in split_windows(chunks)
        if not w.continues
    )


def image_spans(chunk: Chunk, multimodal: bool = False) -> list[int]:
    """How many positions each image takes where images advance positions.

    :param multimodal: Qwen2.5-VL's rule: the larger of rows and columns; otherwise its tokens.
    """
    if not multimodal:
        return list(chunk.images)
    return [max(grid) for grid in chunk.grids]


def text_positions(
    chunks: Sequence[Chunk], advance: bool = False, multimodal: bool = False
) -> np.ndarray:
    """Position of every text token, (T,) int64; with multimodal RoPE all three axes have it.

    :param advance: False counts text tokens only; True also counts the images before it, as token
        insertion does.
    """
    pieces = []
    for chunk in chunks:
        position = chunk.past_text + np.arange(chunk.text)
        if advance:
            position = position + chunk.past_span
            for point, span in zip(chunk.points, image_spans(chunk, multimodal), strict=True):
                position[point:] += span
        pieces.append(position)
    return _concatenate(pieces)


def image_positions(
    chunks: Sequence[Chunk], advance: bool = False, multimodal: bool = False
) -> np.ndarray:
    """Position of every image token, (N,) int64, or (3, N) for the axes of multimodal RoPE.

    An image starts at K, the number of text tokens before it.

    :param advance: True also counts the images before it, as token insertion does.
    :param multimodal: (start, start + row, start + column), as Qwen2.5-VL places still images;
        otherwise all tokens stand at the start, or with `advance` one after another.
    """
    pieces = []
    for chunk in chunks:
        before = chunk.past_span
        spans = image_spans(chunk, multimodal)
        grids = chunk.grids if multimodal else [(0, 0)] * len(spans)
        for point, tokens, span, (_, columns) in zip(
            chunk.points, chunk.images, spans, grids, strict=True
        ):
            start = chunk.past_text + point + (before if advance else 0)
            place = np.arange(tokens)
            if multimodal:
                axes = np.stack([0 * place, place // columns, place % columns])
                pieces.append(start + axes)
            else:
                pieces.append(start + (place if advance else 0 * place))
            before += span
    if multimodal:
        return np.concatenate([np.zeros((3, 0), np.int64), *pieces], axis=1).astype(np.int64)
    return _concatenate(pieces)


def interleave(chunks: Sequence[Chunk]) -> tuple[np.ndarray, list[int]]:
    """The order in which inserted image tokens and text tokens follow one another.

    :return: (S,) int64 indices into [all text tokens; all image tokens], and the stream tokens of
        each sample; S = T + N.
    """
    total_text = sum(chunk.text for chunk in chunks)
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    text_start, image_start = 0, total_text
    for chunk in chunks:
        done = 0
        for point, tokens in zip(chunk.points, chunk.images, strict=True):
            pieces.append(text_start + np.arange(done, point))
            pieces.append(image_start + np.arange(tokens))
            done = point
            image_start += tokens
        pieces.append(text_start + np.arange(done, chunk.text))
        text_start += chunk.text
        lengths.append(chunk.text + chunk.image_tokens)
    return _concatenate(pieces), lengths


def _concatenate(pieces: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
