"""Mixture + packing = the global order of packs, a pure function of configuration, seed and index.

Packs are planned in blocks of `balance_block` x G packs, G being the packs of a step. A block is
sorted by image tokens, cut into groups of `balance_group` packs of one modality, and the groups are
permuted: the ranks of a micro-step then get packs of about the same cost, and none waits long for
another. In step s, micro-step m and rank r the run trains pack s * G + m * W + r; the number of
ranks W enters nowhere, so the same packs make up a step on any number of ranks.

A block keeps the settings that it was begun with, and its state names them. A run that goes on with
another G, or blocks of another kind, first uses up the block that it was in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.mixture import Mixture, SourceSize, philox
from casa_train.data.packing import BestFitPacker, Bin
from casa_train.errors import UserError

CHUNK = 1024  # samples that a stream draws at once
IMAGE, VIDEO = "image", "video"
Item = tuple[str, int, int, int]  # source, row, text tokens, image tokens


@dataclass(frozen=True)
class Pack:
    """One packed sequence to be trained: which samples, and how full it is."""

    index: int
    items: tuple[Item, ...]
    text_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class PlanSource:
    """What planning needs to know of a source.

    :param text: (samples,) text tokens of every sample; :param images: its image tokens.
    :param size: its rate in the mixture.
    :param modality: image or video; a pack holds one of the two.
    :param shortened: samples that lost turns or frames to the budgets; :param rated_out: samples
        that their ratings left no turn, among those that fit no pack.
    :param without_captions: live samples among those that fit no pack, of which an older index does
        not know where they can be cut.
    """

    text: np.ndarray
    images: np.ndarray
    size: SourceSize
    modality: str = IMAGE
    shortened: int = 0
    rated_out: int = 0
    without_captions: int = 0


@dataclass(frozen=True)
class _Block:
    """A block of packs: where it stands in the order, and how it is made.

    :param first: index of its first pack; :param groups: groups of all blocks before it.
    :param packs: how many it has; :param group: packs of a group.
    """

    number: int
    first: int
    groups: int
    packs: int
    group: int
    video_share: float
    open_packs: int


class _Stream:
    """The packs of one modality, endlessly, in the order in which they fill up."""

    def __init__(self, sources: Mapping[str, PlanSource], data: DataConfig, seed: int) -> None:
        self.sources = dict(sources)
        sizes = {name: source.size for name, source in sources.items()}
        self.mixture = Mixture(sizes, seed, data.locality)
        self.packer = BestFitPacker(Budget.of(data).for_samples(), data.open_packs)
        self._finished: deque[Bin] = deque()
        # Drawn and not yet packed: sources, and the items they gave.
        self._sources = np.zeros(0, np.int64)
        self._items: list[Item] = []
        self._position = 0

    def next_pack(self) -> Bin:
        while not self._finished:
            if self._position == len(self._items):
                self._refill()
            packer, fits = self.packer, self.packer.budget.holds
            item = self._items[self._position]
            self._position += 1
            if fits(item[2], item[3]):  # `dropped` counts the others; the start says how many
                self._finished.extend(packer.add(item, item[2], item[3]))
        return self._finished.popleft()

    def state_dict(self) -> dict[str, Any]:
        return {
            "drawn": self.mixture.put_back(self._sources[self._position :]),
            "packer": self.packer.state_dict(),
            "finished": [[list(b.items), b.text, b.images] for b in self._finished],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mixture.load_drawn(state["drawn"])
        self.packer.load_state_dict(state["packer"])
        self._finished = deque(
            Bin(0, text, images, [tuple(item) for item in items])
            for items, text, images in state["finished"]
        )
        self._sources, self._items, self._position = np.zeros(0, np.int64), [], 0

    def _refill(self) -> None:
        self._sources, rows = self.mixture.take(CHUNK)
        self._position = 0
        names = self.mixture.names
        text, images = np.empty(CHUNK, np.int64), np.empty(CHUNK, np.int64)
        for index in np.unique(self._sources):
            places, source = self._sources == index, self.sources[names[index]]
            text[places], images[places] = source.text[rows[places]], source.images[rows[places]]
        self._items = [
            (names[source], row, t, i)
            for source, row, t, i in zip(
                self._sources.tolist(), rows.tolist(), text.tolist(), images.tolist(), strict=True
            )
        ]


class Planner:
    """Iterates over packs, endlessly.

    :param data: budgets, `packs_per_step` and what else the order of packs depends on.
    :raises UserError: a budget that no sample fits, or a block that groups do not divide.
    """

    def __init__(self, sources: Mapping[str, PlanSource], data: DataConfig, seed: int) -> None:
        self.sources = dict(sources)
        self.data, self.seed = data, seed
        self.budget = Budget.of(data).for_samples()  # of samples
        self._check_budgets()
        by_modality = {
            modality: {n: s for n, s in sources.items() if s.modality == modality}
            for modality in (IMAGE, VIDEO)
        }
        self._streams = {m: _Stream(s, data, seed) for m, s in by_modality.items() if s}
        self.block_packs = data.balance_block * data.packs_per_step
        if self.block_packs % data.balance_group:
            raise UserError(
                f"data.balance_group is {data.balance_group}, which does not divide a block of "
                f"data.balance_block x data.packs_per_step = {data.balance_block} x "
                f"{data.packs_per_step} packs; expected a divisor of {self.block_packs}. Set "
                "data.balance_group to one."
            )
        self._start(self._block_at(0, 0, 0))

    def __iter__(self) -> Iterator[Pack]:
        return self

    def __next__(self) -> Pack:
        # One pack of the next block is planned for each that leaves this one, so no step waits for
        # a whole block.
        while len(self._ordered) == 0:
            self._plan_one()
        if self._in_block < self._block.packs:
            self._plan_one()
        return self._ordered.popleft()

    def dropped(self) -> dict[str, tuple[int, int]]:
        """By source: samples that fit no pack, and all samples; those rated out not counted."""
        return {
            name: (
                int((~self.budget.holds(source.text, source.images)).sum()) - source.rated_out,
                len(source.text),
            )
            for name, source in self.sources.items()
        }

    def state_dict(self, consumed: int) -> dict[str, Any]:
        """A state from which the plan can be continued at pack `consumed`.

        Small, and free of the number of ranks: the state at the start of the block that pack
        `consumed` belongs to, from which its packs are planned again.
        """
        while len(self._starts) > 1 and self._starts[1][0].first <= consumed:
            self._starts.popleft()
        block, streams = self._starts[0]
        return {"consumed": consumed, "block": asdict(block), "streams": streams}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the state's `consumed` pack.

        :raises UserError: a state of an earlier version, or of other sources.
        """
        if not isinstance(state.get("block"), dict) or set(state["streams"]) != set(self._streams):
            raise UserError(
                "the checkpoint's plan of samples is of an older version of casa_train, which has "
                "to finish its run, or of other kinds of sources. Start over with "
                "checkpoint.resume=never, or a new run from an export (model.init_from)."
            )
        for modality, stream in self._streams.items():
            stream.load_state_dict(state["streams"][modality])
        block = _Block(**state["block"])
        self._start(block)
        for _ in range(int(state["consumed"]) - block.first):
            next(self)

    def _block_at(self, number: int, first: int, groups: int) -> _Block:
        """A block with the settings that are in force now."""
        data = self.data
        return _Block(
            number,
            first,
            groups,
            self.block_packs,
            data.balance_group,
            data.video_share,
            data.open_packs,
        )

    def _start(self, block: _Block) -> None:
        """Begins to plan a block, whatever was planned before."""
        self._ordered: deque[Pack] = deque()
        self._starts: deque[tuple[_Block, dict[str, Any]]] = deque()
        self._begin(block)

    def _begin(self, block: _Block) -> None:
        self._block = block  # the block being planned
        self._in_block = 0
        self._arrived: dict[str, list[Bin]] = {modality: [] for modality in self._streams}
        for stream in self._streams.values():
            stream.packer.keep_open(block.open_packs)
        self._remember()

    def _remember(self) -> None:
        streams = {modality: stream.state_dict() for modality, stream in self._streams.items()}
        self._starts.append((self._block, streams))

    def _plan_one(self) -> None:
        """Plans one pack of the block; once it is whole and the last is used up, orders it."""
        block = self._block
        if self._in_block < block.packs:
            modality = self._modality(self._in_block // block.group)
            self._arrived[modality].append(self._streams[modality].next_pack())
            self._in_block += 1
        if self._in_block == block.packs and not self._ordered:
            self._ordered.extend(self._order())
            groups = block.groups + block.packs // block.group
            self._begin(self._block_at(block.number + 1, block.first + block.packs, groups))

    def _modality(self, group: int) -> str:
        """Of a group of the block being planned: every fourth is video where the share is 1/4."""
        if len(self._streams) == 1:
            return next(iter(self._streams))
        number = self._block.groups + group
        share = Fraction(self._block.video_share).limit_denominator(1000)
        return VIDEO if (number + 1) * share // 1 > number * share // 1 else IMAGE

    def _order(self) -> list[Pack]:
        block, size = self._block, self._block.group
        generator = philox(f"{self.seed}/block/{block.number}")
        groups: dict[str, list[list[Bin]]] = {}
        for modality, packs in self._arrived.items():
            packs = sorted(packs, key=lambda pack: pack.images)  # stable: ties as they arrived
            cut = [packs[i : i + size] for i in range(0, len(packs), size)]
            groups[modality] = [cut[i] for i in generator.permutation(len(cut))]
        ordered: list[Pack] = []
        for number in range(block.packs // size):
            for pack in groups[self._modality(number)].pop():
                index = block.first + len(ordered)
                ordered.append(Pack(index, tuple(pack.items), pack.text, pack.images))
        return ordered

    def _check_budgets(self) -> None:
        for name, source in self.sources.items():
            text, images = source.text, source.images
            fits = self.budget.holds(text, images)
            # Without its images a source would train on its text alone, unseen.
            for kind, chosen in (("sample with an image", images > 0), ("sample", images >= 0)):
                if chosen.any() and not (fits & chosen).any():
                    least = int(text[chosen].min()), int(images[chosen].min())
                    raise UserError(
                        f"no {kind} of source {name!r} fits a pack: data.text_tokens is "
                        f"{self.data.text_tokens}, data.image_tokens is {self.data.image_tokens} "
                        f"(one of each is reserved), the smallest samples need {least[0]} text and "
                        f"{least[1]} image tokens. Raise the budgets or lower data.max_pixels."
                    )


def slowest_rank(load: np.ndarray, world: int) -> float:
    """Sum over micro-steps of the largest load over the sum of means.

    :param load: (packs,) in plan order; a micro-step takes `world` packs that follow each other.
    :return: 1 is perfect, and what it is where there is no load or no whole micro-step.
    """
    steps = load[: len(load) // world * world].reshape(-1, world)
    mean = float(steps.mean(1).sum()) if len(steps) else 0.0
    return float(steps.max(1).sum()) / mean if mean else 1.0
