"""What a benchmark's answers come to: a file of lines a benchmark, and `benchmarks.json`."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.kept import KEPT
from casa_train.evaluate.benchmarks.protocols import Task
from casa_train.evaluate.benchmarks.question import BENCHMARKS, BenchmarkQuestion
from casa_train.evaluate.benchmarks.reading import Benchmark
from casa_train.evaluate.benchmarks.scorers import letter_of, until
from casa_train.evaluate.benchmarks.sources import SOURCES
from casa_train.evaluate.benchmarks.table import rows_of
from casa_train.io.files import write_atomic
from casa_train.io.log import read_json_lines
from casa_train.modeling.image_sources import ImageError

RESULTS = "benchmarks.json"
PAGE = "benchmarks.html"
OF_ONE_MODEL = ("weights_sha256", "protocol", "max_pixels", "dtype")
"""Figures stand together only where these are the same."""


def lines_file(name: str) -> str:
    """The file of a benchmark's answers."""
    return f"{name}.jsonl"


def join(
    benchmark: Benchmark, task: Task, kept: Mapping[int, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers -> (a record a question, in the benchmark's order; scores and counts).

    A question whose picture could not be read has an `error` in its record and does not count.

    :param kept: by the question's row: `answer` or `error`.
    :raises UserError: nothing was answered, or answers are not there.
    """
    _check_all(benchmark, kept)
    records, scored, scores = [], [], []
    for index, (question, row) in enumerate(zip(benchmark.questions, benchmark.rows, strict=True)):
        record: dict[str, Any] = {
            "id": question.id,
            "index": row,
            "question": question.text,
            "prompt": task.prompt(question),
            "reference": _references(question),
            "options": list(question.options),
            "category": question.category,
        }
        given = kept.get(row) or {"error": str(benchmark.sizes[index])}
        if "answer" in given:
            answer = until(str(given["answer"]), task.stop)
            record["answer"] = answer
            record["score"] = task.score(question, answer)
            scored.append(question)
            scores.append(record["score"])
        else:
            record["error"] = given["error"]
        records.append(record)
    try:
        total = task.total(scored, scores)
    except ValueError as error:
        broken = [record["error"] for record in records if "error" in record]
        found = f"; {len(broken)} pictures cannot be read, such as: {broken[0]}" if broken else ""
        raise UserError(f"{benchmark.name}: nothing can be scored: {error}{found}") from error
    return records, {
        "score": total.pop("score"),
        "sub_scores": total,
        "questions": len(records),
        "unreadable": len(records) - len(scores),
        "published": SOURCES[benchmark.name].rows,
        "source": benchmark.place,
        "split": benchmark.split,
        "revision": benchmark.revision,
    }


def _check_all(benchmark: Benchmark, kept: Mapping[int, Mapping[str, Any]]) -> None:
    """A question that was asked must not look like one whose picture cannot be read.

    :raises UserError: answers of other ranks are elsewhere.
    """
    readable = [not isinstance(size, ImageError) for size in benchmark.sizes]
    lost = sum(r and row not in kept for r, row in zip(readable, benchmark.rows, strict=True))
    if lost:
        raise UserError(
            f"{benchmark.name}: every rank has answered, but the first one finds no answer to "
            f"{lost:,} of {len(benchmark.rows):,} questions. Expected --out to be one folder that "
            "the ranks of all machines share and that nothing is removed from: name such a one, "
            "put into its folder kept what the other machines kept, and run the command again."
        )


def _references(question: BenchmarkQuestion) -> list[str]:
    """As a person reads them: the right option with its letter."""
    if not question.options:
        return list(question.references)
    right = int(question.references[0])
    return [f"{letter_of(right)}. {question.options[right]}"]


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Lets one command at a time write results: two that ask different benchmarks at once may share
    a folder. Where the file system has no locks, nothing is waited for.

    :raises UserError: the folder cannot be written.
    """
    path = out / KEPT / "results.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise _unwritable(path, out, error) from error
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_lines(out: Path, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    """:raises UserError: the disk takes no more."""
    text = "".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records)
    _write(out / lines_file(name), text)


def read_lines(out: Path, name: str) -> list[dict[str, Any]]:
    """What `write_lines` wrote.

    :raises UserError: it is not there any more.
    """
    file = out / lines_file(name)
    try:
        return read_json_lines(file)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}; {RESULTS} beside it has its scores. Run the "
            f"command with --benchmarks {name} again: kept answers are not asked anew."
        ) from error


def write_results(
    out: Path, head: Mapping[str, Any], name: str, entry: Mapping[str, Any]
) -> dict[str, Any]:
    """Adds a benchmark to `benchmarks.json`, or replaces it; returns the whole.

    What other weights or another protocol answered is left out with its lines, and said by the
    caller: figures that stand together must be of one model.

    :param head: what all of the file is of; :param entry: the benchmark's scores and counts.
    """
    result = read_results(out)
    same = all(result.get(key) == head[key] for key in OF_ONE_MODEL)
    replaced: dict[str, Any] = result.get("benchmarks", {})
    before = replaced if same else {}
    both = {**before, name: dict(entry)}
    result = {**head, "benchmarks": {name: both[name] for name in BENCHMARKS if name in both}}
    result["table"] = rows_of(result)
    _write(out / RESULTS, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for other in () if same else BENCHMARKS:
        if other in replaced and other != name:
            lines = out / lines_file(other)
            with contextlib.suppress(OSError):
                lines.unlink(missing_ok=True)
    return result


def read_results(out: Path) -> dict[str, Any]:
    """`benchmarks.json`; empty where there is none, or none of this command's."""
    try:
        found = json.loads((out / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    entries = found.get("benchmarks") if isinstance(found, dict) else None
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and "score" in entry for entry in entries.values()
    ):
        return {}
    whole: dict[str, Any] = found
    return whole


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, text)
    except OSError as error:
        raise _unwritable(path, path.parent, error) from error


def _unwritable(path: Path, out: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} cannot be written: {error.strerror}. The answers are kept in {out}: make room and "
        "run the same command again."
    )
