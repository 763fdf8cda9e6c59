"""What recipes have in common that write train/ and validation/ straight below --out.

Everything that they read or render is here, so they know how much there is before they start.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.errors import UserError
from data_recipes.pipeline import (
    Encoding,
    Job,
    SplitPlan,
    add_template_argument,
    encoding_of,
    print_summary,
    save_summary,
    summary_of,
    write_split,
    writing,
)

SHARD = 2000  # samples


def add_arguments(parser: argparse.ArgumentParser, working: str) -> None:
    """Declares --out, --seed, --tokenizer, --template and --workers.

    :param working: what processes do, for the help.
    """
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="where train/, validation/, tokenizer/ and summary.json go",
    )
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="0 or more")
    parser.add_argument(
        "--tokenizer",
        type=path_or_hub_id,
        metavar="DIR_OR_HUB_ID",
        help="tokenizer to count with and to copy (default: one built here)",
    )
    add_template_argument(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=os.cpu_count() or 1,
        help=f"{working} processes (default: one a core)",
    )


def chosen_tasks(
    names: str, known: Sequence[str], every: str = "all", beside: Sequence[str] = ()
) -> list[str]:
    """What --tasks names, in the order of `known`.

    :param every: the word for all of them.
    :param beside: others that can be named, which that word leaves out.
    :raises UserError: nothing, or something unknown.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if chosen == [every]:
        return list(known)
    known = [*known, *beside]
    unknown = [name for name in chosen if name not in known]
    if unknown or not chosen:
        raise UserError(
            f"--tasks names {', '.join(map(repr, unknown)) or 'nothing'}; expected a comma-"
            f"separated list out of {', '.join(known)}, or {every!r} alone."
        )
    return [name for name in known if name in chosen]


def rated_row(source: str, texts: Sequence[tuple[str, str]], visual: bool) -> dict[str, Any]:
    """FineVision's columns of a conversation, without `images`.

    :param texts: (question, answer) turns.
    :param visual: whether they need a picture; ratings say so.
    """
    row: dict[str, Any] = {
        "texts": [{"user": user, "assistant": assistant} for user, assistant in texts],
        "source": source,
    }
    for name, rating in (
        ("relevance", 5),
        ("image_correspondence", 5 if visual else 1),
        ("visual_dependency", 5 if visual else 1),
        ("formatting", 5),
    ):
        row[f"{name}_ratings"] = [rating] * len(texts)
        row[f"{name}_min"] = rating
    return row


def prepare(
    out: Path,
    recipe: str,
    wanted: dict[str, Any],
    write_splits: Callable[[Encoding], dict[str, Any]],
    build: Callable[[], Any] | None = None,
) -> None:
    """Writes the dataset, or goes on with it, or says that it is there.

    :param wanted: the arguments that decide what is written, `tokenizer` (None: the one that is
        built here) and `template` among them.
    :param write_splits: writes the splits and returns what is in them, by name.
    :param build: builds a tokenizer where none is wanted; None: `synthetic`'s.
    :raises UserError: a tokenizer or template of no use, or a directory that holds something else.
    """
    from casa_train.data.tokens import load_tokenizer, save_tokenizer
    from data_recipes.synthetic import build_tokenizer

    name = wanted["tokenizer"]
    # What cannot be used is refused before anything is written.
    tokenizer = (build or build_tokenizer)() if name is None else load_tokenizer(name)
    encoding = encoding_of(
        out / "tokenizer", tokenizer, wanted["template"], name or "of this recipe"
    )
    with writing(out, wanted) as done:
        if done:
            print(f"{out} already holds this dataset: nothing to do.")
            return
        header = {"recipe": recipe, "arguments": wanted}
        save_summary(out, {**header, "finished": False})
        save_tokenizer(tokenizer, out / "tokenizer")
        summary = write_splits(encoding)
        save_summary(out, {**header, "finished": True, **summary})
    print_summary(out, summary)
    for split, found in summary.items():
        tasks = ", ".join(f"{task} {number}" for task, number in found["per_task"].items())
        print(f"  {split}: {tasks}")


def write(
    directory: Path,
    jobs: Sequence[Job],
    encoding: Encoding,
    workers: int,
    recipe: str,
    origin: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes one split in FineVision's schema; returns its summary, samples by task included.

    :param recipe: what sources begin with; a task follows.
    :param origin: of published data: `dataset` and `subset`, by which mixtures know it.
    """
    from casa_train.data.prepared.shards import Split

    size = sum(job.weight for job in jobs)
    plan = SplitPlan(directory, "finevision", directory.name, jobs, size, "samples", origin or {})
    meta = write_split(plan, encoding, min(workers, len(jobs)))
    written = Split(directory)
    tasks = Counter(written.source(i).removeprefix(f"{recipe}_") for i in range(len(written)))
    return {**summary_of(meta), "per_task": dict(sorted(tasks.items()))}
