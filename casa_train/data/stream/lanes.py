"""One lane of a stream: which rows it draws, and which packs they make.

A stream is cut into L logical lanes. Units (row groups) are drawn by the mixture and dealt to the
lanes, L at a time; a lane keeps a few units open, draws their rows in random order and packs them.
Pack i of the run is the next pack of lane i mod L. All of it follows from configuration, seed and
the files' footers, so a lane goes on from its state in any process.
"""

from __future__ import annotations

import bisect
import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from casa_train.data.lengths import measure
from casa_train.data.materialize import Entry, Failure
from casa_train.data.mixture import Mixture, SourceSize, philox
from casa_train.data.packing import BestFitPacker, Bin
from casa_train.data.prepared.plan import RESERVED
from casa_train.data.sample import Sample
from casa_train.data.schemas.rows import SCHEMAS, BadRow
from casa_train.data.stream.row_groups import ParquetFile, Retries, read_row_group
from casa_train.errors import UserError
from casa_train.modeling.image_processing_casa import ImageError
from casa_train.modeling.processing_casa import CasaProcessor

# Rows in a row that give nothing to a pack: from here on bad rows are handed on with what there is,
# so that the run counts them, and rows that are only too long stop it.
FRUITLESS = 500
Item = tuple[str, int, int, int, int]  # source, unit, row of the unit, text tokens, image tokens
Sizes = Sequence[tuple[int, int]]  # number of a block, packs that it and the following ones have


@dataclass(frozen=True)
class StreamSource:
    """One subset of a published dataset: its files, whose row groups are its units.

    :param schema: name in `SCHEMAS`; :param subset: stands in for a source that rows do not name.
    :param repeats: passes that count as one epoch.
    """

    schema: str
    subset: str
    files: tuple[ParquetFile, ...]
    repeats: int = 1
    # (units, 3): number of the file, of its row group, and of the group's first row in the file.
    units: np.ndarray = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        units = [
            (number, group, sum(file.rows[:group]))
            for number, file in enumerate(self.files)
            for group, rows in enumerate(file.rows)
            if rows
        ]
        object.__setattr__(self, "units", np.array(units, np.int64).reshape(-1, 3))

    @property
    def rows(self) -> int:
        return sum(sum(file.rows) for file in self.files)

    @property
    def fingerprint(self) -> str:
        """Identifies the data: names and footers of the files, not where they lie."""
        names = "".join(f"{PurePosixPath(f.url).name} {f.digest}\n" for f in self.files)
        return hashlib.sha256(names.encode()).hexdigest()

    def unit_rows(self, unit: int) -> int:
        file, group, _ = self.units[unit]
        return int(self.files[file].rows[group])


@dataclass(frozen=True)
class StreamSettings:
    """The part of the configuration that the order of a stream depends on.

    :param lanes: L; numbers of ranks must divide it.
    :param open_units: row groups that a lane draws from at a time.
    :param block: packs of a lane that are sorted by size together, in blocks that begin now.
    """

    text_budget: int
    image_budget: int
    seed: int
    lanes: int = 256
    open_units: int = 4
    open_packs: int = 24
    block: int = 16


class Rows:
    """Reads rows of a stream's sources; keeps at most `memory` bytes of what lanes still need.

    Kept are the decoded row groups of open units and the samples of open packs, the least recently
    used are given up first and read again when their turn comes. On top of `memory` comes the one
    row group that is being read, its bytes and their decoded form.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamSource],
        processor: CasaProcessor,
        fits: Callable[[int, int], bool],
        retries: Retries,
        memory: int,
    ) -> None:
        self.sources = sources
        self.processor = processor
        self.fits = fits
        self.retries = retries
        self.memory = memory
        self._kept: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def draw(self, name: str, unit: int, row: int) -> tuple[Sample, int, int]:
        """A row for the first time: (sample, text tokens, image tokens).

        :raises BadRow, ImageError: a row that cannot be used.
        """
        sample, text, images = self._read(name, unit, row)
        self._keep((name, unit, row), sample, sum(map(len, sample.images)))
        return sample, text, images

    def take(self, name: str, unit: int, row: int) -> Sample:
        """A drawn row for the last time.

        :raises BadRow: a row that cannot be read any more.
        """
        sample = self._forget((name, unit, row))
        return self._read(name, unit, row)[0] if sample is None else sample

    def close_unit(self, name: str, unit: int) -> None:
        """No more rows will be drawn from this unit."""
        self._forget((name, unit))

    def key(self, name: str, unit: int, row: int) -> str:
        """Names the row for people: file and row of the file."""
        source = self.sources[name]
        file, _, first = source.units[unit]
        return f"{PurePosixPath(source.files[file].url).stem}_{first + row}"

    def _read(self, name: str, unit: int, row: int) -> tuple[Sample, int, int]:
        source = self.sources[name]
        record = self._group(name, unit).slice(row, 1).to_pylist()[0]
        images = take_images(record)
        record.setdefault("subset", source.subset)
        sample = SCHEMAS[source.schema](self.key(name, unit, row), record, images)
        return shorten(sample, lambda s: measure(s, self.processor), self.fits)

    def _group(self, name: str, unit: int) -> pa.Table:
        kept = self._kept.get((name, unit))
        if kept is not None:
            self._kept.move_to_end((name, unit))
            if isinstance(kept[0], BadRow):
                raise kept[0]
            return kept[0]
        source = self.sources[name]
        file, group, _ = source.units[unit]
        try:
            table = read_row_group(source.files[file], int(group), self.retries)
        except BadRow as error:
            self._keep((name, unit), error, 0)  # every row of it will ask
            raise
        self._keep((name, unit), table, table.nbytes)
        return table

    def _keep(self, key: tuple[Any, ...], value: Any, size: int) -> None:
        self._forget(key)
        self._kept[key] = value, size
        self._bytes += size
        while self._bytes > self.memory and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def _forget(self, key: tuple[Any, ...]) -> Any:
        value, size = self._kept.pop(key, (None, 0))
        self._bytes -= size
        return value


@dataclass
class _Unit:
    """An open row group: `serial` counts the units of the lane, `taken` the rows drawn from it."""

    source: str
    unit: int
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


def unit_mixture(sources: Mapping[str, StreamSource], seed: int) -> Mixture:
    """The order in which units are dealt to lanes; lanes of a process share one."""
    sizes = {n: SourceSize(len(s.units), repeats=s.repeats) for n, s in sources.items()}
    return Mixture(sizes, seed)


class Lane:
    """The endless packs of lane `number`.

    :param mixture: of units; a lane sets its position before it draws.
    :param sizes: for all lanes alike, number of a block and its packs, which the following blocks
        have, too; None: those of the settings.
    """

    def __init__(
        self,
        number: int,
        rows: Rows,
        mixture: Mixture,
        settings: StreamSettings,
        sizes: Sizes | None = None,
    ) -> None:
        self.number = number
        self.rows = rows
        self.mixture = mixture
        self.settings = settings
        self.sizes = sizes or [(0, settings.block)]
        self._drawn = dict.fromkeys(mixture.names, 0)  # units dealt to all lanes, by source
        self._units: list[_Unit] = []
        self._opened = 0
        self._draws = 0
        self._packer = packer(settings)
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
            "units": [[u.source, u.unit, u.serial, u.taken] for u in self._units],
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
        self._units = [
            _Unit(source, unit, serial, taken, self._order(source, unit, serial))
            for source, unit, serial, taken in state["units"]
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
            order = philox(f"{self.settings.seed}/balance/{self._block}").permutation(len(packs))
            self._ordered.extend(packs[i] for i in order)
            self._arrived = []
            self._block += 1

    def _size(self) -> int:
        """Packs of the block that is being made."""
        return next(packs for first, packs in reversed(self.sizes) if first <= self._block)

    def _next_bin(self) -> Bin:
        while not self._finished:
            name, unit, row = self._draw()
            try:
                sample, text, images = self.rows.draw(name, unit, row)
            except (BadRow, ImageError) as error:
                key = self.rows.key(name, unit, row)
                source = self.rows.sources[name].subset
                self._failures.append(Failure(source, key, error.reason, str(error)))
                self._fruitless += 1
                if self._fruitless >= FRUITLESS:
                    self._fruitless = 0
                    self._finished.append(Bin(0))
                continue
            if not self._packer.fits(text, images):
                self.rows.take(name, unit, row)
                self._leave_out(text, images)
                continue
            self._fruitless = 0
            self._finished.extend(self._packer.add((name, unit, row, text, images), text, images))
        return self._finished.popleft()

    def _draw(self) -> tuple[str, int, int]:
        """The next row: of an open unit, chosen in proportion to the rows of the units."""
        for unit in [unit for unit in self._units if unit.taken == len(unit.order)]:
            self._units.remove(unit)
            self.rows.close_unit(unit.source, unit.unit)
        while len(self._units) < self.settings.open_units:
            self._open_unit()
        generator = philox(f"{self.settings.seed}/draw/{self.number}/{self._draws}")
        self._draws += 1
        ends = np.cumsum([len(unit.order) for unit in self._units])
        chosen = self._units[int(np.searchsorted(ends, generator.integers(ends[-1]), "right"))]
        row = int(chosen.order[chosen.taken])
        chosen.taken += 1
        return chosen.source, chosen.unit, row

    def _open_unit(self) -> None:
        """Opens this lane's unit out of the next L that the mixture gives."""
        lanes = self.settings.lanes
        self.mixture.load_drawn(self._drawn)
        sources, units = self.mixture.take(lanes)
        self._drawn = self.mixture.drawn
        # Dealt in random order: the mixture's sequence is nearly periodic, and a lane that always
        # took the same place of it would see few of the sources.
        deal = philox(f"{self.settings.seed}/deal/{self._opened}").permutation(lanes)
        place = int(deal[self.number])
        name, unit = self.mixture.names[int(sources[place])], int(units[place])
        self._units.append(
            _Unit(name, unit, self._opened, 0, self._order(name, unit, self._opened))
        )
        self._opened += 1

    def _order(self, name: str, unit: int, serial: int) -> np.ndarray:
        key = f"{self.settings.seed}/rows/{self.number}/{serial}"
        return philox(key).permutation(self.rows.sources[name].unit_rows(unit))

    def _entry(self, item: Item) -> Entry:
        name, unit, row, text, images = item
        rows, source = self.rows, self.rows.sources[name].subset
        key = rows.key(name, unit, row)
        return Entry(name, source, key, text, images, lambda: rows.take(name, unit, row))

    def _leave_out(self, text: int, images: int) -> None:
        self._left_out += 1
        self._fruitless += 1
        if self._fruitless >= FRUITLESS:
            raise UserError(
                f"the last {FRUITLESS} rows of a lane gave nothing to a pack; the last one needs "
                f"{text} text and {images} image tokens, data.text_tokens is "
                f"{self.settings.text_budget}, data.image_tokens is {self.settings.image_budget} "
                "(one of each is reserved). Raise the budgets or lower data.max_pixels."
            )


def packer(settings: StreamSettings) -> BestFitPacker:
    """An empty packer for the budgets of the settings."""
    return BestFitPacker(
        settings.text_budget - RESERVED, settings.image_budget - RESERVED, settings.open_packs
    )


def take_images(record: dict[str, Any]) -> tuple[bytes, ...]:
    """Removes the images of a published row from it; returns their bytes.

    FineVision has the list `images`, LLaVA-OneVision one `image`, which may be null.

    :raises BadRow: anything but {bytes, path} with bytes.
    """
    images = record.pop("images", None)
    if images is None:
        single = record.pop("image", None)
        images = [] if single is None else [single]
    if not isinstance(images, list):
        raise BadRow("bad_images", f"column 'images' is {type(images).__name__}, expected a list")
    for i, image in enumerate(images):
        if not isinstance(image, Mapping) or not isinstance(image.get("bytes"), bytes):
            raise BadRow("missing_image", f"image {i} is {type(image).__name__} without bytes")
    return tuple(image["bytes"] for image in images)


def shorten(
    sample: Sample, lengths: Callable[[Sample], tuple[int, int]], fits: Callable[[int, int], bool]
) -> tuple[Sample, int, int]:
    """The sample without the trailing turns that do not fit, and its lengths.

    Where not even the first turn fits, the whole sample comes back.
    """
    whole = lengths(sample)
    if len(sample.turns) > 1 and not fits(*whole):
        counts = range(1, len(sample.turns))
        # Lengths grow with the turns, so the longest beginning that fits is found by bisection.
        kept = bisect.bisect_left(
            counts, True, key=lambda n: not fits(*lengths(first_turns(sample, n)))
        )
        if kept:
            shorter = first_turns(sample, kept)
            return shorter, *lengths(shorter)
    return sample, *whole


def first_turns(sample: Sample, count: int) -> Sample:
    """The first turns of a conversation and their images; images stand in the order of turns."""
    turns = sample.turns[:count]
    return replace(sample, turns=turns, images=sample.images[: sum(len(t.images) for t in turns)])


def _plain(pack: Bin) -> list[Any]:
    return [list(pack.items), pack.text, pack.images]


def _bin(plain: Sequence[Any]) -> Bin:
    items, text, images = plain
    return Bin(0, text, images, [tuple(item) for item in items])
