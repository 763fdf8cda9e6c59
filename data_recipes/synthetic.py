"""Synthetic question answering about small rendered pictures, in FineVision's schema.

What samples show and ask is in `synthetic_scenes`. Here they are rendered by several processes and
written as shards, with a tokenizer and a summary; an interrupted run starts over.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from casa_train.errors import UserError
from data_recipes.synthetic_scenes import SPLITS, TASK_NAMES, Example, corpus, example

# The shard writer and the tokenizer load torch: they are imported where a dataset is written, so
# that rendering processes and `--help` start at once.

VERSION = 1  # raise when the same arguments would render something else
CHUNK = 64  # samples a process draws at a time

VOCABULARY = 512  # bytes, special tokens and room for every answer as one token or two
PAD, BOS, USER, ASSISTANT, END = "<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"


# -------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> Any:
    """A small byte-level BPE tokenizer: any text encodes, the usual answers are one or two tokens.

    It does not depend on the arguments of the recipe, so datasets of several runs can be mixed.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(corpus(), trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------------------- writing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="where train/, validation/, tokenizer/ and summary.json go",
    )
    parser.add_argument("--samples", type=int, required=True, metavar="N", help="training samples")
    parser.add_argument("--seed", type=int, required=True, metavar="S", help="0 or more")
    parser.add_argument(
        "--validation",
        type=int,
        metavar="N",
        help="held-out samples (default: a tenth of --samples, at most 2000)",
    )
    parser.add_argument(
        "--tasks",
        default="all",
        metavar="A,B,...",
        help=f"out of {', '.join(TASK_NAMES)} (default: all of them; text-only "
        "samples are always a small part of the training split)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR_OR_HUB_ID",
        help="tokenizer to count with and to copy (default: one built here)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        default=os.cpu_count() or 1,
        help="rendering processes (default: one a core)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Renders and writes the dataset, or says that it is there already.

    :raises UserError: bad numbers or tasks, or a directory that holds something else.
    """
    tasks = _tasks(arguments.tasks)
    validation = arguments.validation
    if validation is None:
        validation = 0 if tasks == ["text"] else min(max(arguments.samples // 10, 1), 2000)
    for name, value, least in (
        ("--samples", arguments.samples, 1),
        ("--seed", arguments.seed, 0),
        ("--validation", validation, 0),
        ("--workers", arguments.workers, 1),
    ):
        if value < least:
            raise UserError(f"{name} is {value}; expected a whole number of at least {least}.")
    if tasks == ["text"] and validation:
        raise UserError(
            f"--validation is {validation} with --tasks text; text-only samples are never held "
            "out. Add a task with pictures, or set --validation 0."
        )
    wanted = {
        "version": VERSION,
        "samples": arguments.samples,
        "validation": validation,
        "seed": arguments.seed,
        "tasks": tasks,
        "tokenizer": arguments.tokenizer,
    }
    try:
        _prepare(arguments.out, wanted, arguments.workers)
    except OSError as error:  # no permission, no space
        raise UserError(f"--out {arguments.out} cannot be written: {error}") from error


def _prepare(out: Path, wanted: dict[str, Any], workers: int) -> None:
    if _finished(out, wanted):
        print(f"{out} already holds this dataset: nothing to do.")
        return
    from casa_train.data.tokens import load_tokenizer, save_tokenizer

    name = wanted["tokenizer"]
    tokenizer = build_tokenizer() if name is None else load_tokenizer(name)
    out.mkdir(parents=True, exist_ok=True)
    header = {"recipe": "synthetic", "arguments": wanted}
    _save_summary(out, {**header, "finished": False})
    for part in (*SPLITS, "tokenizer"):  # what an interrupted run left
        shutil.rmtree(out / part, ignore_errors=True)
    save_tokenizer(tokenizer, out / "tokenizer")
    summary = _write_splits(out, wanted, tokenizer, workers)
    _save_summary(out, {**header, "finished": True, **summary})
    _print_summary(out, summary)


def _tasks(names: str) -> list[str]:
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if chosen == ["all"]:
        return list(TASK_NAMES)
    unknown = [name for name in chosen if name not in TASK_NAMES]
    if unknown or not chosen:
        raise UserError(
            f"--tasks names {', '.join(map(repr, unknown)) or 'nothing'}; expected a comma-"
            f"separated list out of {', '.join(TASK_NAMES)}, or 'all'."
        )
    # "text" always takes part: with or without it the same samples come out.
    return [name for name in TASK_NAMES if name in chosen or name == "text"]


def _finished(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether `out` holds this dataset; False when it is free or an earlier run was interrupted.

    :raises UserError: when anything else is there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a directory to write to.")
    path = out / "summary.json"
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise UserError(
                f"--out {out} is not empty and was not written by this recipe; choose another "
                "directory or empty it."
            )
        return False
    try:
        found = json.loads(path.read_text())
        there, finished = dict(found["arguments"]), bool(found["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the summary of a synthetic dataset ({error!r}); choose another --out "
            "or delete the directory."
        ) from error
    different = [
        f"{name} is {there.get(name)!r} there and {value!r} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if different:
        raise UserError(
            f"--out {out} holds a different dataset: {'; '.join(different)}. Choose another --out, "
            "delete the directory, or repeat the arguments it was made with."
        )
    if not finished:
        print(f"{out} was left unfinished: starting over.")
    return finished


def _save_summary(out: Path, summary: dict[str, Any]) -> None:
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(temporary, out / "summary.json")


def _write_splits(
    out: Path, wanted: dict[str, Any], tokenizer: Any, workers: int
) -> dict[str, Any]:
    """Validation, then training without its pictures; returns what was written, by split."""
    from casa_train.data.shards import ShardWriter, Split
    from casa_train.data.tokens import count_tokens, tokenizer_fingerprint

    fingerprint = tokenizer_fingerprint(tokenizer)
    count = lru_cache(maxsize=1 << 16)(partial(count_tokens, tokenizer))
    seed, tasks = wanted["seed"], wanted["tasks"]

    digests: dict[str, set[bytes]] = {split: set() for split in SPLITS}
    summary: dict[str, Any] = {}
    for split, size in zip(SPLITS, (wanted["validation"], wanted["samples"]), strict=True):
        if size == 0:
            continue
        writer = ShardWriter(out / split, "finevision", count, fingerprint)
        per_task: Counter[str] = Counter()
        images = redrawn = 0
        draw = partial(example, seed, split, tasks)
        with closing(_in_order(draw, size, workers)) as drawn:
            for i, sample in enumerate(_progress(drawn, size, split)):
                if split == "train":
                    sample, attempts = draw_apart(draw, i, sample, digests["validation"])
                    redrawn += attempts > 0
                digests[split] |= sample.digests
                if writer.write(f"{split}-{i:07d}", sample.row(), sample.images):
                    per_task[sample.task] += 1
                    images += len(sample.images)
        writer.close()
        written = Split(out / split)
        summary[split] = {
            "samples": len(written),
            "images": images,
            "text_tokens": sum(
                int(written.list_column(column)[0].sum())
                for column in ("user_tokens", "assistant_tokens")
            ),
            "skipped": writer.skipped,
            "redrawn": redrawn,
            "per_task": dict(sorted(per_task.items())),
        }
    if shared := digests["validation"] & digests["train"]:
        raise RuntimeError(f"{len(shared)} pictures are in both splits")
    return summary


def draw_apart(
    draw: Callable[[int, int], Example], index: int, sample: Example, held_out: set[bytes]
) -> tuple[Example, int]:
    """`sample`, or the first later attempt at it without a held-out picture; and the attempts."""
    attempt = 0
    while sample.digests & held_out:
        attempt += 1
        sample = draw(index, attempt)
    return sample, attempt


def _in_order(
    draw: Callable[[int], Example], size: int, workers: int
) -> Generator[Example, None, None]:
    """Examples 0 to size - 1, drawn by several processes."""
    workers = min(workers, math.ceil(size / CHUNK))
    if workers == 1:
        yield from map(draw, range(size))
        return
    with ProcessPoolExecutor(
        workers,
        # Not forked: the tokenizer's threads do not survive a fork.
        mp_context=multiprocessing.get_context("spawn"),
        # Ctrl-C reaches every process of the terminal; only this one has something to say.
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    ) as pool:
        starts = iter(range(0, size, CHUNK))
        pending: deque[Future[list[Example]]] = deque()
        try:
            while True:
                # A bounded number of chunks ahead of the writer: memory stays flat in long runs.
                for start in islice(starts, 3 * workers - len(pending)):
                    chunk = range(start, min(start + CHUNK, size))
                    pending.append(pool.submit(_draw_chunk, draw, chunk))
                if not pending:
                    return
                yield from pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "a rendering process was ended from outside (out of memory?); run the same "
                "command again with a smaller --workers."
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _draw_chunk(draw: Callable[[int], Example], chunk: range) -> list[Example]:
    return [draw(i) for i in chunk]


def _progress(items: Iterator[Example], total: int, label: str) -> Iterator[Example]:
    """A bar on a terminal; in a log a line every ten seconds and one at the end."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=label, unit="sample")
        return
    start = last = time.monotonic()
    for i, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if i == total or now - last > 10:
            last = now
            rate = i / max(now - start, 1e-9)
            print(f"{label}: {i}/{total} samples, {rate:.0f} a second", flush=True)


def _print_summary(out: Path, summary: dict[str, Any]) -> None:
    print(f"finished: {out}")
    for split, found in summary.items():
        tasks = ", ".join(f"{task} {number}" for task, number in found["per_task"].items())
        skipped = ", ".join(f"{reason} {n}" for reason, n in found["skipped"].items()) or "none"
        print(
            f"  {split}: {found['samples']} samples, {found['images']} images, "
            f"{found['text_tokens']} text tokens; skipped: {skipped}; {tasks}"
        )
