"""Webdataset tar shards with a byte-offset index: written once, read at random.

A dataset directory holds one folder a split::

    DIR/train/shard-000000.tar     KEY.json (the row without its images) + KEY.0.png, KEY.1.jpg ...
    DIR/train/index.arrow          one row a sample: where its members lie, how long it is
    DIR/train/meta.json            schema, tokenizer fingerprint, every shard with its size

The tars open with plain webdataset. Training reads members by offset and never scans a tar.

A shard is finished when its index part, shard-000000.arrow, lies beside it. It also holds what the
shard was made from, so writing can go on after the last finished shard, however it was ended.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import webdataset

from casa_train.data.prepared.shard_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    merge_parts,
    open_index,
    part_path,
    read_part,
    write_index,
    write_part,
)
from casa_train.data.sample import RATINGS, Sample
from casa_train.data.schemas.rows import MODALITIES, SCHEMAS, BadRow
from casa_train.data.tokens import TurnTokens
from casa_train.errors import UserError
from casa_train.io.files import sha256, sync_file, write_atomic
from casa_train.modeling.image_processing_casa import ImageError, read_header

META_FILE = "meta.json"
FORMAT_VERSION = 3
UNCOUNTED = 2  # the same but for the counts of tokens, which knew no chat template
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # the others' are their names
OPEN_SHARDS = 64  # files that a process keeps open

Count = Callable[[Sample], TurnTokens]


class Shard:
    """Writes one tar shard and its index part. Nothing is finished before `finish`.

    :param number: of the shard, from 0; a shard of that number is overwritten.
    :param count: the tokens of a sample; `tokens.TurnCounter`.
    """

    def __init__(self, directory: Path, number: int, schema: str, count: Count) -> None:
        self.directory, self.number = directory, number
        self.schema = schema
        self.count = count
        self.skipped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()
        self._rows: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        self._tar: webdataset.TarWriter | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> bool:
        """Adds one row; `row` is the dataset's row without its images.

        :return: False when the row cannot be used; it is counted in `skipped` by its reason.
        """
        try:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", key) or key in self._keys:
                raise BadRow("bad_key", f"{key!r} cannot name a tar member, or does already")
            sample = SCHEMAS[self.schema](key, row, images)
            headers = [_header(key, i, data) for i, data in enumerate(images)]
            tokens = self.count(sample)
        except BadRow as error:
            self.skipped[error.reason] += 1
            return False
        if self._tar is None:
            self._tar = webdataset.TarWriter(str(self._path(".tmp")), mtime=0, user="", group="")
        members: dict[str, Any] = {"__key__": key, "json": json.dumps(row, sort_keys=True).encode()}
        for i, (data, (extension, _, _)) in enumerate(zip(images, headers, strict=True)):
            members[f"{i}.{extension}"] = data
        self._tar.write(members)
        self._keys.add(key)
        self.repaired.update(sample.repaired)
        if tokens.special:
            self.repaired["special_tokens_as_text"] += 1
        self._rows.append(
            {
                "key": key,
                "source": sample.source,
                "shard": 0,
                "widths": [width for _, width, _ in headers],
                "heights": [height for _, _, height in headers],
                "user_tokens": tokens.user,
                "assistant_tokens": tokens.assistant,
                **turn_columns(sample),
            }
        )
        return True

    def finish(self, consumed: Mapping[str, Any]) -> None:
        """Closes the shard and writes its part; a shard without a sample has no tar.

        :param consumed: what the shard was made from; `finished_shard` returns it.
        """
        size = self._close_tar()
        tokens = sum(sum(row["user_tokens"]) + sum(row["assistant_tokens"]) for row in self._rows)
        write_part(
            self.directory,
            self.number,
            self._rows,
            {
                "bytes": size,
                "samples": len(self._rows),
                "images": sum(len(row["widths"]) for row in self._rows),
                "text_tokens": tokens,
                "skipped": self.skipped,
                "mended": self.repaired,
                "consumed": consumed,
            },
        )

    def _path(self, suffix: str = "") -> Path:
        return self.directory / (shard_name(self.number) + suffix)

    def _close_tar(self) -> int:
        """Closes the tar, notes where its members lie and gives it its name; returns its size."""
        if self._tar is None:
            return 0
        self._tar.close()
        rows = {row["key"]: row for row in self._rows}
        for row in self._rows:
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
        sync_file(self._path(".tmp"))
        os.replace(self._path(".tmp"), self._path())
        return self._path().stat().st_size


class ShardWriter:
    """Writes the rows of one split, one after the other, as shards; `close` makes the index.

    In a directory where an unfinished writer was ended, it goes on after the last finished shard.

    :ivar consumed: rows given to `write` that the finished shards cover; skip as many.
    :param count: the tokens of a sample; `tokens.TurnCounter`.
    :param fingerprints: of what counts; training refuses others.
    """

    def __init__(
        self,
        directory: Path,
        schema: str,
        count: Count,
        fingerprints: Mapping[str, str],
        samples_per_shard: int = 2000,
    ) -> None:
        self.directory, self.schema = directory, schema
        self.count, self.fingerprints = count, fingerprints
        self.samples_per_shard = samples_per_shard
        self._skipped: Counter[str] = Counter()
        self.consumed = number = 0
        while (shard := finished_shard(directory, number)) is not None:
            self.consumed = int(shard["consumed"]["rows"])
            self._skipped.update(shard["skipped"])
            number += 1
        self._seen = self.consumed
        self._shard = Shard(directory, number, schema, count)

    @property
    def skipped(self) -> Counter[str]:
        """Rows that could not be used, by reason."""
        return self._skipped + self._shard.skipped

    def write(self, key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> bool:
        """Adds one row; see `Shard.write`."""
        self._seen += 1
        written = self._shard.write(key, row, images)
        if len(self._shard) >= self.samples_per_shard:
            self._next_shard()
        return written

    def close(self) -> int:
        """Finishes the last shard, writes index and meta; returns the number of samples."""
        self._next_shard()
        meta = finish_split(self.directory, self._shard.number, self.schema, self.fingerprints)
        return int(meta["samples"])

    def _next_shard(self) -> None:
        self._shard.finish({"rows": self._seen})
        self._skipped.update(self._shard.skipped)
        self._shard = Shard(self.directory, self._shard.number + 1, self.schema, self.count)


def shard_name(number: int) -> str:
    """File name of a shard's tar."""
    return f"shard-{number:06d}.tar"


def finished_shard(directory: Path, number: int) -> dict[str, Any] | None:
    """What is known of a finished shard of an unfinished split: `consumed`, `skipped`, ...

    None where the shard has to be written; a tar without its part, or of another size, has to.
    """
    shard = read_part(directory, number)
    if shard is None:
        return None
    path = directory / shard_name(number)
    whole = not shard["bytes"] or (path.is_file() and path.stat().st_size == shard["bytes"])
    return shard if whole else None


def finish_split(
    directory: Path,
    shards: int,
    schema: str,
    fingerprints: Mapping[str, str],
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Makes index and meta file out of `shards` finished shards; the parts go.

    :param fingerprints: of what counts (`TurnCounter.fingerprints`); training refuses others.
    :param origin: `dataset` and `subset`, by which double counting is found.
    :return: the content of the meta file.
    """
    parts = []
    for number in range(shards):
        part = finished_shard(directory, number)
        if part is None:
            raise ValueError(f"shard {number} of {directory} is not finished")
        parts.append(part)
    filled = [number for number, part in enumerate(parts) if part["samples"]]
    merge_parts(directory, filled)
    totals: dict[str, Counter[str]] = {"skipped": Counter(), "mended": Counter()}
    for name, total in totals.items():
        for part in parts:
            total.update(part[name])
    meta = {
        "format": FORMAT_VERSION,
        "schema": schema,
        "modality": MODALITIES[schema],
        "origin": dict(origin or {}),
        **fingerprints,
        **{name: sum(part[name] for part in parts) for name in ("samples", "images")},
        "text_tokens": sum(part["text_tokens"] for part in parts),
        **{name: dict(sorted(total.items())) for name, total in totals.items()},
        "shards": [{"name": shard_name(n), "bytes": parts[n]["bytes"]} for n in filled],
        "index_sha256": sha256(directory / INDEX_FILE),
    }
    write_atomic(directory / META_FILE, json.dumps(meta, indent=1) + "\n")
    for number in range(shards):
        part_path(directory, number).unlink()
    return meta


def recount(
    split: Split, directory: Path, count: Count, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Makes another index of a split, with the lengths of another tokenizer or chat template.

    It goes to a new directory; the shards are linked, not copied.

    :return: the content of the meta file.
    :raises BadRow: a sample that cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    counts: dict[str, list[list[int]]] = {"user_tokens": [], "assistant_tokens": []}
    special = 0
    columns: dict[str, list[list[int]]] = {"image_turns": [], **{name: [] for name in RATINGS}}
    for row in range(len(split)):
        sample = split.read(row, with_images=False)
        tokens = count(sample)
        special += tokens.special
        counts["user_tokens"].append(tokens.user)
        counts["assistant_tokens"].append(tokens.assistant)
        for name, values in turn_columns(sample).items():  # an older index may know other turns
            columns[name].append(values)
    table = split.index
    for name, lists in {**counts, **columns}.items():
        field = INDEX_SCHEMA.field(name)
        table = table.set_column(
            INDEX_SCHEMA.get_field_index(name), field, pa.array(lists, field.type)
        )
    write_index(directory, table)
    for shard in split.meta["shards"]:
        link = directory / shard["name"]
        link.unlink(missing_ok=True)
        link.symlink_to((split.directory / shard["name"]).resolve())
    repaired = {**split.meta["mended"], "special_tokens_as_text": special}
    meta = {
        **split.meta,
        "format": FORMAT_VERSION,
        **fingerprints,
        "mended": {name: n for name, n in sorted(repaired.items()) if n},
        "text_tokens": sum(sum(values) for lists in counts.values() for values in lists),
        "index_sha256": sha256(directory / INDEX_FILE),
    }
    write_atomic(directory / META_FILE, json.dumps(meta, indent=1) + "\n")
    return meta


def turn_columns(sample: Sample) -> dict[str, list[int]]:
    """The columns of the index that say something of every turn, or of the turn of every image."""
    turn_of = {i: number for number, turn in enumerate(sample.turns) for i in turn.images}
    return {
        "image_turns": [turn_of[i] for i in range(len(sample.images))],
        **{name: [turn.ratings[i] for turn in sample.turns] for i, name in enumerate(RATINGS)},
    }


def _header(key: str, i: int, data: bytes) -> tuple[str, int, int]:
    """(file extension, width, height) from the image header, without decoding pixels."""
    try:
        image_format, width, height = read_header(data, f"image {i} of sample {key}")
    except ImageError as error:
        raise BadRow(error.reason, str(error)) from error
    return EXTENSIONS.get(image_format, image_format.lower()), width, height


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
        columns = {n: self.index.column(n).chunk(0) for n in INDEX_SCHEMA.names}
        self._keys, self._sources = columns["key"], columns["source"]
        self._numbers = {n: columns[n].to_numpy() for n in ("shard", "json_offset", "json_size")}
        self._lists = {
            field.name: (columns[field.name].flatten().to_numpy(), columns[field.name].offsets)
            for field in INDEX_SCHEMA
            if pa.types.is_list(field.type)
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
        """A list column as (values, offsets): sample i owns values[offsets[i]:offsets[i + 1]]."""
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
                f"{path} cannot be opened any more: {error.strerror}; it was there when this "
                "run started. Put it back and give the same command again: the run goes on "
                "from its last checkpoint."
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
                f"{key}.json in {path.name}, found is {found[:60]!r}. Copy the shard "
                "again or run the recipe again."
            )
