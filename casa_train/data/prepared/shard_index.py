"""The index of a split: one Arrow IPC file, read by memory map.

While a recipe runs, each finished shard has its own part beside it; at the end the parts become
one file with one record batch, so that every process of a node reads the same pages of memory and
no row is ever converted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from casa_train.data.sample import RATINGS
from casa_train.io.files import sync_directory, sync_file

INDEX_FILE = "index.arrow"
INDEX_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("source", pa.dictionary(pa.int32(), pa.string())),
        ("shard", pa.int32()),
        ("json_offset", pa.int64()),
        ("json_size", pa.int32()),
        ("image_offsets", pa.list_(pa.int64())),
        ("image_sizes", pa.list_(pa.int32())),
        ("widths", pa.list_(pa.int32())),
        ("heights", pa.list_(pa.int32())),
        ("image_turns", pa.list_(pa.int32())),  # for each image, the turn that shows it
        ("user_tokens", pa.list_(pa.int32())),
        ("assistant_tokens", pa.list_(pa.int32())),
        *((name, pa.list_(pa.int8())) for name in RATINGS),  # 0: not rated
        # For each frame of a live sample, the text tokens behind it; empty of every other sample.
        ("caption_tokens", pa.list_(pa.int32())),
    ]
)
ADDED = ("caption_tokens",)  # columns that splits of this format may lack: they are older
_SHARD = b"shard"  # key of the part's own metadata


def part_path(directory: Path, number: int) -> Path:
    """Where the index part of shard `number` lies while the split is unfinished."""
    return directory / f"shard-{number:06d}.arrow"


def write_part(
    directory: Path, number: int, rows: Sequence[Mapping[str, Any]], shard: Mapping[str, Any]
) -> None:
    """Writes the index rows of one shard with what else is to be known of it, at once."""
    schema = INDEX_SCHEMA.with_metadata({_SHARD: json.dumps(shard, sort_keys=True).encode()})
    _write(part_path(directory, number), pa.Table.from_pylist(list(rows), schema=schema))


def read_part(directory: Path, number: int) -> dict[str, Any] | None:
    """What `write_part` was given as `shard`, or None where the shard is not finished."""
    path = part_path(directory, number)
    if not path.is_file():
        return None
    with pa.memory_map(str(path)) as source:
        shard: dict[str, Any] = json.loads(pa.ipc.open_file(source).schema.metadata[_SHARD])
    return shard


def merge_parts(directory: Path, numbers: Sequence[int]) -> int:
    """Makes the index out of the parts with these numbers; returns the number of samples.

    Column `shard` becomes the position in `numbers`.
    """
    tables = []
    for position, number in enumerate(numbers):
        table = open_index(part_path(directory, number))
        shard = pa.array([position], pa.int32()).take(pa.array([0] * len(table), pa.int32()))
        tables.append(
            table.set_column(
                INDEX_SCHEMA.get_field_index("shard"), "shard", shard
            ).replace_schema_metadata()
        )
    # Of a recipe that an earlier version began, parts may lack a column.
    tables = [with_added(table) for table in tables]
    merged = pa.concat_tables([INDEX_SCHEMA.empty_table(), *tables])
    write_index(directory, merged)
    return int(merged.num_rows)


def write_index(directory: Path, table: pa.Table) -> None:
    """Writes the index of a split as one record batch."""
    _write(directory / INDEX_FILE, table.unify_dictionaries().combine_chunks())


def open_index(path: Path) -> pa.Table:
    """The table of an index or of a part, over a memory map: no column is copied.

    :raises pyarrow.ArrowInvalid: a damaged file.
    """
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def with_added(table: pa.Table) -> pa.Table:
    """The table with every column of `ADDED`, of empty lists where it lacks one."""
    for name in ADDED:
        if name not in table.column_names:
            field = INDEX_SCHEMA.field(name)
            offsets = pa.array([0], pa.int32()).take(pa.array([0] * (len(table) + 1), pa.int32()))
            empty = pa.ListArray.from_arrays(offsets, pa.array([], field.type.value_type))
            table = table.append_column(field, empty)
    return table


def _write(path: Path, table: pa.Table) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    sync_file(temporary)
    os.replace(temporary, path)
    sync_directory(path.parent)
