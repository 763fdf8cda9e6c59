"""The index of a split made anew for another tokenizer or chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from casa_train.data.prepared.shard_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    with_added,
    write_index,
)
from casa_train.data.prepared.shard_writer import Count, turn_columns
from casa_train.data.prepared.shards import FORMAT_VERSION, META_FILE, Split
from casa_train.data.sample import RATINGS
from casa_train.io.files import sha256, write_atomic


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
    names = "image_turns", "caption_tokens", *RATINGS
    columns: dict[str, list[list[int]]] = {name: [] for name in names}
    for row in range(len(split)):
        sample = split.read(row, with_images=False)
        tokens = count(sample)
        special += tokens.special
        counts["user_tokens"].append(tokens.user)
        counts["assistant_tokens"].append(tokens.assistant)
        columns["caption_tokens"].append(tokens.captions)
        for name, values in turn_columns(sample).items():  # an older index may know other turns
            columns[name].append(values)
    table = with_added(split.index)
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
