"""Rows of a stream, one by one: decoded row groups and drawn samples within a bound of memory."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.lengths import measure
from casa_train.data.sample import Sample
from casa_train.data.schemas.rows import SCHEMAS, BadRow
from casa_train.data.stream.row_groups import Retries, read_row_group
from casa_train.data.stream.stream_source import StreamSource
from casa_train.io.numbers import MIB
from casa_train.modeling.processing_casa import CasaProcessor


class Rows:
    """Reads rows of a stream's sources; keeps at most `stream.memory_mib` of what lanes still need.

    Kept are the open row groups, decoded, and the samples of open packs, the least recently used
    are given up first and read again when their turn comes. On top of `memory_mib` comes the one
    row group that is being read, its bytes and their decoded form.
    """

    def __init__(
        self, sources: Mapping[str, StreamSource], data: DataConfig, processor: CasaProcessor
    ) -> None:
        self.sources = sources
        self.processor = processor
        self.budget = Budget.of(data).for_samples()
        self.retries = Retries.of(data.stream)
        self.memory = data.stream.memory_mib * MIB
        self._kept: OrderedDict[tuple[Any, ...], tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def draw(self, name: str, row_group: int, row: int) -> tuple[Sample, int, int]:
        """A row for the first time: (sample, text tokens, image tokens).

        :raises BadRow, ImageError: a row that cannot be used.
        """
        sample, text, images = self._read(name, row_group, row)
        self._keep((name, row_group, row), sample, sum(map(len, sample.images)))
        return sample, text, images

    def take(self, name: str, row_group: int, row: int) -> Sample:
        """A drawn row for the last time.

        :raises BadRow: a row that cannot be read any more.
        """
        sample = self._forget((name, row_group, row))
        return self._read(name, row_group, row)[0] if sample is None else sample

    def close_row_group(self, name: str, row_group: int) -> None:
        """No more rows will be drawn from this row group."""
        self._forget((name, row_group))

    def key(self, name: str, row_group: int, row: int) -> str:
        """Names the row for people: file and row of the file."""
        source = self.sources[name]
        file, _, first = source.row_groups[row_group]
        return f"{PurePosixPath(source.files[file].url).stem}_{first + row}"

    def _read(self, name: str, row_group: int, row: int) -> tuple[Sample, int, int]:
        source = self.sources[name]
        record = self._group(name, row_group).slice(row, 1).to_pylist()[0]
        images = take_images(record)
        record.setdefault("subset", source.subset)
        sample = SCHEMAS[source.schema](self.key(name, row_group, row), record, images)
        return shorten(sample, lambda s: measure(s, self.processor), self.budget.holds)

    def _group(self, name: str, row_group: int) -> pa.Table:
        kept = self._kept.get((name, row_group))
        if kept is not None:
            self._kept.move_to_end((name, row_group))
            if isinstance(kept[0], BadRow):
                raise kept[0]
            return kept[0]
        source = self.sources[name]
        file, number, _ = source.row_groups[row_group]
        try:
            table = read_row_group(source.files[file], int(number), self.retries)
        except BadRow as error:
            self._keep((name, row_group), error, 0)  # every row of it will ask
            raise
        self._keep((name, row_group), table, table.nbytes)
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
