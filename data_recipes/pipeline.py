"""The machinery under every recipe: jobs in processes, shards, progress, restart and summary.

A recipe cuts its input into *jobs*; each job becomes one shard, written by the process that reads
it. So the output does not depend on the number of processes, and a recipe that was killed at any
moment repeats only the jobs whose shard was not finished.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tqdm import tqdm

from casa_train.errors import UserError
from casa_train.io.numbers import duration
from data_recipes.held_out import Aside, HoldOut, divide, forget, set_aside

if TYPE_CHECKING:
    from casa_train.data.tokens import TurnCounter

# The shard writer and the tokenizer load torch: they are imported where a shard is written, so that
# `--help` starts at once.

LOG_EVERY = 10.0  # seconds between two lines where there is no terminal
BAD_SHARE_FROM = 1000  # rows, before which no share of bad ones is judged


@dataclass(frozen=True)
class Row:
    """One row of the input: a key, the columns without images, the image bytes.

    :param video: the path of the video whose frames they are.
    """

    key: str
    row: Mapping[str, Any]
    images: Sequence[bytes] = ()
    video: str | None = None


@dataclass(frozen=True)
class Skip:
    """Input rows that hold no sample, and why."""

    reason: str
    count: int = 1


class Job(Protocol):
    """What becomes one shard; pickles into the process that writes it."""

    @property
    def name(self) -> str:
        """Identifies the input; a restarted recipe has to come to the same names."""

    @property
    def weight(self) -> int:
        """How much of the whole this is, for the progress."""

    def rows(self) -> Iterator[Row | Skip]:
        """Reads the input, in order.

        :raises UserError: the input cannot be reached.
        """


@dataclass(frozen=True)
class Skips:
    """A job without samples: input that was found to be missing when jobs were made."""

    name: str
    reasons: Mapping[str, int]
    weight: int = 0

    def rows(self) -> Iterator[Row | Skip]:
        return (Skip(reason, count) for reason, count in self.reasons.items())


@dataclass(frozen=True)
class SplitPlan:
    """One split to write.

    :param jobs: made while shards are written, in an order that is always the same.
    :param total: sum of the weights of all jobs, if it is known.
    :param rows: counts the rows of the input, for who holds some of them out.
    """

    directory: Path
    schema: str
    label: str
    jobs: Iterable[Job]
    total: int | None = None
    unit: str = "files"
    origin: Mapping[str, str] = field(default_factory=dict)
    rows: Callable[[], int] | None = None


@dataclass(frozen=True)
class Encoding:
    """What makes tokens of conversations; pickles into processes.

    :param tokenizer: its directory; :param template: fields of the chat template as JSON.
    """

    tokenizer: Path
    template: str


def add_template_argument(parser: argparse.ArgumentParser, otherwise: str = "") -> None:
    """Declares --template; :param otherwise: an exception to the default, for the help."""
    parser.add_argument(
        "--template",
        metavar="NAME_OR_FILE",
        help="the model's chat template, whose share the token counts hold: auto (the tokenizer's "
        "own), a file of conf/model/template by name, a YAML file, or fields as a YAML mapping "
        f"(default: auto{otherwise})",
    )


def encoding_of(directory: Path, tokenizer: Any, template: str, name: str) -> Encoding:
    """What counts with a tokenizer under the template that a command line names.

    :param directory: where the tokenizer will lie; :param name: what it is called, for messages.
    :raises UserError: no template, or one that is not for this tokenizer.
    """
    from casa_train.config.ready_templates import read_template
    from casa_train.data.templates import resolve

    given = read_template(template, "--template")
    resolved = resolve(given, tokenizer, name, "--template")
    return Encoding(directory, json.dumps(asdict(resolved.template)))


def slug(name: str) -> str:
    """A subset's name as a folder, a key of a tar member and a key of the configuration."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")


# --------------------------------------------------------------------------- one split


def write_split(
    plan: SplitPlan,
    encoding: Encoding,
    workers: int,
    limit: int | None = None,
    max_bad_share: float = 1.0,
    hold_out: HoldOut | None = None,
) -> dict[str, Any]:
    """Writes every shard that is not finished yet, then the index; returns the meta file.

    :param limit: at most so many rows of the input, read by this process alone.
    :param hold_out: what becomes the split `validation` beside this one.
    :raises UserError: too many bad rows, an unreadable source, a process that was killed.
    """
    from casa_train.data.prepared.shard_writer import finish_split, finished_shard

    plan.directory.mkdir(parents=True, exist_ok=True)
    for temporary in plan.directory.glob("*.tmp"):  # of a recipe that was killed
        temporary.unlink()
    progress = Progress(plan.label, plan.total, plan.unit)
    seen: Counter[str] = Counter()
    shards = 0
    with Pool(workers if limit is None else 1) as pool:
        waiting: deque[tuple[int, Job, Future[dict[str, Any]] | dict[str, Any]]] = deque()
        jobs = enumerate(plan.jobs)

        def collect() -> None:
            position, job, result = waiting.popleft()
            shard = result if isinstance(result, dict) else pool.result(result)
            rows = int(shard["consumed"]["rows"])
            seen.update({"rows": rows, **{f"skipped {r}": n for r, n in shard["skipped"].items()}})
            progress.update(job.weight, shard, new=not isinstance(result, dict))
            _check_share(plan, seen, max_bad_share)

        for number, job in jobs:
            shards = number + 1
            shard = finished_shard(plan.directory, number)
            if hold_out is not None and not set_aside(plan.directory, number):
                shard = None
            if shard is not None and shard["consumed"]["unit"] != job.name:
                raise UserError(
                    f"{plan.directory}: shard {number} was made from "
                    f"{shard['consumed']['unit']!r}, the source now has {job.name!r} there: it "
                    "changed since. Choose another --out or delete the directory."
                )
            if shard is None:
                left = None if limit is None else limit - seen["rows"]
                task = partial(
                    _write_shard, plan.directory, number, plan.schema, job, encoding, left, hold_out
                )
                waiting.append((number, job, pool.submit(task)))
            else:
                waiting.append((number, job, shard))
            # Jobs may hold videos: only a bounded number of them waits.
            while len(waiting) >= pool.ahead:
                collect()
            if limit is not None and seen["rows"] >= limit:
                break
        while waiting:
            collect()
    progress.close()
    counter = turn_counter(encoding)
    rest = plan.schema, counter.fingerprints, plan.origin
    if hold_out is None:
        return finish_split(plan.directory, shards, *rest)
    train = plan.directory
    shards, held_out = divide(train, shards, plan.schema, counter, hold_out)
    finish_split(train.parent / "validation", held_out, *rest)
    meta = finish_split(train, shards, *rest)
    forget(train)
    return meta


def _write_shard(
    directory: Path,
    number: int,
    schema: str,
    job: Job,
    encoding: Encoding,
    limit: int | None,
    hold_out: HoldOut | None,
) -> dict[str, Any]:
    from casa_train.data.prepared.shard_writer import Shard, finished_shard

    shard = Shard(directory, number, schema, turn_counter(encoding))
    aside = None if hold_out is None else Aside(shard, hold_out)
    rows = 0
    for item in islice(job.rows(), limit):
        if isinstance(item, Skip):
            shard.skipped[item.reason] += item.count
            rows += item.count
        else:
            if aside is None:
                shard.write(item.key, item.row, item.images)
            else:
                aside.write(item.key, item.row, item.images, item.video)
            rows += 1
    consumed = {"unit": job.name, "rows": rows}
    if aside is None:
        shard.finish(consumed)
    else:
        aside.finish(consumed)
    finished = finished_shard(directory, number)
    assert finished is not None
    return finished


@lru_cache(maxsize=1)
def turn_counter(encoding: Encoding) -> TurnCounter:
    """Counts the tokens of samples as training encodes them."""
    from casa_train.data.tokens import TurnCounter

    return TurnCounter.open(str(encoding.tokenizer), json.loads(encoding.template))


def _check_share(plan: SplitPlan, seen: Counter[str], max_bad_share: float) -> None:
    skipped = {name[8:]: n for name, n in seen.items() if name.startswith("skipped ")}
    bad, rows = sum(skipped.values()), seen["rows"]
    if rows >= BAD_SHARE_FROM and bad > max_bad_share * rows:
        raise UserError(
            f"{plan.label}: {bad} of {rows} rows hold no usable sample ({reasons(skipped)}), more "
            f"than the share of {max_bad_share} that --max-bad-share allows. Check the source, or "
            "raise it and run the same command again: finished shards are kept."
        )


class Pool:
    """Processes that write shards; with one worker this process does."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.ahead = 1 if workers == 1 else 2 * workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        if self.workers > 1:
            self._executor = ProcessPoolExecutor(
                self.workers,
                # Not forked: the tokenizer's threads do not survive a fork.
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_start_worker,
                initargs=(os.getpid(),),
            )
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, task: Callable[[], dict[str, Any]]) -> Future[dict[str, Any]]:
        if self._executor is not None:
            return self._executor.submit(task)
        done: Future[dict[str, Any]] = Future()
        done.set_result(task())
        return done

    def result(self, future: Future[dict[str, Any]]) -> dict[str, Any]:
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the recipe was ended from outside (out of memory?); run the same "
                "command again with a smaller --workers: finished shards are kept."
            ) from error


def check_least(*options: tuple[str, int, int]) -> None:
    """:param options: an option's name, its value and the least that it may be.

    :raises UserError: naming the first one that is less.
    """
    for name, value, least in options:
        if value < least:
            raise UserError(f"{name} is {value}; expected a whole number of at least {least}.")


def _start_worker(parent: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the first has something to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed recipe leaves no process behind that would write beside its successor."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


# --------------------------------------------------------------------------- progress


class Progress:
    """A bar on a terminal; in a log a line every ten seconds and one at the end."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.samples = self.done = 0
        self._old = self._old_samples = 0  # of an earlier run: they say nothing about the speed
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=label, unit=" " + unit) if sys.stderr.isatty() else None

    def update(self, weight: int, shard: Mapping[str, Any], new: bool = True) -> None:
        """Counts a finished shard; one of an earlier run is not `new`."""
        self.done += weight
        samples = int(shard["samples"]) + int(shard.get("consumed", {}).get("set_aside", 0))
        self.samples += samples
        if not new:
            self._old += weight
            self._old_samples += samples
        if self._bar is not None:
            self._bar.update(weight)
            self._bar.set_postfix(samples=self.samples)
        elif time.monotonic() - self._last > LOG_EVERY:
            self._line()

    def close(self) -> None:
        """Says where it ended."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._line()

    def _line(self) -> None:
        now = self._last = time.monotonic()
        passed = max(now - self._start, 1e-9)
        line = f"{self.label}: {self.done} {self.unit}"
        if self.total:
            line = f"{self.label}: {self.done}/{self.total} {self.unit}"
        rate = (self.samples - self._old_samples) / passed
        line += f", {self.samples} samples, {rate:.0f} a second"
        if self.total and self._old < self.done < self.total:
            left = passed * (self.total - self.done) / (self.done - self._old)
            line += f", about {duration(round(left))} left"
        print(line, flush=True)


def reasons(counts: Mapping[str, int]) -> str:
    """Counted reasons as words."""
    return ", ".join(f"{reason} {n}" for reason, n in counts.items()) or "none"


# ------------------------------------------------------------------ directories and summaries


def finished(out: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether `out` holds this dataset; False when it is free, or an earlier run was ended.

    :raises UserError: when anything else is there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; expected a directory to write to.")
    path = out / "summary.json"
    if not path.is_file():
        # The tokenizer may come before the summary; the lock and half a tokenizer are hidden.
        names = os.listdir(out) if out.is_dir() else []
        if any(name != "tokenizer" and not name.startswith(".") for name in names):
            raise UserError(
                f"--out {out} is not empty and was not written by this recipe; choose another "
                "directory or empty it."
            )
        return False
    try:
        found = json.loads(path.read_text())
        there, done = dict(found["arguments"]), bool(found["finished"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the summary of a prepared dataset ({error!r}); choose another --out "
            "or delete the directory."
        ) from error
    different = [
        f"{name} is {there.get(name)!r} there and {wanted.get(name)!r} here"
        for name in {**wanted, **there}
        if there.get(name) != wanted.get(name)
    ]
    if different:
        raise UserError(
            f"--out {out} holds a different dataset: {'; '.join(different)}. Choose another --out, "
            "delete the directory, or repeat the arguments it was made with."
        )
    return done


def stored_summary(out: Path) -> dict[str, Any]:
    """What `save_summary` stored."""
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def save_summary(out: Path, summary: Mapping[str, Any]) -> None:
    """Stores summary.json, whole or not at all."""
    temporary = out / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=1) + "\n")
    os.replace(temporary, out / "summary.json")


def summary_of(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a summary says of a split, from its meta file."""
    return {n: meta[n] for n in ("samples", "images", "text_tokens", "skipped", "mended")}


def print_summary(label: object, splits: Mapping[str, Mapping[str, Any]]) -> None:
    """Samples, images, tokens and what was skipped, a line a split."""
    print(f"finished: {label}")
    for name, found in splits.items():
        print(
            f"  {name}: {found['samples']} samples, {found['images']} images, "
            f"{found['text_tokens']} text tokens; skipped: {reasons(found['skipped'])}; "
            f"repaired: {reasons(found['mended'])}"
        )


@contextmanager
def writing(out: Path, wanted: Mapping[str, Any]) -> Iterator[bool]:
    """Holds a directory, so that two runs do not write the same shards; yields `finished`.

    :raises UserError: something else is there, another process writes there, or nobody may.
    """
    if finished(out, wanted):  # nothing will be written, so nothing is held
        yield True
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("a")
    except OSError as error:  # no permission, a file in the way
        raise UserError(f"--out {out} cannot be written: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another recipe is writing to {out}; wait for it, or end it."
            ) from error
        except OSError:  # a file system without locks
            pass
        done = finished(out, wanted)
        if (out / "summary.json").exists() and not done:
            print(f"{out} was left unfinished: going on after its last finished shard.")
        try:
            yield done
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            raise UserError(f"--out {out} cannot be written: {error}") from error
