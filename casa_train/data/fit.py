"""What of a sample is trained, from the index alone: turns by rating, and what the budgets allow.

A conversation over budget loses trailing turns. The frames of a video shrink together until they
fit; below 64 image tokens a frame, frames are left out evenly instead, and of live captions, which
stand between their frames, the last ones with their text. The plan asks for lengths, and
materialising asks again how a sample is cut: both get the same answer, since it depends on the
index, the budgets and the configuration alone. `Fit.cut` says how one sample is cut; `Fit.lengths`
knows the outcome for all of them, in arrays: millions of samples take seconds.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from casa_train.data.budget import Budget
from casa_train.data.image_lengths import image_tokens, token_counts
from casa_train.data.prepared.plan import VIDEO
from casa_train.data.prepared.ratings import carry_images, kept_images, kept_turns
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import Sample, cut_answer, filter_turns, keep_images
from casa_train.data.schemas.video_rows import LIVE
from casa_train.modeling.image_processing_casa import CasaImageProcessor
from casa_train.modeling.processing_casa import CasaProcessor

LEAST_FRAME_TOKENS = 64
ROWS = 1 << 15  # samples that are cut at once: what a cache holds
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

    :param budget: of the largest sample.
    :param ratings: the least rating of a turn, by name of the rating; see `sample.filter_turns`.
    """

    def __init__(
        self,
        split: Split,
        processor: CasaProcessor,
        budget: Budget,
        ratings: Mapping[str, int] | None = None,
    ) -> None:
        self.split = split
        self.budget = budget
        self.ratings = dict(ratings or {})
        self.max_pixels = processor.max_pixels
        self.min_pixels = processor.min_pixels
        self.side = processor.token_side
        self.video = split.modality == VIDEO
        # Captions of a live video stand between its frames: without one of them two captions would
        # meet, which nobody said at once, so only its last frames may go, with their captions.
        self.live = split.meta["schema"] == LIVE
        # The index has the turns; what opens a conversation and stands around images comes on top.
        self.base = processor.opening_tokens()
        self.per_image = len(processor.pre_image_tokens) + len(processor.post_image_tokens)

    def lengths(self, count: int | None = None) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """Text and image tokens of every sample as it will be trained, two (samples,) int32 arrays.

        Samples of which nothing fits keep their whole length, so that a plan leaves them out; those
        without a turn have a length that fits nothing. An image that the image code will refuse
        counts no tokens: materialising skips its sample.

        :param count: only the first so many samples.
        :return: the arrays, and how many samples were `shortened`, left without a turn
            (`rated_out`), or not cut because the index lacks their captions (`without_captions`).
        """
        split = self.split
        user, offsets = split.list_column("user_tokens")
        answers, _ = split.list_column("assistant_tokens")
        widths, image_offsets = split.list_column("widths")
        heights, _ = split.list_column("heights")
        tokens = token_counts(widths, heights, self.max_pixels, self.min_pixels, self.side)
        words = np.add(user, answers, dtype=np.int64)
        turns, shown = None, tokens
        turn_counts, image_counts = np.diff(offsets), np.diff(image_offsets)
        if self.ratings:
            turns = kept_turns(split, self.ratings)
            kept = kept_images(split, turns)
            words, shown = words * turns, tokens * kept
            turn_counts = _segment_sums(turns, offsets)
            image_counts = _segment_sums(kept, image_offsets)
        text = _segment_sums(words, offsets) + (self.base + self.per_image * image_counts)
        images = _segment_sums(shown, image_offsets)
        text, images, turn_counts = (values[:count] for values in (text, images, turn_counts))
        empty = turn_counts == 0
        text[empty] = NEVER
        over = np.flatnonzero(~self.budget.holds(text, images) & ~empty)
        shortened = unknown = 0
        for start in range(0, len(over), ROWS):
            rows = over[start : start + ROWS]
            fitted, cut_text, cut_images = self._cut_lengths(rows, words, turns, tokens)
            text[rows[fitted]], images[rows[fitted]] = cut_text[fitted], cut_images[fitted]
            shortened += int(fitted.sum())
            unknown += int((~fitted & ~self._has_captions(rows)).sum()) if self.live else 0
        counts = {"shortened": shortened, "rated_out": int(empty.sum())}
        counts["without_captions"] = unknown
        return text.astype(np.int32), images.astype(np.int32), counts

    def cut(self, row: int) -> Cut | None:
        """How a sample is cut so that it fits; None where nothing of it does."""
        turns = self._turns(row)
        for count in range(len(turns), 0, -1):  # the longest beginning that fits
            sizes = [size for _, shown in turns[:count] for size in shown]
            fixed = self.base + sum(text for text, _ in turns[:count])
            fitted = self._fit_images(sizes, self.budget.text - fixed, spare=count == 1)
            if fitted is not None:
                kept, max_pixels = fitted
                tokens = sum(self._image_tokens(*sizes[i], max_pixels) for i in kept)
                return Cut(count, kept, max_pixels, fixed + self.per_image * len(kept), tokens)
        return self._cut_answer(row, turns)

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
            live = sample.is_live
            sample = cut_answer(sample, len(kept)) if live else keep_images(sample, kept)
        return sample, cut.max_pixels

    def _cut_lengths(
        self, rows: np.ndarray, words: np.ndarray, turns: np.ndarray | None, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which samples `cut` makes fit, and their text and image tokens then: three arrays.

        :param rows: samples with at least one turn that their ratings leave.
        :param words: (turns,) text tokens of all turns of the split, 0 of those that are dropped.
        :param turns: (turns,) bool, those that are kept; None: all of them.
        :param tokens: (images,) tokens of all images of the split.
        """
        offsets = self.split.list_column("user_tokens")[1]
        shown_in, image_offsets = self.split.list_column("image_turns")
        # From here on turns and images are those of the rows alone, one row after the other.
        at, firsts, counts = _ragged(offsets, rows)
        text, kept = words[at], np.ones(len(at), bool) if turns is None else turns[at]
        images_at, _, image_counts = _ragged(image_offsets, rows)
        turn = shown_in[images_at] + np.repeat(firsts, image_counts)
        order = np.argsort(turn, kind="stable")  # as the turns show them
        images_at, turn = images_at[order], turn[order]
        if turns is not None:
            turn, shown = carry_images(turn, kept, np.repeat(firsts + counts, image_counts))
            images_at, turn = images_at[shown], turn[shown]
        numbers = np.bincount(turn, minlength=len(at))
        whole = np.bincount(turn, tokens[images_at], len(at)).astype(np.int64)
        first_images = np.cumsum(numbers)[firsts] - numbers[firsts]
        # Of the beginning of a row that ends with a turn: text, number and tokens of its images.
        fixed, number, whole = (
            _sums_within(values, firsts, counts) for values in (text, numbers, whole)
        )
        fixed += self.base
        only = kept & (_sums_within(kept, firsts, counts) == 1)
        possible, frames, shrunk = self._fit_many(number, whole, self.budget.text - fixed, only)
        # The longest beginning that fits.
        last = np.maximum.reduceat(np.where(possible & kept, np.arange(len(at)), -1), firsts)
        fitted = last >= 0
        last = np.maximum(last, 0)
        cut_text, cut_images = fixed[last] + self.per_image * frames[last], whole[last]
        smaller = np.flatnonzero(fitted & shrunk[last])
        if len(smaller):
            ends = last[smaller]
            cut_images[smaller] = self._shrunk_tokens(
                images_at, first_images[smaller], number[ends], frames[ends]
            )
        if self.live:
            left = np.flatnonzero(~fitted & self._has_captions(rows))
            if len(left):
                parts = self._cut_answers(rows[left], words, tokens)
                fitted[left], cut_text[left], cut_images[left] = parts
        return fitted, cut_text, cut_images

    def _has_captions(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) bool, which live samples the index knows well enough to cut them."""
        columns = ("user_tokens", "widths", "caption_tokens")
        offsets = [self.split.list_column(name)[1] for name in columns]
        turns, frames, captions = (at[rows + 1] - at[rows] for at in offsets)
        known: np.ndarray = (turns == 1) & (frames > 0) & (captions == frames)
        return known

    def _cut_answers(
        self, rows: np.ndarray, words: np.ndarray, tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`_cut_answer` of many live samples at once, for `_cut_lengths`.

        :param rows: samples that have captions.
        """
        captions, offsets = self.split.list_column("caption_tokens")
        at, firsts, counts = _ragged(offsets, rows)
        images_at = _ragged(self.split.list_column("widths")[1], rows)[0]
        number = np.arange(len(at)) - np.repeat(firsts, counts) + 1
        # Of the beginning of a row that ends with a frame: its text, and tokens of its frames.
        said = _sums_within(captions[at], firsts, counts)
        turn = words[self.split.list_column("user_tokens")[1][rows]]
        before = self.base + turn - said[firsts + counts - 1]
        text = np.repeat(before, counts) + said + self.per_image * number
        whole = _sums_within(tokens[images_at], firsts, counts)
        budget = self.budget.images
        shrunk = whole > budget
        most = max(1, budget // LEAST_FRAME_TOKENS) if budget else 0  # frames that shrink
        possible = (text <= self.budget.text) & (~shrunk | (number <= most))
        last = np.maximum.reduceat(np.where(possible, np.arange(len(at)), -1), firsts)
        fitted = last >= 0
        last = np.maximum(last, 0)
        cut_images = whole[last]
        smaller = np.flatnonzero(fitted & shrunk[last])
        if len(smaller):
            frames = number[last[smaller]]
            cut_images[smaller] = self._shrunk_tokens(images_at, firsts[smaller], frames, frames)
        return fitted, text[last], cut_images

    def _fit_many(
        self, number: np.ndarray, whole: np.ndarray, room: np.ndarray, only: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`_fit_images` of many beginnings of conversations at once.

        :param number: of images; :param whole: their tokens; :param room: text tokens left for
            what stands around them; :param only: whether the beginning has one turn.
        :return: whether they can be made fit, how many images stay, and whether they are shrunk.
        """
        budget = self.budget.images
        possible = room >= self.per_image * number
        frames = number
        if self.video and not self.live and self.per_image:
            spare = ~possible & only & (room >= self.per_image)
            frames = np.where(spare, room // self.per_image, number)
            possible = possible | spare
        fit = (frames == number) & (whole <= budget)
        if not self.video or budget < 1:
            return possible & fit, frames, ~fit
        thinned = budget // np.maximum(frames, 1) < LEAST_FRAME_TOKENS
        frames = np.where(thinned & ~fit, max(1, budget // LEAST_FRAME_TOKENS), frames)
        if self.live:
            possible = possible & (frames == number)
        return possible, frames, ~fit

    def _shrunk_tokens(
        self, images_at: np.ndarray, firsts: np.ndarray, number: np.ndarray, frames: np.ndarray
    ) -> np.ndarray:
        """(rows,) image tokens of videos whose frames are shrunk together.

        :param images_at: images of all rows; :param firsts: (rows,) where there those of a row
            begin; :param number: (rows,) how many they are; :param frames: (rows,) how many stay.
        """
        row = np.repeat(np.arange(len(frames)), frames)
        place = np.arange(len(row)) - np.repeat(np.cumsum(frames) - frames, frames)
        # As np.linspace(0, number - 1, frames) places them.
        step = (number - 1) / np.maximum(frames - 1, 1)
        even = np.rint(place * step[row]).astype(np.int64)
        final = (place == frames[row] - 1) & (place > 0)
        even[final] = number[row[final]] - 1
        at = images_at[firsts[row] + even]
        each = np.minimum(self.max_pixels // self.side**2, self.budget.images // frames)
        widths, heights = (self.split.list_column(name)[0][at] for name in ("widths", "heights"))
        limits = each * self.side**2
        tokens = token_counts(widths, heights, limits[row], self.min_pixels, self.side)
        return np.bincount(row, tokens, len(frames)).astype(np.int64)

    def _cut_answer(self, row: int, turns: list[tuple[int, list[tuple[int, int]]]]) -> Cut | None:
        """The longest beginning of a live sample that fits and ends with a frame's text.

        Frames that stay shrink together as those of other videos do.
        """
        if not self.live or not turns or not self._has_captions(np.array([row])).all():
            return None
        ((words, sizes),) = turns
        captions = self._values("caption_tokens", row)

        def fit(frames: int) -> tuple[int, tuple[tuple[int, ...], int] | None]:
            fixed = self.base + words - sum(captions[frames:])
            room = self.budget.text - fixed
            return fixed, self._fit_images(sizes[:frames], room, spare=False)

        # With every frame a beginning has more text and less room for each, so they are bisected.
        frames = bisect_left(range(1, len(sizes) + 1), True, key=lambda n: fit(n)[1] is None)
        if not frames:
            return None
        fixed, fitted = fit(frames)
        assert fitted is not None
        kept, max_pixels = fitted
        tokens = sum(self._image_tokens(*sizes[i], max_pixels) for i in kept)
        return Cut(1, kept, max_pixels, fixed + self.per_image * frames, tokens)

    def _fit_images(
        self, sizes: list[tuple[int, int]], room: int, spare: bool
    ) -> tuple[tuple[int, ...], int] | None:
        """Positions of the images that stay, and their bound on pixels; None: they do not fit.

        :param room: text tokens that are left for what stands around images.
        :param spare: frames may go for lack of text tokens, since no turn is left to go.
        """
        count, budget = len(sizes), self.budget.images
        if room < self.per_image * count:
            if not (self.video and spare and not self.live and room >= self.per_image):
                return None
            count = room // self.per_image
        whole = sum(self._image_tokens(*size, self.max_pixels) for size in sizes)
        if count == len(sizes) and whole <= budget:
            return tuple(range(count)), self.max_pixels
        if not self.video or budget < 1:
            return None
        if budget // count < LEAST_FRAME_TOKENS:
            count = max(1, budget // LEAST_FRAME_TOKENS)
        if count < len(sizes) and self.live:
            return None
        even = np.linspace(0, len(sizes) - 1, count).round().astype(int)
        each = min(self.max_pixels // self.side**2, budget // count)
        return tuple(even.tolist()), each * self.side**2

    def _image_tokens(self, width: int, height: int, max_pixels: int) -> int:
        return image_tokens(width, height, max_pixels, self.min_pixels, self.side)

    def _turns(self, row: int) -> list[tuple[int, list[tuple[int, int]]]]:
        """For each turn that its ratings leave: its text tokens and the sizes of its images."""
        user, assistant = (self._values(name, row) for name in ("user_tokens", "assistant_tokens"))
        tokens = [sum(pair) for pair in zip(user, assistant, strict=True)]
        shown: list[list[tuple[int, int]]] = [[] for _ in tokens]
        columns = (self._values(name, row) for name in ("image_turns", "widths", "heights"))
        for turn, width, height in zip(*columns, strict=True):
            shown[turn].append((width, height))
        keep = [True] * len(tokens)
        for name, least in self.ratings.items():
            rated, offsets = self.split.turn_ratings(name)
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

    def _values(self, name: str, row: int) -> list[int]:
        column, offsets = self.split.list_column(name)
        part: list[int] = column[offsets[row] : offsets[row + 1]].tolist()
        return part


def processor_for(processor: CasaProcessor, max_pixels: int) -> CasaImageProcessor:
    """The image code with another upper bound on pixels."""
    return processor.image_processor.at_most(max_pixels)


def _segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Sums of values[offsets[i]:offsets[i + 1]], int64."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    sums: np.ndarray = np.diff(total[offsets])
    return sums


def _ragged(offsets: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the values of some rows lie, one row after the other.

    :return: (values,) positions; and (rows,) where each row begins among them and how many it has.
    """
    begins = offsets[rows].astype(np.int64)
    counts = offsets[rows + 1] - begins
    firsts = np.cumsum(counts) - counts
    at = np.arange(int(counts.sum())) + np.repeat(begins - firsts, counts)
    return at, firsts, counts


def _sums_within(values: np.ndarray, firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """For each value the sum of its row up to it; every row has at least one."""
    total = np.cumsum(values, dtype=np.int64)
    before = total[firsts] - values[firsts]
    sums: np.ndarray = total - np.repeat(before, counts)
    return sums
