"""Mixture + packing = the global order of packs, a pure function of configuration, seed and index.

In step s, micro-step m and rank r the run trains pack s * G + m * W + r, for G packs a step on W
ranks. Neither G nor W enters the plan, so the same packs make up a step on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_train.data.mixture import Mixture, SourceSize
from casa_train.data.packing import BestFitPacker
from casa_train.data.shards import Split
from casa_train.errors import UserError
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError
from casa_train.modeling.processing_casa import CasaProcessor

SNAPSHOT_EVERY = 64  # packs between two remembered planner states
# The dummy sample of a pack without any window: one text token, one image token (casa.md section
# 2).
RESERVED = 1


@dataclass(frozen=True)
class Pack:
    """One packed sequence to be trained: which samples, and how full it is."""

    index: int
    items: tuple[tuple[str, int, int, int], ...]  # (source, row, text tokens, image tokens)
    text_tokens: int
    image_tokens: int


def sample_lengths(split: Split, processor: CasaProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Text and image tokens of every sample of a split, two (samples,) int64 arrays.

    An image that the image code will refuse counts no tokens: materialising skips its sample.
    """
    user, user_offsets = split.list_column("user_tokens")
    answers, answer_offsets = split.list_column("assistant_tokens")
    widths, image_offsets = split.list_column("widths")
    heights, _ = split.list_column("heights")
    counts = np.diff(image_offsets)
    turns = np.diff(user_offsets)
    text = _segment_sums(user, user_offsets) + _segment_sums(answers, answer_offsets)
    # The template's share is linear in turns and images; three probes give its coefficients.
    base = processor.text_tokens([], [], 0)
    per_turn = processor.text_tokens([0], [0], 0) - base
    per_image = processor.text_tokens([], [], 1) - base
    text = text + base + per_turn * turns + per_image * counts
    tokens = np.zeros(len(widths), np.int64)
    if len(widths):
        sizes, inverse = np.unique(np.stack([widths, heights], 1), axis=0, return_inverse=True)
        each = np.array([_image_tokens(processor.image_processor, *map(int, s)) for s in sizes])
        tokens = each[inverse.ravel()]
    return text, _segment_sums(tokens, image_offsets)


def _image_tokens(images: CasaImageProcessor, width: int, height: int) -> int:
    try:
        return images.token_count(width, height)
    except ImageError:
        return 0


def _segment_sums(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    sums: np.ndarray = total[offsets[1:]] - total[offsets[:-1]]
    return sums


class Planner:
    """Iterates over packs, endlessly.

    :param splits: by source name; :param sizes: their rates for the mixture.
    :raises UserError: a budget that no sample fits.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        sizes: Mapping[str, SourceSize],
        processor: CasaProcessor,
        text_budget: int,
        image_budget: int,
        seed: int,
        open_packs: int = 24,
    ) -> None:
        self.lengths = {name: sample_lengths(split, processor) for name, split in splits.items()}
        self.mixture = Mixture(sizes, seed)
        self.packer = BestFitPacker(text_budget - RESERVED, image_budget - RESERVED, open_packs)
        self.next_index = 0
        self._finished: list[Pack] = []
        self._snapshots: list[tuple[int, dict[str, Any]]] = []
        self._check_budgets(text_budget, image_budget)

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        if not self._snapshots or self.next_index % SNAPSHOT_EVERY == 0:
            self._snapshots.append((self.next_index, self._state()))
        while not self._finished:
            name, row = self.mixture.next()
            text, images = (int(lengths[row]) for lengths in self.lengths[name])
            if not self.packer.fits(text, images):
                continue  # `dropped` counts them, and the start of a run says how many
            for done in self.packer.add((name, row, text, images), text, images):
                self._finished.append(Pack(-1, tuple(done.items), done.text, done.images))
        done_pack = self._finished.pop(0)
        pack = Pack(self.next_index, done_pack.items, done_pack.text_tokens, done_pack.image_tokens)
        self.next_index += 1
        return pack

    def dropped(self) -> dict[str, tuple[int, int]]:
        """By source: samples that fit no pack, and all samples."""
        return {
            name: (int((~self.packer.fits(text, images)).sum()), len(text))
            for name, (text, images) in self.lengths.items()
        }

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """A state from which the plan can be continued at pack `consumed`.

        Planning runs ahead of training, so an earlier state is kept and packs are replayed from it.
        """
        if not self._snapshots:  # nothing was planned since construction or loading
            return {"consumed": consumed, **self._state()}
        usable = [state for index, state in self._snapshots if index <= consumed]
        self._snapshots = self._snapshots[len(usable) - 1 :]
        return {"consumed": consumed, **usable[-1]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the state's `consumed` pack."""
        self.mixture.load_state_dict(state["mixture"])
        self.packer.load_state_dict(state["packer"])
        self.next_index = int(state["next_index"])
        self._finished = [
            Pack(-1, tuple((n, int(r), int(t), int(i)) for n, r, t, i in items), text, images)
            for items, text, images in state["finished"]
        ]
        self._snapshots = []
        while self.next_index < state["consumed"]:
            next(self)

    def _state(self) -> dict[str, Any]:
        return {
            "next_index": self.next_index,
            "mixture": self.mixture.state_dict(),
            "packer": self.packer.state_dict(),
            "finished": [[list(p.items), p.text_tokens, p.image_tokens] for p in self._finished],
        }

    def _check_budgets(self, text_budget: int, image_budget: int) -> None:
        for name, (text, images) in self.lengths.items():
            fits = self.packer.fits(text, images)
            # Without its images a source would train on its text alone, unseen.
            for kind, chosen in (("sample with an image", images > 0), ("sample", images >= 0)):
                if chosen.any() and not (fits & chosen).any():
                    least = int(text[chosen].min()), int(images[chosen].min())
                    raise UserError(
                        f"no {kind} of source {name!r} fits a pack: data.text_tokens is "
                        f"{text_budget}, data.image_tokens is {image_budget} (one of each is "
                        f"reserved), the smallest samples need {least[0]} text and {least[1]} "
                        "image tokens. Raise the budgets or lower data.max_pixels."
                    )
