"""Reading published datasets through `datasets`, from the hub or from a local copy.

A local copy has the same files as the published repository, its README.md included: that names the
subsets. Everything is streamed, images stay undecoded bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from casa_train.errors import UserError
from casa_train.io.caches import permanent, unwritable_cache
from data_recipes.pipeline import Row, Skip, slug

READERS = 16  # of footers at the same time
TRIES = 5  # of a request to the hub, with 1, 2, 4 and 8 seconds between them

Converter = Callable[[Mapping[str, Any], str], tuple[dict[str, Any], list[bytes]]]
"""A row of the dataset and its subset -> the columns to store, and the image bytes."""


def is_local(source: str) -> bool:
    """Whether a source is a directory here, and not a repository of the hub."""
    return source.startswith((".", "/", "~")) or Path(source).exists()


def base_path(source: str) -> str:
    """Where the files of a source lie, as a path that fsspec opens.

    :raises UserError: a directory that does not exist.
    """
    if not is_local(source):
        return f"hf://datasets/{source}"
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"--source {source} is no directory; expected a hub id or a local copy.")
    return str(path.resolve())


def subset_names(source: str) -> list[str]:
    """The subsets (configs) that the dataset's README.md names.

    :raises UserError: when they cannot be read.
    """
    import datasets

    from casa_train.data.stream.subsets import card_of

    if is_local(source):
        path = base_path(source)
        if not (Path(path) / "README.md").is_file():
            raise UserError(
                f"--source {source} has no README.md, which names the subsets of a published "
                "dataset; copy it from the dataset's page, too."
            )
        if named := card_of(path):  # of a partial copy, too
            return list(named)
    try:
        return list(_asked(lambda: datasets.get_dataset_config_names(load_path(source)), source))
    except (FileNotFoundError, ValueError) as error:  # no such dataset, a card without subsets
        raise UserError(f"--source {source}: {_first_line(error)}") from error


def chosen_subsets(source: str, wanted: Sequence[str] | None, default: Sequence[str]) -> list[str]:
    """The subsets to prepare.

    :param default: without `wanted`; empty: all that there are. Of a partial copy what it holds.
    :raises UserError: one that the source does not have, or two with the same folder.
    """
    named = subset_names(source)
    there = _held(source, named)
    chosen = list(dict.fromkeys(wanted or default or named))
    missing = [name for name in chosen if name not in there]
    if missing and not wanted and is_local(source) and set(chosen) & set(there):
        print(f"--source {source} holds no files of {', '.join(missing)}: left out")
        chosen = [name for name in chosen if name in there]
    elif missing:
        raise UserError(
            f"--source {source} has no subset {', '.join(map(repr, missing))}; it has "
            f"{', '.join(there)}."
        )
    folders = {slug(name): name for name in chosen}
    for name in chosen:
        if folders[slug(name)] != name:
            raise UserError(f"subsets {name!r} and {folders[slug(name)]!r} have the same folder.")
    return chosen


def _held(source: str, subsets: list[str]) -> list[str]:
    """Those of the subsets of which a local copy holds files."""
    if not is_local(source):
        return subsets
    from casa_train.data.stream.row_groups import Retries
    from casa_train.data.stream.subsets import copied_subsets

    return copied_subsets(base_path(source), subsets, Retries(1, 0))


def load_arguments(source: str, subset: str) -> dict[str, Any]:
    """What `datasets` is asked for: of a local copy the files that its card names for the subset.

    Otherwise the library looks for those of the first subset, too, which a partial copy may lack.
    """
    from datasets.data_files import sanitize_patterns

    from casa_train.data.stream.subsets import card_of

    arguments: dict[str, Any] = {"path": load_path(source), "name": subset}
    described = card_of(base_path(source)).get(subset, {}) if is_local(source) else {}
    if "data_files" in described and "data_dir" not in described:
        patterns = sanitize_patterns(described["data_files"])
        arguments["data_files"] = {str(split): files for split, files in patterns.items()}
    return arguments


@dataclass(frozen=True)
class ParquetJob:
    """One parquet file of a subset; a damaged row group costs only its own rows."""

    source: str
    subset: str
    number: int
    convert: Converter
    weight: int = 1

    @property
    def name(self) -> str:
        return f"{self.subset} file {self.number}: {Path(self._path).name}"

    @property
    def _path(self) -> str:
        return data_files(self.source, self.subset)[self.number]

    def rows(self) -> Iterator[Row | Skip]:
        import pyarrow.parquet as pq
        from fsspec import open as open_file

        from casa_train.data.schemas.rows import BadRow

        stream = open_stream(self.source, self.subset)
        file = stream.shard(num_shards=stream.num_shards, index=self.number)

        def open_groups() -> tuple[Any, Any]:
            with open_file(self._path, "rb") as handle:
                return file.reshard(), pq.ParquetFile(handle).metadata

        try:
            groups, footer = _asked(open_groups, self.source)
        except (pa.ArrowException, ValueError):
            yield Skip("damaged_file")
            return
        position = 0
        for group in range(footer.num_row_groups):
            expected = footer.row_group(group).num_rows
            found = groups.shard(num_shards=footer.num_row_groups, index=group)
            read = 0
            for row in until_damage(found, self.source):
                key = f"{slug(self.subset)}-{self.number:05d}-{position + read:07d}"
                read += 1
                try:
                    columns, images = self.convert(row, self.subset)
                except BadRow as error:
                    yield Skip(error.reason)
                    continue
                yield Row(key, columns, images)
            if read < expected:
                yield Skip("damaged_row_group", expected - read)
            position += expected


def parquet_jobs(source: str, subset: str, convert: Converter) -> list[ParquetJob]:
    """A job for each parquet file of a subset."""
    files = data_files(source, subset)
    return [ParquetJob(source, subset, number, convert) for number in range(len(files))]


@lru_cache(maxsize=4)
def open_stream(source: str, subset: str) -> Any:
    """Split "train" of a subset as a stream of rows, images as undecoded bytes.

    One image that cannot be decoded would end the stream; here it is a row like any other. Files
    and row groups that cannot be read give fewer rows than their footer says.

    :raises UserError: no such split, or no file that can be read.
    """
    import datasets

    def load() -> Any:
        return datasets.load_dataset(
            **load_arguments(source, subset), split="train", streaming=True, on_bad_files="skip"
        ).decode(False)

    try:
        return _asked(load, source)
    except ValueError as error:
        raise UserError(f"--source {source}, subset {subset!r}: {_first_line(error)}") from error


@lru_cache(maxsize=4)
def data_files(source: str, subset: str) -> tuple[str, ...]:
    """The files of split "train" of a subset, in the order in which they are streamed."""
    import datasets

    builder = _asked(
        lambda: datasets.load_dataset_builder(**load_arguments(source, subset)), source
    )
    return tuple(builder.config.data_files["train"])


def count_rows(source: str, subset: str) -> int:
    """Rows of a subset by the footers of its files; one that is damaged counts none."""
    import pyarrow.parquet as pq
    from fsspec import open as open_file

    def rows(path: str) -> int:
        def footer() -> int:
            with open_file(path, "rb") as handle:
                return int(pq.ParquetFile(handle).metadata.num_rows)

        try:
            return int(_asked(footer, source))
        except (pa.ArrowException, ValueError):
            return 0

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(rows, data_files(source, subset)))


def files_matching(source: str, pattern: str) -> list[str]:
    """The files of a source that match a pattern, sorted; openable by fsspec."""
    from datasets.data_files import resolve_pattern

    try:
        found = _asked(lambda: resolve_pattern(pattern, base_path=base_path(source)), source)
    except FileNotFoundError:
        return []
    return sorted(found)


def until_damage(
    stream: Any, source: str, damaged: Callable[[], None] = lambda: None
) -> Iterator[Mapping[str, Any]]:
    """The rows of a stream up to where it cannot be read; what the network does is tried again.

    :param damaged: called where the stream ended too early.
    :raises UserError: the hub cannot be reached.
    """
    read = tries = 0
    while True:
        try:
            for row in stream.skip(read) if read else stream:
                yield row
                read += 1
                tries = 0
            return
        except (pa.ArrowException, ValueError):
            return damaged()
        except Exception as error:  # OSError of a damaged page, or any error of a network
            if cache := unwritable_cache(error):
                raise UserError(f"--source {source} cannot be read: {cache}") from error
            tries += 1
            if is_local(source) or (tries == TRIES and type(error) is OSError):
                return damaged()
            _wait(tries, source, error)


def _asked(request: Callable[[], Any], source: str) -> Any:
    """The answer to a request, tried again where the source is remote.

    :raises UserError: the hub cannot be reached, or does not have it.
    """
    tries = 0
    while True:
        try:
            return request()
        except Exception as error:
            if cache := unwritable_cache(error):
                raise UserError(f"--source {source} cannot be read: {cache}") from error
            if isinstance(error, pa.ArrowException | ValueError | FileNotFoundError):
                raise
            if permanent(error):
                raise UserError(
                    f"--source {source} cannot be read: {_first_line(error)}. Mend it, or choose "
                    "another --source, and run the same command again."
                ) from error
            if is_local(source):
                raise
            tries += 1
            _wait(tries, source, error)


def _wait(tries: int, source: str, error: Exception) -> None:
    if tries >= TRIES:
        raise UserError(
            f"--source {source} cannot be read after {TRIES} tries: {_first_line(error)}. Run the "
            "same command again: finished shards are kept."
        ) from error
    time.sleep(2 ** (tries - 1))


def load_path(source: str) -> str:
    """A source as `datasets.load_dataset` takes it."""
    return base_path(source) if is_local(source) else source


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def image_bytes(value: Any) -> bytes:
    """The bytes of an undecoded image.

    :raises BadRow: no image, or one that is only named: paths are data here, never opened.
    """
    from casa_train.data.schemas.rows import BadRow

    data = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(data, bytes):
        raise BadRow("missing_image", f"an image is {type(data).__name__}, expected its bytes")
    return data
