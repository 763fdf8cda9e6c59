"""What of a sample is trained, from the index alone: turns by rating, and what the budgets allow.

A conversation over budget loses trailing turns. The frames of a video shrink together until they
fit; below 64 image tokens a frame, frames are left out evenly instead. The plan asks for lengths,
and materialising asks again how a sample is cut: both get the same answer, since it depends on the
index, the budgets and the configuration alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from casa_train.data.plan import VIDEO
from casa_train.data.ratings import kept_images, kept_turns
from casa_train.data.sample import Sample, filter_turns, keep_images
from casa_train.data.shards import Split
from casa_train.modeling.image_processing_casa import (
    SIDE,
    CasaImageProcessor,
    ImageError,
    target_size,
)
from casa_train.modeling.processing_casa import CasaProcessor

LEAST_FRAME_TOKENS = 64
NEVER = np.iinfo(np.int32).max  # a length that fits no budget


@dataclass(frozen=True)
class Cut:
    """How a sample is shortened.

    :param turns: leading turns that stay, of those that their ratings left.
    :param images: of the images that those turns show, the positions that stay.
    :param max_pixels: upper bound on the pixels of each image.
    :param text_tokens: text tokens of what stays; :param image_tokens: its image tokens.
    """

    turns: int
    images: tuple[int, ...]
    max_pixels: int
    text_tokens: int
    image_tokens: int


class Fit:
    """Lengths of a split's samples under two budgets, and how each is cut.

    :param text_budget: text tokens of the largest sample; :param image_budget: its image tokens.
    :param ratings: the least rating of a turn, by name of the rating; see `sample.filter_turns`.
    """

    def __init__(
        self,
        split: Split,
        processor: CasaProcessor,
        text_budget: int,
        image_budget: int,
        ratings: Mapping[str, int] | None = None,
    ) -> None:
        self.split = split
        self.budgets = text_budget, image_budget
        self.ratings = dict(ratings or {})
        self.max_pixels = processor.max_pixels
        self.min_pixels = processor.min_pixels
        self.video = split.modality == VIDEO
        # Captions of a live video stand between its frames: without a frame two of them would
        # meet, and be other tokens than the index counted.
        self.frames_may_go = split.meta["schema"] != "live_whisperx"
        # The index has the turns; what opens a conversation and stands around images comes on top.
        self.base = processor.opening_tokens()
        self.per_image = len(processor.pre_image_tokens) + len(processor.post_image_tokens)

    def lengths(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Text and image tokens of every sample as it will be trained, two (samples,) int32 arrays.

        Samples of which nothing fits keep their whole length, so that a plan leaves them out; those
        without a turn have a length that fits nothing. An image that the image code will refuse
        counts no tokens: materialising skips its sample.

        :param count: only the first so many samples.
        :return: the arrays, and how many samples were `shortened` or left without a turn by
            `ratings`.
        """
        split = self.split
        user, offsets = split.list_column("user_tokens")
        answers, _ = split.list_column("assistant_tokens")
        widths, image_offsets = split.list_column("widths")
        heights, _ = split.list_column("heights")
        turns = np.ones(len(user), bool)
        shown = np.ones(len(widths), bool)
        if self.ratings:
            turns = kept_turns(split, self.ratings)
            shown = kept_images(split, turns)
        tokens = np.zeros(len(widths), np.int64)
        if len(widths):
            sizes, inverse = np.unique(np.stack([widths, heights], 1), axis=0, return_inverse=True)
            bounds = self.max_pixels, self.min_pixels
            each = np.array([image_tokens(int(w), int(h), *bounds) for w, h in sizes])
            tokens = each[inverse.ravel()]
        turn_counts, image_counts = (
            _segment_sums(kept, at) for kept, at in ((turns, offsets), (shown, image_offsets))
        )
        text = _segment_sums((user.astype(np.int64) + answers) * turns, offsets)
        text += self.base + self.per_image * image_counts
        images = _segment_sums(tokens * shown, image_offsets)
        text, images, turn_counts = (values[:count] for values in (text, images, turn_counts))
        empty = turn_counts == 0
        text[empty] = NEVER
        over = np.flatnonzero(((text > self.budgets[0]) | (images > self.budgets[1])) & ~empty)
        shortened = 0
        for row in over.tolist():
            cut = self.cut(row)
            if cut is not None:
                text[row], images[row] = cut.text_tokens, cut.image_tokens
                shortened += 1
        counts = {"shortened": shortened, "ratings": int(empty.sum())}
        return text.astype(np.int32), images.astype(np.int32), counts

    def cut(self, row: int) -> Cut | None:
        """How a sample is cut so that it fits; None where nothing of it does."""
        turns = self._turns(row)
        for count in range(len(turns), 0, -1):  # the longest beginning that fits
            sizes = [size for _, shown in turns[:count] for size in shown]
            fixed = self.base + sum(text for text, _ in turns[:count])
            fitted = self._fit_images(sizes, self.budgets[0] - fixed, spare=count == 1)
            if fitted is not None:
                kept, max_pixels = fitted
                tokens = sum(image_tokens(*sizes[i], max_pixels, self.min_pixels) for i in kept)
                return Cut(count, kept, max_pixels, fixed + self.per_image * len(kept), tokens)
        return None

    def apply(self, row: int, sample: Sample) -> tuple[Sample, int]:
        """The sample as it is trained, and the upper bound on the pixels of its images."""
        if self.ratings:
            sample = filter_turns(sample, self.ratings)
        cut = self.cut(row)
        if cut is None:
            return sample, self.max_pixels
        if cut.turns < len(sample.turns):
            sample = replace(sample, turns=sample.turns[: cut.turns])
        shown = [image for turn in sample.turns for image in turn.images]
        kept = [shown[position] for position in cut.images]
        if len(kept) < len(sample.images):
            sample = keep_images(sample, kept)
        return sample, cut.max_pixels

    def _fit_images(
        self, sizes: list[tuple[int, int]], room: int, spare: bool
    ) -> tuple[tuple[int, ...], int] | None:
        """Positions of the images that stay, and their bound on pixels; None: they do not fit.

        :param room: text tokens that are left for what stands around images.
        :param spare: frames may go for lack of text tokens, since no turn is left to go.
        """
        count, budget = len(sizes), self.budgets[1]
        if room < self.per_image * count:
            if not (self.video and spare and self.frames_may_go and room >= self.per_image):
                return None
            count = room // self.per_image
        whole = sum(image_tokens(*size, self.max_pixels, self.min_pixels) for size in sizes)
        if count == len(sizes) and whole <= budget:
            return tuple(range(count)), self.max_pixels
        if not self.video or budget < 1:
            return None
        if budget // count < LEAST_FRAME_TOKENS:
            count = max(1, budget // LEAST_FRAME_TOKENS)
        if count < len(sizes) and not self.frames_may_go:
            return None
        even = np.linspace(0, len(sizes) - 1, count).round().astype(int)
        each = min(self.max_pixels // SIDE**2, budget // count)
        return tuple(even.tolist()), each * SIDE**2

    def _turns(self, row: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each turn that its ratings leave: its text tokens and the sizes of its images."""
        split = self.split

        def values(name: str) -> list[int]:
            column, offsets = split.list_column(name)
            part: list[int] = column[offsets[row] : offsets[row + 1]].tolist()
            return part

        pairs = zip(values("user_tokens"), values("assistant_tokens"), strict=True)
        tokens = [user + assistant for user, assistant in pairs]
        shown: list[list[tuple[int, int]]] = [[] for _ in tokens]
        columns = (values(name) for name in ("image_turns", "widths", "heights"))
        for turn, width, height in zip(*columns, strict=True):
            shown[turn].append((width, height))
        keep = [True] * len(tokens)
        for name, least in self.ratings.items():
            rated, offsets = split.turn_ratings(name)
            own = rated[offsets[row] : offsets[row + 1]].tolist()
            keep = [k and not 0 < r < least for k, r in zip(keep, own, strict=True)]
        turns = []
        carried: list[tuple[int, int]] = []
        for kept, count, sizes in zip(keep, tokens, shown, strict=True):
            if not kept:
                carried += sizes
                continue
            turns.append((count, sizes or carried))
            carried = []
        return turns


def image_tokens(width: int, height: int, max_pixels: int, min_pixels: int) -> int:
    """Image tokens of a stored image, none if the image code will refuse it."""
    try:
        h, w = target_size(width, height, max_pixels, min_pixels)
    except ImageError:
        return 0
    return h * w // SIDE**2


def processor_for(processor: CasaProcessor, max_pixels: int) -> CasaImageProcessor:
    """The image code with another upper bound on pixels."""
    return processor.image_processor.at_most(max_pixels)


def _segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    sums: np.ndarray = total[offsets[1:]] - total[offsets[:-1]]
    return sums
