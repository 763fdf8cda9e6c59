"""Webdataset tar shards with a byte-offset index: written once, read at random.

A dataset directory holds one folder a split::

    DIR/train/shard-000000.tar     KEY.json (the row without its images) + KEY.0.png, KEY.1.jpg ...
    DIR/train/index.parquet        one row a sample: where its members lie, how long it is
    DIR/train/meta.json            schema, tokenizer fingerprint, every shard with its size

The tars open with plain webdataset. Training reads members by offset and never scans a tar.
"""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import webdataset
from PIL import Image

from casa_train.data.sample import Sample
from casa_train.data.schemas import SCHEMAS, BadRow
from casa_train.errors import UserError
from casa_train.files import sha256, write_atomic

INDEX_FILE = "index.parquet"
META_FILE = "meta.json"
FORMAT_VERSION = 1

INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.string()),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int32()),
        ("image_offsets", pa.list_(pa.int64())),
        ("image_sizes", pa.list_(pa.int32())),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("user_tokens", pa.list_(pa.int32())),
        ("assistant_tokens", pa.list_(pa.int32())),
    ]
)


class ShardWriter:
    """Writes rows of one split as tar shards and, on `close`, their index.

    :param count_tokens: text -> number of tokens, without special tokens.
    :param tokenizer_fingerprint: what identifies that tokenizer; training refuses another one.
    """

    def __init__(
        self,
        directory: Path,
        schema: str,
        count_tokens: Callable[[str], int],
        tokenizer_fingerprint: str,
        samples_per_shard: int = 2000,
    ) -> None:
        self.directory = directory
        self.schema = schema
        self.count_tokens = count_tokens
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.samples_per_shard = samples_per_shard
        self.skipped: dict[str, int] = {}
        self._shards: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._open_rows: list[dict[str, Any]] = []
        self._writer: webdataset.TarWriter | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> bool:
        """Adds one row; `row` is the dataset's row without its images.

        :return: False when the row cannot be used; it is counted in `skipped` by its reason.
        """
        try:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
                raise BadRow("bad_key", f"{key!r} cannot name a tar member")
            sample = SCHEMAS[self.schema](key, row, images)
            sizes = [_header_size(key, i, data) for i, data in enumerate(images)]
        except BadRow as error:
            self.skipped[error.reason] = self.skipped.get(error.reason, 0) + 1
            return False
        if self._writer is None:
            self._writer = webdataset.TarWriter(str(self._path(".tmp")), mtime=0, user="", group="")
        members: dict[str, Any] = {"__key__": key, "json": json.dumps(row, sort_keys=True).encode()}
        for i, (data, (image_format, _, _)) in enumerate(zip(images, sizes, strict=True)):
            members[f"{i}.{image_format}"] = data
        self._writer.write(members)
        self._open_rows.append(
            {
                "key": key,
                "source": sample.source,
                "shard": len(self._shards),
                "widths": [width for _, width, _ in sizes],
                "heights": [height for _, _, height in sizes],
                "user_tokens": [
                    sum(self.count_tokens(part) for part in turn.user if isinstance(part, str))
                    for turn in sample.turns
                ],
                "assistant_tokens": [self.count_tokens(turn.assistant) for turn in sample.turns],
            }
        )
        if len(self._open_rows) >= self.samples_per_shard:
            self._finish_shard()
        return True

    def close(self) -> int:
        """Finishes the last shard, writes index and meta; returns the number of samples."""
        self._finish_shard()
        table = pa.Table.from_pylist(self._rows, schema=INDEX_SCHEMA)
        pq.write_table(table, self.directory / (INDEX_FILE + ".tmp"))
        os.replace(self.directory / (INDEX_FILE + ".tmp"), self.directory / INDEX_FILE)
        meta = {
            "format": FORMAT_VERSION,
            "schema": self.schema,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "samples": len(self._rows),
            "skipped": self.skipped,
            "shards": self._shards,
            "index_sha256": sha256(self.directory / INDEX_FILE),
        }
        write_atomic(self.directory / META_FILE, json.dumps(meta, indent=1) + "\n")
        return len(self._rows)

    def _path(self, suffix: str = "") -> Path:
        return self.directory / f"shard-{len(self._shards):06d}.tar{suffix}"

    def _finish_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._writer = None
        rows = {row["key"]: row for row in self._open_rows}
        for row in self._open_rows:
            row["image_offsets"] = [0] * len(row["widths"])
            row["image_sizes"] = [0] * len(row["widths"])
        with tarfile.open(self._path(".tmp")) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                row = rows[key]
                if extension == "json":
                    row["json_offset"], row["json_size"] = member.offset_data, member.size
                else:  # the writer sorts members by name, so 10.png stands before 2.png
                    image = int(extension.partition(".")[0])
                    row["image_offsets"][image] = member.offset_data
                    row["image_sizes"][image] = member.size
        os.replace(self._path(".tmp"), self._path())
        self._rows += self._open_rows
        self._open_rows = []
        self._shards.append({"name": self._path().name, "bytes": self._path().stat().st_size})


def _header_size(key: str, i: int, data: bytes) -> tuple[str, int, int]:
    """(file extension, width, height) from the image header, without decoding pixels."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return (image.format or "img").lower().replace("jpeg", "jpg"), *image.size
    except Exception as error:  # Pillow raises many types on damaged headers
        raise BadRow("unreadable_image", f"image {i} of sample {key}: {error}") from error


class Split:
    """One split of a prepared dataset: validated at construction, then read at random.

    Pickles as its path, so that loader workers open their own files.

    :raises UserError: a missing or empty directory, or an index that does not match its shards.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self.meta = self._read_meta()
        self.index = self._read_index()
        self._check_shards()
        self._files: dict[int, io.BufferedReader] = {}
        self._columns = {
            name: self.index.column(name).combine_chunks() for name in INDEX_SCHEMA.names
        }

    def __reduce__(self) -> tuple[type[Split], tuple[Path]]:
        return Split, (self.directory,)

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def fingerprint(self) -> str:
        """Identifies shards and index: the digest of the index file, which names all offsets."""
        return str(self.meta["index_sha256"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.meta["tokenizer_fingerprint"])

    def key(self, row: int) -> str:
        return str(self._columns["key"][row].as_py())

    def source(self, row: int) -> str:
        return str(self._columns["source"][row].as_py())

    def list_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column as (values, offsets): sample i owns values[offsets[i]:offsets[i + 1]]."""
        column = self._columns[name]
        return column.flatten().to_numpy(), column.offsets.to_numpy()

    def read(self, row: int) -> Sample:
        """Reads one sample by its byte offsets.

        :raises BadRow: when the bytes do not hold what the index says.
        """
        get = {name: column[row].as_py() for name, column in self._columns.items()}
        key = get["key"]
        raw = self._pread(get["shard"], get["json_offset"], get["json_size"])
        try:
            record = json.loads(raw)
        except ValueError as error:
            name = self.meta["shards"][get["shard"]]["name"]
            raise BadRow("unreadable_json", f"sample {key} in {name}: {error}") from error
        images = [
            self._pread(get["shard"], offset, size)
            for offset, size in zip(get["image_offsets"], get["image_sizes"], strict=True)
        ]
        return SCHEMAS[self.meta["schema"]](key, record, images)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(row) for row in range(len(self)))

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        if shard not in self._files:
            self._files[shard] = (self.directory / self.meta["shards"][shard]["name"]).open("rb")
        data = os.pread(self._files[shard].fileno(), size, offset)
        if len(data) != size:
            name = self.meta["shards"][shard]["name"]
            raise BadRow("cut_shard", f"{name} ends before byte {offset + size}")
        return data

    def _read_meta(self) -> dict[str, Any]:
        path = self.directory / META_FILE
        if not path.is_file():
            state = "is empty or unfinished" if self.directory.is_dir() else "does not exist"
            raise UserError(
                f"data directory {self.directory} {state}: expected {META_FILE}, {INDEX_FILE} and "
                "shard-*.tar files. Prepare it with 'python -m data_recipes NAME --out DIR' and "
                "point data.sources.NAME.path at DIR/SPLIT."
            )
        try:
            meta: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); run the recipe again.") from error
        if meta.get("format") != FORMAT_VERSION or meta.get("schema") not in SCHEMAS:
            raise UserError(
                f"{path}: format {meta.get('format')!r} with schema {meta.get('schema')!r}; this "
                f"version reads format {FORMAT_VERSION} with schemas {sorted(SCHEMAS)}. Run the "
                "recipe again."
            )
        return meta

    def _read_index(self) -> pa.Table:
        path = self.directory / INDEX_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing; run the recipe again to rebuild shards and index.")
        digest = sha256(path)
        if digest != self.meta["index_sha256"]:
            raise UserError(
                f"{path} does not belong to {self.directory / META_FILE}: its sha256 is "
                f"{digest[:12]}..., the meta file expects {self.meta['index_sha256'][:12]}.... "
                "Run the recipe again."
            )
        table = pq.read_table(path)
        if table.num_rows == 0:
            raise UserError(
                f"{path} lists no sample (skipped by the recipe: {self.meta['skipped']}); "
                "prepare the dataset with at least one usable row."
            )
        return table

    def _check_shards(self) -> None:
        numbers = self.index.column("shard").to_numpy()
        for number, shard in enumerate(self.meta["shards"]):
            path = self.directory / shard["name"]
            found = path.stat().st_size if path.is_file() else None
            if found != shard["bytes"]:
                state = "is missing" if found is None else f"has {found} bytes"
                raise UserError(
                    f"index and shards of {self.directory} do not match: {shard['name']} {state}, "
                    f"the index expects {shard['bytes']} bytes. Copy the shard again or run the "
                    "recipe again."
                )
            rows = np.flatnonzero(numbers == number)
            for row in {int(rows[0]), int(rows[-1])} if len(rows) else ():
                self._check_member(path, row)

    def _check_member(self, path: Path, row: int) -> None:
        """Sizes can agree by chance, since tars are padded: the names of members do not."""
        record = self.index.slice(row, 1).to_pylist()[0]
        with path.open("rb") as file:
            file.seek(record["json_offset"] - tarfile.BLOCKSIZE)
            found = file.read(100).split(b"\0")[0].decode(errors="replace")
        if found != f"{record['key']}.json":
            raise UserError(
                f"index and shards of {self.directory} do not match: the index expects "
                f"{record['key']}.json in {path.name}, found is {found[:60]!r}. Copy the shard "
                "again or run the recipe again."
            )
