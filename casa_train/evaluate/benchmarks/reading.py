"""A benchmark as it is published -> questions and their pictures, by way of `datasets`.

From the hub, or from a local copy: a folder that `hf download --repo-type dataset NAME
--local-dir DIR/NAME` fills, or one that `save_to_disk` wrote. Rows that cannot be asked are counted
and named, never scored; columns that are not what they should be are an error, because then it is
another data set.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.question import BenchmarkQuestion
from casa_train.evaluate.benchmarks.sources import SOURCES, BadQuestion, Source
from casa_train.io.caches import unwritable_cache
from casa_train.modeling.image_processing_casa import read_header
from casa_train.modeling.image_sources import ImageError

SAVED = ("dataset_dict.json", "state.json")
"""What `save_to_disk` writes, of several splits and of one."""
SHOWN = 3
"""Unusable rows that a message names; the others are counted."""


@dataclass(frozen=True)
class Benchmark:
    """The questions of one benchmark and where their pictures are.

    :param rows: of each question, its row; :param places: of each question, its picture's row in
        `pictures`.
    :param pictures: a table with a column `image` of undecoded files.
    :param unusable: why a row is no question, by its number.
    """

    name: str
    place: str
    split: str
    questions: Sequence[BenchmarkQuestion]
    rows: Sequence[int]
    places: Sequence[int]
    pictures: Any = field(repr=False)
    unusable: Mapping[int, str] = field(default_factory=dict)

    def picture(self, index: int) -> bytes:
        """The picture of a question, as its file.

        :raises ImageError: there is none.
        """
        return _bytes(self.pictures[self.places[index]]["image"])

    @cached_property
    def _files(self) -> dict[int, tuple[tuple[int, int] | ImageError, bytes]]:
        """By its place, what a picture's header says and a digest of its file: read once for both,
        since all of them can be gigabytes.
        """
        files: dict[int, tuple[tuple[int, int] | ImageError, bytes]] = {}
        for index, place in enumerate(self.places):
            if place in files:
                continue
            try:
                data = self.picture(index)
            except ImageError as error:
                files[place] = error, str(error).encode()
                continue
            try:
                size: tuple[int, int] | ImageError = read_header(data)[1:]
            except ImageError as error:
                size = error
            files[place] = size, hashlib.sha256(data).digest()
        return files

    @cached_property
    def sizes(self) -> list[tuple[int, int] | ImageError]:
        """(width, height) of each question's picture by its header, or what is wrong with it."""
        return [self._files[place][0] for place in self.places]

    @cached_property
    def revision(self) -> str:
        """A digest of everything that is asked: texts, answers and pictures. Copies of one data set
        have the same, wherever they are from.
        """
        digest = hashlib.sha256()
        for question, place in zip(self.questions, self.places, strict=True):
            digest.update(repr(question).encode() + self._files[place][1])
        return digest.hexdigest()[:16]

    def subset(self, samples: int | None) -> Benchmark:
        """`samples` questions, evenly over the whole; questions that count together stay together.

        :param samples: None: all of them; else at least so many where there are.
        """
        if samples is None or samples >= len(self.questions):
            return self
        groups: dict[str, list[int]] = {}
        for index, question in enumerate(self.questions):
            groups.setdefault(question.pair or question.id, []).append(index)
        members = list(groups.values())
        wanted = -(-samples * len(members) // len(self.questions))
        chosen = sorted(
            index for k in range(wanted) for index in members[k * len(members) // wanted]
        )
        return replace(
            self,
            questions=[self.questions[i] for i in chosen],
            rows=[self.rows[i] for i in chosen],
            places=[self.places[i] for i in chosen],
        )


def read_benchmark(name: str, copies: Path | None = None, option: str = "--source ") -> Benchmark:
    """Reads a benchmark.

    :param copies: a folder of local copies: DIR/lmms-lab/ChartQA, DIR/ChartQA, or DIR itself where
        it is the copy; None: from the hub.
    :param option: what stands before `copies` where it is named, for messages.
    :raises UserError: no such copy, no way to the hub, another data set, no usable question.
    """
    source = SOURCES[name]
    place = source.repo if copies is None else str(_copy(copies, source, option))
    rows = _load(name, place, source.config, source.split, option)
    _check_columns(name, place, rows, source.columns, option)
    if source.pictures is None:
        pictures, number = rows, {}
    else:
        pictures = _load(name, place, source.pictures, source.split, option)
        _check_columns(name, place, pictures, ("id", "image"), option)
        number = {str(key): i for i, key in enumerate(pictures["id"])}
    pictures = _undecoded(name, place, pictures.select_columns(["image"]))
    questions, numbers, places, unusable = [], [], [], {}
    texts = rows.select_columns([c for c in source.columns if c != "image"])
    for index, row in enumerate(texts):
        try:
            question = source.question(row, index)
            if source.pictures is not None and str(row[source.picture]) not in number:
                raise BadQuestion(
                    f"{source.picture} is {row[source.picture]!r}, which is no id of "
                    f"{source.pictures}"
                )
        except BadQuestion as error:
            unusable[index] = str(error)
            continue
        questions.append(question)
        numbers.append(index)
        places.append(number[str(row[source.picture])] if source.pictures else index)
    if not questions:
        raise UserError(
            f"{name}: none of the {len(rows)} rows of {place} (split {source.split}) can be asked: "
            f"{_reasons(unusable) or 'it is empty'}. Expected {source.repo} as it is published."
        )
    return Benchmark(name, place, source.split, questions, numbers, places, pictures, unusable)


def _reasons(unusable: Mapping[int, str]) -> str:
    named = [f"row {row}: {why}" for row, why in list(unusable.items())[:SHOWN]]
    more = len(unusable) - len(named)
    return "; ".join(named) + (f"; and {more} more" if more > 0 else "")


def remarks(benchmark: Benchmark) -> list[str]:
    """What to say of a benchmark that is not whole: its score would be taken for another."""
    lines = []
    rows = len(benchmark.unusable) + len(benchmark.questions)
    published = SOURCES[benchmark.name].rows
    if rows != published:
        lines.append(
            f"warning: {benchmark.name}: {benchmark.place} has {rows:,} rows; {published:,} are "
            "published, and published scores are over those"
        )
    if benchmark.unusable:
        lines.append(
            f"warning: {benchmark.name}: {len(benchmark.unusable)} of {rows} rows of "
            f"{benchmark.place} cannot be "
            f"asked and are left out of the score: {_reasons(benchmark.unusable)}"
        )
    return lines


def _copy(copies: Path, source: Source, option: str) -> Path:
    """The folder of a data set's copy.

    :raises UserError: none there.
    """
    short = source.repo.split("/")[1]
    # First, since a copy of DocVQA has a folder of that name itself.
    itself = (copies, copies / "data", copies / (source.config or "data"))
    if any([*p.glob("*.parquet"), *(p / m for m in SAVED if (p / m).is_file())] for p in itself):
        return copies
    folders = [p for p in copies.iterdir() if p.is_dir()] if copies.is_dir() else []
    named = [p for p in folders if p.name.lower() == short.lower()]
    for path in (copies / source.repo, *named):
        if path.is_dir():
            return path
    raise UserError(
        f"{option}{copies} holds no copy of {source.repo}: expected {copies / source.repo} or "
        f"{copies / short}. Download it there: hf download --repo-type dataset {source.repo} "
        f"--local-dir {copies / short}"
    )


def _load(name: str, place: str, config: str | None, split: str, option: str) -> Any:
    """A table of a data set.

    :raises UserError: it cannot be read.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        if os.path.isdir(place):
            return _load_copy(Path(place), config, split)
        return datasets.load_dataset(place, config, split=split)
    except UserError:
        raise
    except Exception as error:  # of any library below `datasets`: network, parquet, file systems
        if cache := unwritable_cache(error):
            raise UserError(f"{name}: {place} cannot be read: {cache}") from error
        what = f"configuration {config}, split {split}" if config else f"split {split}"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        local = os.path.isdir(place)
        raise UserError(
            f"{name}: {place} ({what}) cannot be read: {lines[0].rstrip('.')}. "
            + (
                "Expected a copy of the published data set with all its files; download it again."
                if local
                else "Where the hub cannot be reached, name a folder of local copies with "
                f"{option}DIR: hf download --repo-type dataset {place} --local-dir "
                f"DIR/{place.split('/')[1]}"
            )
        ) from error


def _load_copy(folder: Path, config: str | None, split: str) -> Any:
    """The table of a copy: one of `save_to_disk`, or the published parquet files, which are in a
    folder of the configuration's name, in `data`, or in the copy itself.

    :raises UserError: files of the split are missing.
    """
    import datasets

    places = [folder / name for name in (config, "data", ".") if name]
    for place in places:
        if any((place / mark).is_file() for mark in SAVED):
            saved = datasets.load_from_disk(str(place))
            splits = saved if isinstance(saved, dict) else {str(saved.split or split): saved}
            if split not in splits:
                raise FileNotFoundError(f"{place} holds the split {', '.join(splits)} alone")
            return splits[split]
    for place in places:
        if files := sorted(place.glob(f"{split}-*.parquet")):
            _check_whole(files)
            table = datasets.load_dataset("parquet", data_files={split: [*map(str, files)]})
            return table[split]
    raise FileNotFoundError(f"no {split}-*.parquet in {', '.join(map(str, places))}")


def _check_whole(files: Sequence[Path]) -> None:
    """Refuses a copy of which parts are missing: a score over half the questions is another.

    :raises UserError: naming how many there are.
    """
    parts = {int(m[1]) for file in files if (m := re.search(r"-of-(\d+)", file.name))}
    if parts and parts != {len(files)}:
        raise UserError(
            f"{files[0].parent} holds {len(files)} files such as {files[0].name}; expected "
            f"{' or '.join(map(str, sorted(parts)))}. Download the missing ones."
        )


def _check_columns(name: str, place: str, table: Any, expected: Sequence[str], option: str) -> None:
    missing = [column for column in expected if column not in table.column_names]
    if missing:
        raise UserError(
            f"{name}: {place} has the columns {', '.join(table.column_names)}; expected "
            f"{', '.join(expected)} ({', '.join(missing)} missing). It is another data set than "
            f"{SOURCES[name].repo}, or another release of it; name the right copy with {option}DIR."
        )


def _undecoded(name: str, place: str, table: Any) -> Any:
    """Pictures as their files: one that cannot be decoded must not end the reading of others."""
    import datasets

    feature = table.features["image"]
    if isinstance(feature, datasets.Image):
        return table.cast_column("image", datasets.Image(decode=False))
    if isinstance(feature, dict) and "bytes" in feature:
        return table
    raise UserError(
        f"{name}: column image of {place} is {feature}; expected pictures (datasets.Image, or "
        "their bytes)."
    )


def _bytes(value: Any) -> bytes:
    """:raises ImageError: no picture, or one that is only named: paths in data are not opened."""
    data = value.get("bytes") if isinstance(value, Mapping) else None
    if isinstance(data, bytes) and data:
        return data
    path = value.get("path") if isinstance(value, Mapping) else None
    only = f", only the path {path!r}" if path else ""
    raise ImageError("missing_image", f"no picture{only}")
