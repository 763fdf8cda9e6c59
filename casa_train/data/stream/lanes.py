"""One lane of a stream: which rows it draws, and which packs they make.

A stream is cut into L logical lanes. Row groups are drawn by the mixture and dealt to the lanes, L
at a time; a lane keeps a few row groups open, draws their rows in random order and packs them. Pack
i of the run is the next pack of lane i mod L. All of it follows from configuration, seed and the
files' footers, so a lane goes on from its state in any process.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.materialize import Entry, Failure
from casa_train.data.mixture import Mixture, philox
from casa_train.data.packing import BestFitPacker, Bin
from casa_train.data.schemas.rows import BadRow
from casa_train.data.stream.row_reader import Rows
from casa_train.errors import UserError
from casa_train.modeling.image_processing_casa import ImageError

# Rows in a row that give nothing to a pack: from here on bad rows are handed on with what there is,
# so that the run counts them, and rows that are only too long stop it.
FRUITLESS = 500
Item = tuple[str, int, int, int, int]  # source, row group, row of it, text tokens, image tokens
Sizes = Sequence[tuple[int, int]]  # number of a block, packs that it and the following ones have


def block_packs(data: DataConfig) -> int:
    """Packs of a lane that are sorted by size together: of all lanes as many as in a plan."""
    return max(1, data.balance_block * data.packs_per_step // data.stream.lanes)


@dataclass
class _OpenRowGroup:
    """`serial` counts the row groups that its lane has opened, `taken` the rows drawn from it."""

    source: str
    row_group: int
    serial: int
    taken: int
    order: np.ndarray


@dataclass(frozen=True)
class LanePack:
    """The next pack of a lane: its samples, and what became of rows that gave none on the way.

    :param failures: bad rows; :param left_out: number of rows that exceed the budgets.
    """

    entries: list[Entry]
    failures: list[Failure]
    left_out: int


class Lane:
    """The endless packs of lane `number`.

    :param mixture: of row groups; a lane sets its position before it draws.
    :param sizes: for all lanes alike, number of a block and its packs, which the following blocks
        have, too; None: those of the configuration.
    """

    def __init__(
        self,
        number: int,
        rows: Rows,
        mixture: Mixture,
        data: DataConfig,
        seed: int,
        sizes: Sizes | None = None,
    ) -> None:
        self.number = number
        self.rows = rows
        self.mixture = mixture
        self.data, self.seed = data, seed
        self.sizes = sizes or [(0, block_packs(data))]
        self._drawn = dict.fromkeys(mixture.names, 0)  # dealt to all lanes, by source
        self._open: list[_OpenRowGroup] = []
        self._opened = 0
        self._draws = 0
        self._packer = BestFitPacker(Budget.of(data).for_samples(), data.open_packs)
        self._finished: deque[Bin] = deque()
        self._arrived: list[Bin] = []  # packs of the next block
        self._ordered: deque[Bin] = deque()  # packs of this block
        self._block = 0
        self._failures: list[Failure] = []
        self._left_out = 0
        self._fruitless = 0

    def next_pack(self) -> LanePack:
        """:raises UserError: files that cannot be read, or budgets that nothing fits."""
        # One pack of the next block is made for each that leaves this one.
        self._fruitless = 0
        while not self._ordered:
            self._fill()
        if len(self._arrived) < self._size():
            self._fill()
        pack = self._ordered.popleft()
        entries = [self._entry(item) for item in pack.items]
        failures, self._failures = self._failures, []
        left_out, self._left_out = self._left_out, 0
        return LanePack(entries, failures, left_out)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, free of ranks, workers and data: rows are named, not stored."""
        return {
            "drawn": list(self._drawn.values()),
            "units": [[g.source, g.row_group, g.serial, g.taken] for g in self._open],
            "opened": self._opened,
            "draws": self._draws,
            "packer": self._packer.state_dict(),
            "finished": [_plain(b) for b in self._finished],
            "arrived": [_plain(b) for b in self._arrived],
            "ordered": [_plain(b) for b in self._ordered],
            "block": self._block,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._drawn = dict(zip(self.mixture.names, state["drawn"], strict=True))
        self._open = [
            _OpenRowGroup(source, number, serial, taken, self._order(source, number, serial))
            for source, number, serial, taken in state["units"]
        ]
        self._opened, self._draws = int(state["opened"]), int(state["draws"])
        self._packer.load_state_dict(state["packer"])
        self._finished = deque(_bin(b) for b in state["finished"])
        self._arrived = [_bin(b) for b in state["arrived"]]
        self._ordered = deque(_bin(b) for b in state["ordered"])
        self._block = int(state["block"])

    def _fill(self) -> None:
        """Makes one pack of the next block; once this block is used up, the next takes its place.

        A block is sorted by image tokens and permuted by the same permutation in every lane. Lanes
        next to each other, which make up a micro-step, then give packs of about the same cost.
        """
        if len(self._arrived) < self._size():
            self._arrived.append(self._next_bin())
        if len(self._arrived) == self._size() and not self._ordered:
            packs = sorted(self._arrived, key=lambda pack: pack.images)
            order = philox(f"{self.seed}/balance/{self._block}").permutation(len(packs))
            self._ordered.extend(packs[i] for i in order)
            self._arrived = []
            self._block += 1

    def _size(self) -> int:
        """Packs of the block that is being made."""
        return next(packs for first, packs in reversed(self.sizes) if first <= self._block)

    def _next_bin(self) -> Bin:
        while not self._finished:
            drawn = self._draw()
            try:
                _, text, images = self.rows.draw(*drawn)
            except (BadRow, ImageError) as error:
                key = self.rows.key(*drawn)
                source = self.rows.sources[drawn[0]].subset
                self._failures.append(Failure(source, key, error.reason, str(error)))
                self._fruitless += 1
                if self._fruitless >= FRUITLESS:
                    self._fruitless = 0
                    self._finished.append(Bin(0))
                continue
            if not self._packer.budget.holds(text, images):
                self.rows.take(*drawn)
                self._leave_out(text, images)
                continue
            self._fruitless = 0
            self._finished.extend(self._packer.add((*drawn, text, images), text, images))
        return self._finished.popleft()

    def _draw(self) -> tuple[str, int, int]:
        """The next row: (source, row group, row), of an open row group, which is chosen in
        proportion to the rows of each.
        """
        for group in [group for group in self._open if group.taken == len(group.order)]:
            self._open.remove(group)
            self.rows.close_row_group(group.source, group.row_group)
        while len(self._open) < self.data.stream.open_units:
            self._open_row_group()
        generator = philox(f"{self.seed}/draw/{self.number}/{self._draws}")
        self._draws += 1
        ends = np.cumsum([len(group.order) for group in self._open])
        chosen = self._open[int(np.searchsorted(ends, generator.integers(ends[-1]), "right"))]
        row = int(chosen.order[chosen.taken])
        chosen.taken += 1
        return chosen.source, chosen.row_group, row

    def _open_row_group(self) -> None:
        """Opens this lane's row group out of the next L that the mixture gives."""
        lanes = self.data.stream.lanes
        self.mixture.load_drawn(self._drawn)
        sources, numbers = self.mixture.take(lanes)
        self._drawn = self.mixture.drawn
        # Dealt in random order: the mixture's sequence is nearly periodic, and a lane that always
        # took the same place of it would see few of the sources.
        deal = philox(f"{self.seed}/deal/{self._opened}").permutation(lanes)
        place = int(deal[self.number])
        name, number = self.mixture.names[int(sources[place])], int(numbers[place])
        order = self._order(name, number, self._opened)
        self._open.append(_OpenRowGroup(name, number, self._opened, 0, order))
        self._opened += 1

    def _order(self, name: str, row_group: int, serial: int) -> np.ndarray:
        key = f"{self.seed}/rows/{self.number}/{serial}"
        return philox(key).permutation(self.rows.sources[name].rows_of(row_group))

    def _entry(self, item: Item) -> Entry:
        name, row_group, row, text, images = item
        rows, source = self.rows, self.rows.sources[name].subset
        key = rows.key(name, row_group, row)
        return Entry(name, source, key, text, images, lambda: rows.take(name, row_group, row))

    def _leave_out(self, text: int, images: int) -> None:
        self._left_out += 1
        self._fruitless += 1
        if self._fruitless >= FRUITLESS:
            raise UserError(
                f"the last {FRUITLESS} rows of a lane gave nothing to a pack; the last one needs "
                f"{text} text and {images} image tokens, data.text_tokens is "
                f"{self.data.text_tokens}, data.image_tokens is {self.data.image_tokens} (one of "
                "each is reserved). Raise the budgets or lower data.max_pixels."
            )


def _plain(pack: Bin) -> list[Any]:
    return [list(pack.items), pack.text, pack.images]


def _bin(plain: Sequence[Any]) -> Bin:
    items, text, images = plain
    return Bin(0, text, images, [tuple(item) for item in items])
