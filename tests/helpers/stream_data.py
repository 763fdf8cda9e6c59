"""Directories in the published format of FineVision, and a stream's loaders over them."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from casa_train.config.data_schema import DataConfig, StreamConfig, StreamDatasetConfig
from casa_train.data.stream.stream_loader import StreamLoader
from casa_train.data.stream.stream_source import StreamSource
from casa_train.data.stream.subsets import open_subset
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
# The columns of the dataset card, in its order.
SCHEMA = pa.schema(
    [
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("texts", pa.list_(pa.struct([("user", pa.string()), ("assistant", pa.string())]))),
        ("source", pa.string()),
        *(
            field
            for name in RATINGS
            for field in (
                (f"{name}_ratings", pa.list_(pa.int64())),
                (f"{name}_min", pa.int64()),
            )
        ),
    ]
)

OF_STREAM = {field.name for field in fields(StreamConfig)}


def changed(data: DataConfig, **changes: Any) -> DataConfig:
    """With other values of fields, of those of `data.stream`, too."""
    stream = {name: changes.pop(name) for name in [*changes] if name in OF_STREAM}
    return replace(data, **changes, stream=replace(data.stream, **stream))


SEED = 3
# Twelve packs a step over twelve lanes: a lane's block is as long as `balance_block` says.
SETTINGS = changed(
    DataConfig(text_tokens=120, image_tokens=40, packs_per_step=12, balance_block=2, open_packs=4),
    lanes=12,
    open_units=2,
    attempts=1,
    retry_seconds=0,
)


@lru_cache
def png(width: int, height: int, colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 80, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def row(subset: str, number: int, turns: int = 1, images: int = 1) -> dict[str, Any]:
    """A row whose lengths differ from those of its neighbours."""
    pictures = [png(28 * (1 + (number + i) % 3), 28, number % 256) for i in range(images)]
    texts = [
        {"user": f"{subset} {number} {'what ' * (number % 4)}?", "assistant": f"answer {turn}"}
        for turn in range(turns)
    ]
    rated = {f"{name}_ratings": [4] * turns for name in RATINGS}
    return {
        "images": [{"bytes": picture, "path": None} for picture in pictures],
        "texts": texts,
        "source": subset,
        **rated,
        **{f"{name}_min": 4 for name in RATINGS},
    }


def write_subset(
    root: Path, subset: str, files: Sequence[Sequence[Mapping[str, Any]]], group: int
) -> None:
    """One configuration: its parquet files, with row groups of `group` rows."""
    (root / subset).mkdir(parents=True)
    for number, rows in enumerate(files):
        path = root / subset / f"train-{number:05d}-of-{len(files):05d}.parquet"
        pq.write_table(pa.Table.from_pylist(list(rows), SCHEMA), path, row_group_size=group)
    write_card(root)


def write_card(root: Path) -> None:
    """The head of the dataset card, which names the configurations."""
    subsets = sorted(path.name for path in root.iterdir() if path.is_dir())
    lines = ["---", "configs:"]
    for name in subsets:
        lines += [f"- config_name: {name}", "  data_files:", "  - split: train"]
        lines += [f"    path: {name}/train-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", "# FineVision", ""]))


def write_finevision(root: Path) -> Path:
    """Two subsets; 90 + 20 rows in 19 + 5 row groups of 4 to 5 rows."""
    big = [row("big", i, turns=1 + i % 3, images=i % 3) for i in range(90)]
    write_subset(root, "big", [big[:43], big[43:]], group=5)
    write_subset(root, "small", [[row("small", i) for i in range(20)]], group=4)
    return root


def open_all(root: Path, repeats: Mapping[str, int] | None = None) -> dict[str, StreamSource]:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    dataset = StreamDatasetConfig(source=str(root), repeats=dict(repeats or {}))
    return {name: open_subset(dataset, name) for name in names}


@lru_cache
def processor() -> CasaProcessor:
    return CasaProcessor(build_tokenizer(), 7056, TEMPLATE)


def loaders(
    sources: Mapping[str, StreamSource],
    world: int = 1,
    workers: int = 0,
    settings: DataConfig = SETTINGS,
    packs_per_step: int = 12,
    **changes: Any,
) -> list[StreamLoader]:
    """The loader of every rank; `gather` is what all of them would send."""
    data = changed(settings, workers=workers, packs_per_step=packs_per_step, **changes)
    ranks: list[StreamLoader] = []
    # Weakly: a loader in a cycle with itself would end as garbage, and wait for its workers.
    known: weakref.WeakValueDictionary[int, StreamLoader] = weakref.WeakValueDictionary()

    def gather(_: Any) -> list[Any]:
        return [known[rank].lane_states for rank in range(world)]

    for rank in range(world):
        ranks.append(StreamLoader(sources, data, SEED, processor(), rank, world, gather=gather))
        known[rank] = ranks[rank]
    return ranks


def read_step(ranks: list[StreamLoader]) -> list[list[str]]:
    """Ids of the packs of one step, in global order."""
    batches = [batch for loader in ranks for batch in loader.next_step()]
    return [batch.sample_ids for batch in sorted(batches, key=lambda batch: batch.index)]


def saved(loader: StreamLoader) -> dict[str, Any]:
    """The state as it comes back from a checkpoint."""
    state: dict[str, Any] = json.loads(json.dumps(loader.state_dict()))
    return state
