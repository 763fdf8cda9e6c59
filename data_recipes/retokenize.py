"""A second index over prepared data, for another tokenizer or chat template.

Images are neither read nor copied.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.errors import UserError
from data_recipes.pipeline import (
    Encoding,
    Pool,
    Progress,
    add_template_argument,
    turn_counter,
)
from data_recipes.published import AUTO, copy_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--data",
        type=local_path,
        required=True,
        metavar="DIR",
        help="an --out directory of a recipe",
    )
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="DIR", help="where the same folders go"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_or_hub_id,
        required=True,
        metavar="DIR_OR_HUB_ID",
        help="the tokenizer to count with",
    )
    add_template_argument(parser)
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes, each with one subset at a time (default: one a core)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes an index for every split below --data; those that are there stay.

    :raises UserError: nothing prepared, or data that cannot be read.
    """
    data, out = arguments.data, arguments.out
    found = sorted(meta.parent.relative_to(data) for meta in data.glob("**/meta.json"))
    if not found:
        raise UserError(f"--data {data} holds no prepared split (SUBSET/train/meta.json).")
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; expected at least 1.")
    encoding = copy_tokenizer(out, arguments.tokenizer, arguments.template or AUTO)
    progress = Progress("retokenize", len(found), "splits")
    with Pool(min(arguments.workers, len(found))) as pool:
        tasks = [
            pool.submit(partial(_recount, data / name, out / name, encoding)) for name in found
        ]
        for task in tasks:
            progress.update(1, pool.result(task))
    progress.close()


def _recount(data: Path, out: Path, encoding: Encoding) -> dict[str, Any]:
    from casa_train.data.prepared.recount import recount
    from casa_train.data.prepared.shards import Split
    from casa_train.data.schemas.rows import BadRow

    count = turn_counter(encoding)
    if (out / "meta.json").is_file():
        there = Split(out)
        found = {name: there.meta[name] for name in count.fingerprints}
        if found != count.fingerprints:
            raise UserError(
                f"{out} was made with another tokenizer or chat template; choose another --out."
            )
        return there.meta
    try:
        return recount(Split(data, uncounted=True), out, count, count.fingerprints)
    except BadRow as error:
        raise UserError(f"{data}: {error}. Run the recipe again.") from error
