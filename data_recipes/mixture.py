"""Writes a mixture: the configuration group `data` with every prepared subset as a source.

Over-sampling follows the published recipe (Docmatix 6x); the same samples are never listed twice.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import yaml

from casa_train.config.bounds import local_path
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
        type=local_path,
        metavar="DIR",
        help="take what is prepared here: an --out directory of a recipe, or one that holds "
        "several (default: everything published, wherever CASA_DATA will point)",
    )
    parser.add_argument(
        "--exclude",
        nargs="+",
        default=[],
        metavar="NAME",
        help="leave these out, what is held out as a whole for example: sources, subsets or "
        "DATASET/SUBSET, or patterns of them such as '*vqa*'",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="FILE",
        help="for example conf/data/mine.yaml",
    )


def run(arguments: argparse.Namespace) -> None:
    """Writes the file.

    :raises UserError: nothing prepared, or the same samples twice.
    """
    if arguments.data is None:
        text = published_mixture(arguments.exclude)
    else:
        text = prepared_mixture(arguments.data, arguments.exclude, arguments.out)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text)
    written = yaml.safe_load(text)
    held_out = len(written.get("validation", {}))
    print(f"{arguments.out}: {len(written['sources'])} sources, {held_out} held-out splits")


def prepared_mixture(data: Path, exclude: Sequence[str], out: Path) -> str:
    """The mixture of the image subsets prepared below `data`.

    :raises UserError: nothing prepared, two folders of one subset, a pattern of nothing, or nothing
        left.
    """
    found, others = prepared(data)
    if not found:
        raise UserError(
            f"--data {data} holds no finished dataset of images "
            "(DATASET/SUBSET/train/meta.json); run recipes with --out below it first."
        )
    if others:
        print(f"not in the mixture, because they are no published images: {', '.join(others)}")
    command = ["python", "-m", "data_recipes", "mixture", "--data", str(data)]
    command += ["--exclude", *exclude] if exclude else []
    return mixture_yaml(
        {name: (origin, str(path)) for name, (origin, path) in found.items()},
        f"# {shlex.join([*command, '--out', str(out)])}",
        exclude=exclude,
        held_out={name: str(path.parent / "validation") for name, (_, path) in found.items()},
    )


def prepared(data: Path) -> tuple[dict[str, tuple[Origin, Path]], list[str]]:
    """Source name -> (origin, path of the split) of the image subsets prepared below `data`, and
    the folders of other prepared data.

    :raises UserError: two folders would be one source; names both.
    """
    found: dict[str, tuple[Origin, Path]] = {}
    others = []
    for meta_file in sorted([*data.glob("*/train/meta.json"), *data.glob("*/*/train/meta.json")]):
        meta = json.loads(meta_file.read_text())
        origin = meta.get("origin") or {}
        if meta.get("modality") == "image" and origin:
            pair = (origin["dataset"], origin["subset"])
            name, path = source_name(pair), meta_file.parent.absolute()
            if name in found:
                raise UserError(
                    f"{found[name][1].parent} ({' '.join(found[name][0])}) and {path.parent} "
                    f"({' '.join(pair)}) would both be the source {name}; expected one folder. "
                    "Name a directory without the other with --data, or move the other out of "
                    f"{data}: data that 'retokenize' counted again belong into a tree of their own."
                )
            found[name] = pair, path
        else:
            others.append(str(meta_file.parent.parent.relative_to(data)))
    return found, others


def source_name(origin: Origin) -> str:
    """A key of the configuration; names of LLaVA-OneVision's subsets may return in FineVision."""
    prefix = "ov_" if origin[0] == "llava_onevision" else ""
    return prefix + slug(origin[1])


def excluded(origins: Mapping[str, Origin], patterns: Sequence[str]) -> set[str]:
    """The sources that patterns name, by source, by subset or by DATASET/SUBSET.

    :raises UserError: a pattern that names none.
    """
    found: set[str] = set()
    for pattern in patterns:
        named = {
            name
            for name, (dataset, subset) in origins.items()
            for spelling in (name, subset, f"{dataset}/{subset}")
            if spelling == pattern or fnmatchcase(spelling, pattern)
        }
        if not named:
            known = ", ".join(subset for _, subset in origins.values())
            raise UserError(
                f"--exclude {pattern} names none of the subsets, which are {known}; expected one "
                "of them or a pattern such as '*vqa*'. Mend the name."
            )
        found |= named
    return found


def mixture_yaml(
    sources: Mapping[str, tuple[Origin, str]],
    *comment: str,
    exclude: Sequence[str] = (),
    held_out: Mapping[str, str] | None = None,
) -> str:
    """The configuration as text.

    :param sources: name -> (origin, path).
    :param exclude: patterns of what stays out.
    :param held_out: name -> path of its validation split, if there is one.
    :raises UserError: the same samples twice, a pattern of nothing, or nothing left.
    """
    out = excluded({name: origin for name, (origin, _) in sources.items()}, exclude)
    whole, sources = sources, {n: s for n, s in sources.items() if n not in out}
    if not sources:
        raise UserError("--exclude leaves every subset out; expected at least one. Shorten it.")
    there = {origin for origin, _ in sources.values()}
    kept = {
        name: (origin, path)
        for name, (origin, path) in sources.items()
        if IN_PLACE_OF.get(origin) not in there
    }
    refuse_double_counting({name: origin for name, (origin, _) in kept.items()})
    for name, (origin, _) in kept.items():
        for other in sorted(out):
            if _same_samples(origin, whole[other][0]):
                print(f"note: {name}, which stays, has samples of {other}, which is excluded")
    lines = [*comment, "sources:"]
    for name, (origin, path) in kept.items():
        repeats = REPEATS.get(origin)
        more = f", repeats: {repeats}" if repeats else ""
        lines.append(f"  {name}: {{path: {_quoted(path)}{more}}}")
    validation = {n: p for n, p in (held_out or {}).items() if n in kept and is_split(p)}
    if validation:
        lines.append("validation:")
        lines += [f"  {name}: {{path: {_quoted(path)}}}" for name, path in validation.items()]
    lines += ["min_pixels: 3136  # 56x56: 4 image tokens, as Qwen2.5-VL's own processor"]
    return "\n".join([*lines, "workers: 8", ""])


def _same_samples(one: Origin, other: Origin) -> bool:
    try:
        refuse_double_counting({"one": one, "other": other})
    except UserError:
        return True
    return False


def is_split(path: str) -> bool:
    """Whether a prepared split lies there."""
    return Path(path, "meta.json").is_file()


def published_mixture(exclude: Sequence[str] = ()) -> str:
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
        exclude=exclude,
    )


def _quoted(path: str) -> str:
    return path if re.fullmatch(r"[A-Za-z0-9_./-]+", path) else json.dumps(path)
