"""Writes a mixture: the configuration group `data` with every prepared subset as a source.

Over-sampling follows the published recipe (Docmatix 6x); the same samples are never listed twice.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from casa_train.data.overlap import refuse_double_counting
from casa_train.errors import UserError
from data_recipes import finevision, llava_onevision
from data_recipes.pipeline import slug

REPEATS = {("llava_onevision", "Docmatix"): 6}
IN_PLACE_OF = {("finevision", "DoclingMatix"): ("llava_onevision", "Docmatix")}
"""Subsets that stay out where the other is there."""
ROOT = "${oc.env:CASA_DATA,data}"

Origin = tuple[str, str]  # dataset, subset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the command."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="take what is prepared here: the directory that holds the --out directories of "
        "recipes (default: everything published, wherever CASA_DATA will point)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="for example conf/data/mine.yaml"
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file.

    :raises UserError: nothing prepared, or the same samples twice.
    """
    text = published_mixture()
    if arguments.data is not None:
        found = prepared(arguments.data)
        if not found:
            raise UserError(
                f"--data {arguments.data} holds no finished dataset of images "
                "(DATASET/SUBSET/train/meta.json); run recipes with --out below it first."
            )
        command = f"python -m data_recipes mixture --data {arguments.data} --out {arguments.out}"
        text = mixture_yaml(
            {name: (origin, str(path)) for name, (origin, path) in found.items()}, f"# {command}"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    print(f"{arguments.out}: {text.count('path:')} sources")


def prepared(data: Path) -> dict[str, tuple[Origin, Path]]:
    """Source name -> (origin, path of the split) of the image subsets prepared below `data`."""
    found = {}
    for meta_file in sorted([*data.glob("*/train/meta.json"), *data.glob("*/*/train/meta.json")]):
        meta = json.loads(meta_file.read_text())
        origin = meta.get("origin") or {}
        if meta.get("modality") == "image" and origin:
            pair = (origin["dataset"], origin["subset"])
            found[source_name(pair)] = pair, meta_file.parent.absolute()
    return found


def source_name(origin: Origin) -> str:
    """A key of the configuration; names of LLaVA-OneVision's subsets may return in FineVision."""
    prefix = "ov_" if origin[0] == "llava_onevision" else ""
    return prefix + slug(origin[1])


def mixture_yaml(sources: Mapping[str, tuple[Origin, str]], *comment: str) -> str:
    """The configuration as text.

    :param sources: name -> (origin, path).
    :raises UserError: the same samples twice.
    """
    there = {origin for origin, _ in sources.values()}
    kept = {
        name: (origin, path)
        for name, (origin, path) in sources.items()
        if IN_PLACE_OF.get(origin) not in there
    }
    refuse_double_counting({name: origin for name, (origin, _) in kept.items()})
    lines = [*comment, "sources:"]
    for name, (origin, path) in kept.items():
        repeats = REPEATS.get(origin)
        more = f", repeats: {repeats}" if repeats else ""
        lines.append(f"  {name}: {{path: {_quoted(path)}{more}}}")
    budgets = ("text_tokens: 2048", "image_tokens: 20480", "max_pixels: 906304  # 952x952")
    return "\n".join([*lines, *budgets, "packs_per_step: 128", "workers: 8", ""])


def published_mixture() -> str:
    """The full mixture, with paths below the environment's CASA_DATA (default: ./data)."""
    origins = [
        *(("finevision", name) for name in finevision.SUBSETS),
        *(("llava_onevision", name) for name in llava_onevision.DEFAULT),
    ]
    return mixture_yaml(
        {
            source_name(origin): (origin, f"{ROOT}/{origin[0]}/{slug(origin[1])}/train")
            for origin in origins
        },
        "# FineVision, Docmatix six times in place of its DoclingMatix, and what only",
        "# LLaVA-OneVision-1.5-Instruct has. Prepare them with",
        "#   python -m data_recipes finevision --out $CASA_DATA/finevision",
        "#   python -m data_recipes llava_onevision --out $CASA_DATA/llava_onevision",
        "# For a part of it: python -m data_recipes mixture --data $CASA_DATA --out conf/data/...",
    )


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[A-Za-z0-9_./-]+", path) else json.dumps(path)
