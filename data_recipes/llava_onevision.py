"""LLaVA-OneVision-1.5-Instruct (`mvp-lab/LLaVA-OneVision-1.5-Instruct-Data`): one image a row.

Most subsets are also in FineVision; by default only those are prepared that it lacks.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from casa_train.data.overlap import LACKING_IN_FINEVISION, refuse_double_counting
from data_recipes import published
from data_recipes.hub import chosen_subsets, image_bytes

HUB_ID = "mvp-lab/LLaVA-OneVision-1.5-Instruct-Data"
TOKENIZER = "kyutai/helium-1-2b"
TEMPLATE = "helium"
DEFAULT = (*LACKING_IN_FINEVISION, "Docmatix")
COLUMNS = ("id", "conversations", "data_source")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    published.add_arguments(parser, HUB_ID, TOKENIZER, TEMPLATE)
    published.add_subset_argument(
        parser, f"Docmatix and the {len(LACKING_IN_FINEVISION)} that FineVision lacks"
    )


def run(arguments: argparse.Namespace) -> None:
    """Prepares the chosen subsets, one after the other.

    :raises UserError: subsets that hold the same samples.
    """
    subsets = chosen_subsets(arguments.source, arguments.subset, DEFAULT)
    refuse_double_counting({f"--subset {name}": ("llava_onevision", name) for name in subsets})
    published.prepare_parquet(arguments, "llava_onevision", subsets, convert)


def convert(row: Mapping[str, Any], subset: str) -> tuple[dict[str, Any], list[bytes]]:
    """The stored columns of a row and its image, if it has one.

    :raises BadRow: an image without bytes.
    """
    columns = {name: row[name] for name in COLUMNS if name in row}
    image = row.get("image")
    return {**columns, "subset": subset}, [] if image is None else [image_bytes(image)]
