"""What the recipes of published datasets have in common: options, tokenizer, one folder a subset.

A subset is written to OUT/SUBSET/train with OUT/SUBSET/summary.json, and OUT/SUBSET/validation
where samples are held out, so that subsets can be
prepared by separate commands, at the same time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.errors import UserError
from data_recipes.held_out import HoldOut
from data_recipes.hub import Converter, count_rows, parquet_jobs
from data_recipes.pipeline import (
    Encoding,
    SplitPlan,
    add_template_argument,
    check_least,
    encoding_of,
    print_summary,
    save_summary,
    slug,
    stored_summary,
    summary_of,
    turn_counter,
    write_split,
    writing,
)

AUTO = "auto"  # --template where it is not given
VERSION = 2  # raise when the same arguments would write other samples


def add_arguments(
    parser: argparse.ArgumentParser, source: str, tokenizer: str, template: str
) -> None:
    """Declares the options that every recipe of a published dataset has."""
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="where SUBSET/train, SUBSET/validation, SUBSET/summary.json and tokenizer/ go",
    )
    parser.add_argument(
        "--source",
        type=path_or_hub_id,
        default=source,
        metavar="HUB_ID_OR_DIR",
        help=f"the hub's dataset, or a directory with the same files (default: {source})",
    )
    parser.add_argument(
        "--tokenizer",
        type=path_or_hub_id,
        default=tokenizer,
        metavar="DIR_OR_HUB_ID",
        help=f"the model's tokenizer: the index holds its token counts (default: {tokenizer})",
    )
    add_template_argument(parser, f"; {template} for the default tokenizer")
    parser.set_defaults(usual=(tokenizer, template))
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes; the result does not depend on them (default: one a core)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="only the first N rows of a subset, to try it out"
    )
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="hold out N samples of each subset as SUBSET/validation, the same on every run; no "
        "image of a subset stands in both (default: none)",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=0.1,
        metavar="X",
        help="end when more than this share of the rows (of at least 1000) holds no usable sample",
    )


def add_subset_argument(parser: argparse.ArgumentParser, default: str) -> None:
    """Declares --subset."""
    parser.add_argument(
        "--subset", nargs="+", metavar="NAME", help=f"subsets to prepare (default: {default})"
    )


def prepare(
    arguments: argparse.Namespace,
    recipe: str,
    subset: str | None,
    plan: Callable[[Path], SplitPlan],
) -> dict[str, Any]:
    """Writes one subset, or goes on with it, or says that it is there.

    Returns its summary by split.

    :param subset: None for a dataset without subsets, which goes straight to --out.
    :param plan: the directory of the split -> what to write there.
    :raises UserError: bad numbers, a directory that holds something else, an unreadable source.
    """
    given = ((name, getattr(arguments, name)) for name in ("workers", "limit", "validation"))
    check_least(*((f"--{name}", value, 1) for name, value in given if value is not None))
    usual, its_template = arguments.usual
    template = its_template if arguments.tokenizer == usual else AUTO
    encoding = copy_tokenizer(arguments.out, arguments.tokenizer, arguments.template or template)
    fingerprints = turn_counter(encoding).fingerprints
    out = arguments.out if subset is None else arguments.out / slug(subset)
    wanted = {
        "version": VERSION,
        "recipe": recipe,
        "source": arguments.source,
        "subset": subset,
        "tokenizer": fingerprints["tokenizer_fingerprint"],
        "template": fingerprints["turns_fingerprint"],
        "limit": arguments.limit,
        "validation": arguments.validation,
    }
    with writing(out, wanted) as done:
        if done:
            print(f"{out} already holds this dataset: nothing to do.")
            stored = stored_summary(out)
            return {name: stored[name] for name in ("train", "validation") if name in stored}
        split = plan(out / "train")
        hold_out = None
        if arguments.validation is not None:
            assert split.rows is not None
            rows = split.rows()
            hold_out = HoldOut.of(arguments.validation, min(rows, arguments.limit or rows))
        header = {"recipe": recipe, "arguments": wanted}
        save_summary(out, {**header, "finished": False})
        write_split(
            split,
            encoding,
            arguments.workers,
            arguments.limit,
            arguments.max_bad_share,
            hold_out,
        )
        names = ("train",) if hold_out is None else ("train", "validation")
        metas = {name: json.loads((out / name / "meta.json").read_text()) for name in names}
        summary = {name: summary_of(meta) for name, meta in metas.items()}
        save_summary(out, {**header, "finished": True, **summary})
    print_summary(out, summary)
    return summary


def prepare_parquet(
    arguments: argparse.Namespace, recipe: str, subsets: Sequence[str], convert: Converter
) -> None:
    """Writes the subsets of a dataset in parquet files, one after the other.

    :param convert: (row, subset) -> the stored columns of the row and its images.
    """
    summaries = []
    for subset in subsets:
        jobs = parquet_jobs(arguments.source, subset, convert)
        origin = {"dataset": recipe, "subset": subset}

        def plan(directory: Path, jobs: Any = jobs, origin: Any = origin) -> SplitPlan:
            label = origin["subset"]
            rows = partial(count_rows, arguments.source, label)
            return SplitPlan(directory, recipe, label, jobs, len(jobs), origin=origin, rows=rows)

        summaries.append(prepare(arguments, recipe, subset, plan))
    print_total(summaries)


def copy_tokenizer(out: Path, name: str, template: str) -> Encoding:
    """A copy of the tokenizer beside the data, which every process loads, and the chat template.

    :param template: as on the command line.
    :raises UserError: nothing loadable, or the directory was prepared with another tokenizer.
    """
    from casa_train.data.tokens import load_tokenizer, save_tokenizer, tokenizer_fingerprint

    tokenizer = load_tokenizer(name)
    copy = out / "tokenizer"
    encoding = encoding_of(copy, tokenizer, template, name)
    fingerprint = tokenizer_fingerprint(tokenizer)
    if not copy.exists():
        temporary = out / f".tokenizer-{os.getpid()}"
        try:
            save_tokenizer(tokenizer, temporary)
            temporary.rename(copy)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not copy.exists():  # otherwise a command beside this one was faster
                raise UserError(f"--out {out} cannot be written: {error}") from error
    there = tokenizer_fingerprint(load_tokenizer(str(copy)))
    if there != fingerprint:
        raise UserError(
            f"{copy} is another tokenizer ({there[:12]}...) than --tokenizer {name} "
            f"({fingerprint[:12]}...); choose another --out, or repeat the tokenizer."
        )
    return encoding


def print_total(summaries: list[dict[str, Any]]) -> None:
    """One line over several subsets, whatever is held out among them."""
    if len(summaries) > 1:
        total = {
            name: sum(split[name] for summary in summaries for split in summary.values())
            for name in ("samples", "images", "text_tokens")
        }
        print(
            f"{len(summaries)} subsets: {total['samples']} samples, {total['images']} images, "
            f"{total['text_tokens']} text tokens"
        )
