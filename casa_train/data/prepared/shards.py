"""Webdataset tar shards with a byte-offset index, read at random; `shard_writer.py` writes them.

A dataset directory holds one folder a split::

    DIR/train/shard-000000.tar     KEY.json (the row without its images) + KEY.0.png, KEY.1.jpg ...
    DIR/train/index.arrow          one row a sample: where its members lie, how long it is
    DIR/train/meta.json            schema, tokenizer fingerprint, every shard with its size

A video that several samples are about is stored once: the first of them in the tar has its frames,
the JSON of the others names that sample under "images_of". Their rows in the index lead straight to
those frames, so whoever reads by the index need not know.

The tars open with plain webdataset. Training reads members by offset and never scans a tar.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from casa_train.data.prepared.shard_index import ADDED, INDEX_FILE, INDEX_SCHEMA, open_index
from casa_train.data.sample import Sample
from casa_train.data.schemas.rows import SCHEMAS, BadRow
from casa_train.errors import UserError
from casa_train.io.files import sha256

META_FILE = "meta.json"
FORMAT_VERSION = 3
UNCOUNTED = 2  # the same but for the counts of tokens, which knew no chat template
IMAGES_OF = "images_of"  # in a stored row: the key of the sample before it that has its images
OPEN_SHARDS = 64  # files that a process keeps open


class Split:
    """One split of a prepared dataset: validated at construction, then read at random.

    The index stays on disk and is read by memory map, so any number of processes share it. Pickles
    as its path; what was validated once is not validated again.

    :param uncounted: take a split of an earlier version, too, to count its tokens anew.
    :raises UserError: a missing or empty directory, or an index that does not match its shards.
    """

    def __init__(self, directory: Path, check: bool = True, uncounted: bool = False) -> None:
        self.directory = Path(directory)
        self.meta = self._read_meta(uncounted)
        self.index = self._read_index(check)
        there = [n for n in INDEX_SCHEMA.names if n not in ADDED or n in self.index.column_names]
        columns = {n: self.index.column(n).chunk(0) for n in there}
        self._keys, self._sources = columns["key"], columns["source"]
        self._numbers = {n: columns[n].to_numpy() for n in ("shard", "json_offset", "json_size")}
        self._lists = {
            field.name: (columns[field.name].flatten().to_numpy(), columns[field.name].offsets)
            for field in INDEX_SCHEMA
            if field.name in there and pa.types.is_list(field.type)
        }
        self._lists = {n: (values, o.to_numpy()) for n, (values, o) in self._lists.items()}
        self._files: OrderedDict[int, io.BufferedReader] = OrderedDict()
        if check:
            self._check_shards()

    def __reduce__(self) -> tuple[type[Split], tuple[Path, bool]]:
        return Split, (self.directory, False)

    def __len__(self) -> int:
        return int(self.index.num_rows)

    @property
    def fingerprint(self) -> str:
        """Identifies shards and index: the digest of the index file, which names all offsets."""
        return str(self.meta["index_sha256"])

    @property
    def tokenizer_fingerprint(self) -> str:
        return str(self.meta["tokenizer_fingerprint"])

    @property
    def turns_fingerprint(self) -> str:
        """Identifies how the chat template makes tokens of turns; empty if none was known yet."""
        return str(self.meta.get("turns_fingerprint", ""))

    @property
    def template(self) -> dict[str, Any]:
        """Fields of the chat template that its tokens were counted with."""
        fields: dict[str, Any] = json.loads(self.meta.get("template", "{}"))
        return fields

    @property
    def modality(self) -> str:
        """ "image", or "video" where the images of a sample are frames of one video."""
        return str(self.meta["modality"])

    @property
    def origin(self) -> dict[str, str]:
        """`dataset` and `subset` that a recipe prepared; empty for other data."""
        return dict(self.meta["origin"])

    def key(self, row: int) -> str:
        return str(self._keys[row].as_py())

    def source(self, row: int) -> str:
        return str(self._sources[row].as_py())

    def list_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A list column as (values, offsets): sample i owns values[offsets[i]:offsets[i + 1]].

        One that an earlier version did not write is a column of empty lists.
        """
        if name in ADDED and name not in self._lists:
            return np.zeros(0, np.int32), np.zeros(len(self) + 1, np.int32)
        return self._lists[name]

    def turn_ratings(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(values, offsets) of one of `RATINGS`: a number from 1 to 5 a turn, 0 if not rated."""
        return self._lists[name]

    def read(self, row: int, with_images: bool = True) -> Sample:
        """Reads one sample by its byte offsets.

        :param with_images: otherwise every image is empty, and only the text is read.
        :raises BadRow: when the bytes do not hold what the index says.
        """
        shard, offset, size = (int(self._numbers[n][row]) for n in self._numbers)
        key = self.key(row)
        raw = self._pread(shard, offset, size)
        try:
            record = json.loads(raw)
            if not isinstance(record, dict):
                raise ValueError(f"holds {type(record).__name__}, expected an object")
        except ValueError as error:
            name = self.meta["shards"][shard]["name"]
            raise BadRow("unreadable_json", f"sample {key} in {name}: {error}") from error
        offsets, bounds = self._lists["image_offsets"]
        sizes, _ = self._lists["image_sizes"]
        images = [
            self._pread(shard, int(offsets[i]), int(sizes[i])) if with_images else b""
            for i in range(bounds[row], bounds[row + 1])
        ]
        return SCHEMAS[self.meta["schema"]](key, record, images)

    def __iter__(self) -> Iterator[Sample]:
        return (self.read(row) for row in range(len(self)))

    def _pread(self, shard: int, offset: int, size: int) -> bytes:
        name = self.meta["shards"][shard]["name"]
        file = self._open(shard)
        try:
            data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BadRow("unreadable_shard", f"{name}: {error}") from error
        if len(data) != size:
            raise BadRow("cut_shard", f"{name} ends before byte {offset + size}")
        return data

    def _open(self, shard: int) -> io.BufferedReader:
        """The file of a shard, one of the few that are kept open.

        :raises UserError: it is gone; that is no bad sample but thousands of lost ones.
        """
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.directory / self.meta["shards"][shard]["name"]
        try:
            self._files[shard] = path.open("rb")
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened any more: {error.strerror}; it was there when this run "
                "started. Put it back and give the same command again: the run goes on from its "
                "last checkpoint."
            ) from error
        if len(self._files) > OPEN_SHARDS:
            self._files.popitem(last=False)[1].close()
        return self._files[shard]

    def _read_meta(self, uncounted: bool) -> dict[str, Any]:
        path = self.directory / META_FILE
        if not path.is_file():
            state = "is empty or unfinished" if self.directory.is_dir() else "does not exist"
            raise UserError(
                f"data directory {self.directory} {state}: expected {META_FILE}, {INDEX_FILE} and "
                "shard-*.tar files. Prepare it with 'python -m data_recipes NAME --out DIR' and "
                "name DIR/SPLIT."
            )
        try:
            meta: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error}); run the recipe again.") from error
        if meta.get("format") == UNCOUNTED and meta.get("schema") in SCHEMAS:
            if uncounted:
                return meta
            count = ["python", "-m", "data_recipes", "retokenize", "--data", str(self.directory)]
            count += "--tokenizer NAME --template TEMPLATE --out NEW".split()
            raise UserError(
                f"{path} was written before lengths had the chat template in them: count its "
                f"tokens anew with\n  {shlex.join(count)}\n(images stay where they are; without "
                "--template it is the tokenizer's own) and point the configuration at NEW."
            )
        if meta.get("format") != FORMAT_VERSION or meta.get("schema") not in SCHEMAS:
            raise UserError(
                f"{path}: format {meta.get('format')!r} with schema {meta.get('schema')!r}; this "
                f"version reads format {FORMAT_VERSION} with schemas {sorted(SCHEMAS)}. Run the "
                "recipe again."
            )
        return meta

    def _read_index(self, check: bool) -> pa.Table:
        path = self.directory / INDEX_FILE
        if not path.is_file():
            raise UserError(f"{path} is missing; run the recipe again to rebuild shards and index.")
        digest = sha256(path) if check else self.meta["index_sha256"]
        if digest != self.meta["index_sha256"]:
            raise UserError(
                f"{path} does not belong to {self.directory / META_FILE}: its sha256 is "
                f"{digest[:12]}..., the meta file expects {self.meta['index_sha256'][:12]}.... "
                "Run the recipe again."
            )
        try:
            table = open_index(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{path} cannot be read: {error}. Copy it again or run the recipe again."
            ) from error
        if table.num_rows == 0:
            raise UserError(
                f"{path} lists no sample (skipped by the recipe: {self.meta['skipped']}); "
                "prepare the dataset with at least one usable row."
            )
        return table

    def _check_shards(self) -> None:
        # Shards follow each other in the index.
        bounds = np.searchsorted(self._numbers["shard"], np.arange(len(self.meta["shards"]) + 1))
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
            for row in {int(bounds[number]), int(bounds[number + 1]) - 1}:
                self._check_member(path, row)

    def _check_member(self, path: Path, row: int) -> None:
        """Sizes can agree by chance, since tars are padded: the names of members do not."""
        key = self.key(row)
        with path.open("rb") as file:
            file.seek(int(self._numbers["json_offset"][row]) - tarfile.BLOCKSIZE)
            found = file.read(100).split(b"\0")[0].decode(errors="replace")
        if found != f"{key}.json":
            raise UserError(
                f"index and shards of {self.directory} do not match: the index expects "
                f"{key}.json in {path.name}, found is {found[:60]!r}. Copy the shard again or run "
                "the recipe again."
            )
