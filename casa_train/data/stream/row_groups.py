"""Row groups of parquet files, on a disk or behind a network: listed once, then read one at a time.

A row group is fetched as one range of bytes, so that a failed request can simply be made again.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from casa_train.config.data_schema import StreamConfig
from casa_train.data.schemas.rows import BadRow
from casa_train.errors import UserError
from casa_train.io.caches import permanent, unwritable_cache

T = TypeVar("T")

TAIL = 1 << 16  # bytes read from a file's end at first; most footers fit
MAGIC = b"PAR1"
LISTERS = 16  # footers that are read at the same time
LONGEST_WAIT = 60.0  # seconds between two attempts


@dataclass(frozen=True)
class Retries:
    """How often a failed read is tried, and how long to wait after the first failure.

    The wait doubles each time, up to a minute.
    """

    attempts: int
    retry_seconds: float

    @classmethod
    def of(cls, stream: StreamConfig) -> Retries:
        """As the configuration of a stream says."""
        return cls(stream.attempts, stream.retry_seconds)

    def run(self, what: str, work: Callable[[], T]) -> T:
        """Does `work` until it succeeds; what is missing or forbidden is not tried again.

        :param what: the file or dataset, for messages.
        :raises UserError: naming `what`, the number of attempts and the last error.
        """
        for attempt in itertools.count(1):
            try:
                return work()
            except UserError:
                raise
            except Exception as error:  # every file system and HTTP library raises types of its own
                if cache := unwritable_cache(error):
                    raise UserError(f"{what} cannot be read: {cache}") from error
                if permanent(error):
                    raise UserError(
                        f"{what} cannot be read: {_short(error)}. Check data.stream.datasets and "
                        "that you may read it, then run the same command again."
                    ) from error
                if attempt >= self.attempts:
                    raise UserError(
                        f"{what} could not be read in {attempt} attempts; the last one ended with "
                        f"{_short(error)}. Check the network or the storage, then run the same "
                        "command again: it goes on from the last checkpoint. For longer outages "
                        "raise data.stream.attempts or data.stream.retry_seconds."
                    ) from error
                wait = min(self.retry_seconds * 2 ** (attempt - 1), LONGEST_WAIT)
                print(
                    f"{what}: {_short(error)}; attempt {attempt + 1} of {self.attempts} in "
                    f"{wait:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
                # Ranks that failed together do not come back together. SystemRandom leaves the
                # run's own random state alone.
                time.sleep(wait * random.SystemRandom().uniform(0.5, 1.0))
        raise AssertionError  # for the type checker: itertools.count never ends


@dataclass(frozen=True)
class ParquetFile:
    """What is known of a file without reading its data.

    :param url: local path or fsspec URL.
    :param footer: bytes of the footer, at the end of the file.
    :param rows: rows of each row group; :param sizes: bytes of each, decoded.
    :param digest: sha256 of the footer, which names the place and size of every column chunk.
    """

    url: str
    size: int
    footer: int
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    digest: str


def list_files(urls: Sequence[str], retries: Retries) -> list[ParquetFile]:
    """Reads the footers of these files, in their order.

    :raises UserError: a file that cannot be read or is no parquet file.
    """
    with ThreadPoolExecutor(LISTERS) as pool:
        return list(pool.map(lambda url: _list_file(url, retries), urls))


def read_row_group(file: ParquetFile, group: int, retries: Retries) -> pa.Table:
    """All columns of one row group, decoded.

    :raises BadRow: `damaged_row_group`, bytes that are there and cannot be decoded.
    :raises UserError: a file that cannot be read.
    """
    try:
        footer = _fetch(file.url, file.size, file.size - file.footer, file.size, retries)
        if hashlib.sha256(footer).hexdigest() != file.digest:
            raise UserError(
                f"{file.url} has changed since this run listed it; expected the same bytes as "
                "long as a run reads them. Run the same command again to list it anew."
            )
        metadata = pq.read_metadata(pa.BufferReader(footer))
        start, end = _byte_range(metadata.row_group(group))
        window = _Window(start, _fetch(file.url, file.size, start, end, retries), file.size)
        with pa.PythonFile(window, mode="r") as source:
            reader = pq.ParquetFile(source, metadata=metadata)
            table = reader.read_row_group(group, use_threads=False)
        if table.num_rows != file.rows[group]:
            raise ValueError(f"{table.num_rows} rows, the footer promised {file.rows[group]}")
        return table
    except UserError:
        raise
    except Exception as error:  # Arrow raises OSError and ValueError on damaged pages, among others
        raise BadRow(
            "damaged_row_group", f"row group {group} of {file.url}: {_short(error)}"
        ) from error


def _list_file(url: str, retries: Retries) -> ParquetFile:
    fs, path = url_to_fs(url)
    size = int(retries.run(url, lambda: fs.info(path))["size"])
    tail = _fetch(url, size, max(0, size - TAIL), size, retries)
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < 12 or tail[-4:] != MAGIC or footer > size:
        raise UserError(
            f"{url} is no whole parquet file: {size} bytes that do not end with a footer. Download "
            "it again, or leave its subset out of data.stream.datasets."
        )
    data = tail[-footer:]
    if footer > len(tail):
        data = _fetch(url, size, size - footer, size, retries)
    try:
        metadata = pq.read_metadata(pa.BufferReader(data))
    except Exception as error:
        raise UserError(
            f"the footer of {url} is damaged ({_short(error)}). Download the file again, or leave "
            "its subset out of data.stream.datasets."
        ) from error
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return ParquetFile(
        url=url,
        size=size,
        footer=footer,
        rows=tuple(group.num_rows for group in groups),
        sizes=tuple(group.total_byte_size for group in groups),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _fetch(url: str, size: int, start: int, end: int, retries: Retries) -> bytes:
    """Bytes start .. end of a file of `size` bytes."""

    def work() -> bytes:
        # Asked for anew each time: fsspec keeps one file system a process, also after a fork.
        fs, path = url_to_fs(url)
        # Without a cache exactly these bytes are requested, with the size none is asked for.
        with fs.open(path, "rb", cache_type="none", size=size) as file:
            file.seek(start)
            data: bytes = file.read(end - start)
        if len(data) != end - start:
            raise OSError(f"{len(data)} bytes from {start}, expected {end - start}")
        return data

    return retries.run(url, work)


def _byte_range(group: Any) -> tuple[int, int]:
    starts, ends = [], []
    for i in range(group.num_columns):
        column = group.column(i)
        first = column.data_page_offset
        if column.has_dictionary_page and column.dictionary_page_offset:
            first = min(first, column.dictionary_page_offset)
        starts.append(first)
        ends.append(first + column.total_compressed_size)
    return min(starts), max(ends)


class _Window(io.RawIOBase):
    """A file of which only the bytes from `start` on are at hand; elsewhere it reads as ended."""

    def __init__(self, start: int, data: bytes, size: int) -> None:
        self.start, self.data, self.size = start, memoryview(data), size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = base + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        offset = self.position - self.start
        piece = self.data[offset : offset + len(buffer)] if offset >= 0 else self.data[:0]
        buffer[: len(piece)] = piece
        self.position += len(piece)
        return len(piece)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
