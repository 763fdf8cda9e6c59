"""FineVision (`HuggingFaceM4/FineVision`): about 185 subsets of parquet files, rated turn by turn.

All ratings are stored; filtering by them is a setting of training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from data_recipes import published
from data_recipes.hub import chosen_subsets, image_bytes, parquet_jobs
from data_recipes.pipeline import SplitPlan

HUB_ID = "HuggingFaceM4/FineVision"
TOKENIZER = "kyutai/helium-1-2b"
RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
COLUMNS = (
    "texts",
    "source",
    *(f"{name}_{kind}" for name in RATINGS for kind in ("ratings", "min")),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    published.add_arguments(parser, HUB_ID, TOKENIZER)
    published.add_subset_argument(parser, "every subset of the source")


def run(arguments: argparse.Namespace) -> None:
    """Prepares the chosen subsets, one after the other."""
    summaries = []
    for subset in chosen_subsets(arguments.source, arguments.subset, default=()):
        jobs = parquet_jobs(arguments.source, subset, convert)
        origin = {"dataset": "finevision", "subset": subset}

        def plan(directory: Any, jobs: Any = jobs, origin: Any = origin) -> SplitPlan:
            label = origin["subset"]
            return SplitPlan(directory, "finevision", label, jobs, len(jobs), origin=origin)

        summaries.append(published.prepare(arguments, "finevision", subset, plan))
    published.print_total(summaries)


def convert(row: Mapping[str, Any], subset: str) -> tuple[dict[str, Any], list[bytes]]:
    """The stored columns of a row and its images, in order.

    :raises BadRow: images of which one is missing.
    """
    from casa_train.data.schemas import BadRow

    images = row.get("images")
    if isinstance(images, Mapping | bytes):  # one image that is no list
        images = [images]
    if images is not None and not isinstance(images, list):
        raise BadRow("bad_images", f"column 'images' is {type(images).__name__}, expected a list")
    columns = {name: row[name] for name in COLUMNS if name in row}
    return columns, [image_bytes(image) for image in images or ()]
