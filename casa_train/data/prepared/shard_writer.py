"""Writing a split: tar shards one after the other, then index and meta file (`shards.py`).

A shard is finished when its index part, shard-000000.arrow, lies beside it. It also holds what the
shard was made from, so writing can go on after the last finished shard, however it was ended.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import webdataset

from casa_train.data.prepared.shard_index import (
    INDEX_FILE,
    merge_parts,
    part_path,
    read_part,
    write_part,
)
from casa_train.data.prepared.shards import FORMAT_VERSION, IMAGES_OF, META_FILE
from casa_train.data.sample import RATINGS, Sample
from casa_train.data.schemas.rows import MODALITIES, SCHEMAS, BadRow
from casa_train.data.tokens import TurnTokens
from casa_train.io.files import sha256, sync_file, write_atomic
from casa_train.modeling.image_processing_casa import ImageError, read_header

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # the others' are their names

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
        # The video that was stored last: the sample that has its frames, and they.
        self._video: tuple[str, list[bytes]] = "", []
        self._images_of: dict[str, str] = {}  # a sample without images of its own -> whose it shows
        self._tar: webdataset.TarWriter | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._rows)

    def write(self, key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> bool:
        """Adds one row; `row` is the dataset's row without its images.

        The frames of a video are stored once for all rows about it that follow each other.

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
        stored = {name: value for name, value in row.items() if name != IMAGES_OF}
        if sample.video and images and list(images) == self._video[1]:
            stored[IMAGES_OF] = self._images_of[key] = self._video[0]
        elif sample.video:
            self._video = key, list(images)
        members: dict[str, Any] = {"__key__": key}
        members["json"] = json.dumps(stored, sort_keys=True).encode()
        if key not in self._images_of:
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
                "caption_tokens": tokens.captions,
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
        for key, owner in self._images_of.items():
            for name in ("image_offsets", "image_sizes"):
                rows[key][name] = rows[owner][name]
        sync_file(self._path(".tmp"))
        os.replace(self._path(".tmp"), self._path())
        return self._path().stat().st_size


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
