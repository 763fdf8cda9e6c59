"""python -m casa_train.evaluate RUN [--export DIR]: exact match of an export on the validation
sets; with --sweep DIR of every job of a sweep, exported first where it is not.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from casa_train.checkpoint.loading import load_model, load_processor
from casa_train.data.shards import Split
from casa_train.errors import UserError
from casa_train.evaluation.exact_match import (
    evaluate,
    first_questions,
    generate_answers,
    readable,
)
from casa_train.evaluation.reads import image_reads
from casa_train.export import export as write_export
from casa_train.export import find_checkpoint, load_run_config
from casa_train.files import EXPORT_MARKER, sha256, write_atomic
from casa_train.quiet import quiet_libraries
from casa_train.run_directory import EVALUATION_FILE
from casa_train.sweep import run_directories


def evaluate_run(run: Path, export: Path) -> dict[str, Any]:
    """Evaluates an export on the run's validation splits; writes and returns `evaluation.json`.

    The export is loaded as a user would: plain transformers and its own remote code.

    :raises UserError: no export, or no validation questions with images.
    """
    config = load_run_config(run)
    if not (export / EXPORT_MARKER).is_file():
        raise UserError(
            f"{export} is not an export; name one with --export (a run keeps its own in "
            f"{run / 'exports'}), or write one with 'python -m casa_train.export {run} --out "
            f"{export}'."
        )
    if not config.data.validation:
        raise UserError(
            f"{run}: data.validation names no held-out split, so nothing can be evaluated."
        )
    splits = {name: Split(Path(s.path)) for name, s in config.data.validation.items()}
    skipped: Counter[str] = Counter()
    questions = first_questions(splits, config.evaluation.max_samples, skipped)
    if not questions:
        raise UserError(f"{run}: the validation splits hold no question about an image.")
    sources = [Split(Path(s.path)) for s in config.data.sources.values()]
    unread: Counter[str] = Counter()  # training samples only serve the image-free guess
    training = itertools.chain.from_iterable(readable(split, unread) for split in sources)
    model, processor = load_model(export, "auto"), load_processor(export)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    result = evaluate(
        questions,
        training,
        functools.partial(
            generate_answers,
            model,
            processor,
            batch_size=config.evaluation.batch_size,
            max_new_tokens=config.evaluation.max_new_tokens,
        ),
    )
    result = {
        "export": str(export),
        "step": _step(export / EXPORT_MARKER),
        "weights_sha256": {p.name: sha256(p) for p in sorted(export.glob("*.safetensors"))},
        "seconds": time.perf_counter() - began,
        "skipped": dict(skipped),
        "attention": image_reads(model, processor, questions, config.evaluation.attention_samples),
        **result,
    }
    write_atomic(run / EVALUATION_FILE, json.dumps(result, indent=1) + "\n")
    return result


def evaluate_sweep(sweep: Path, only: str = "*") -> int:
    """Exports and evaluates the newest checkpoint of every job, where that is not done yet.

    :return: how many jobs could not be evaluated; each is named with its reason.
    :raises UserError: there is no run.
    """
    failures = 0
    for run in run_directories(sweep, only):
        try:
            step = find_checkpoint(run, None).step
            if _step(run / "export" / EXPORT_MARKER) != step:
                write_export(run, run / "export")
            done = "already evaluated"
            if _step(run / EVALUATION_FILE) != step:
                result = evaluate_run(run, run / "export")
                done = f"exact match {result['exact_match']:.3f}, blind {result['blind']:.3f}"
            print(f"{run.name}: step {step}, {done}", flush=True)
        except UserError as error:
            failures += 1
            print(f"error: {run.name}: {error}", file=sys.stderr)
    return failures


def _step(path: Path) -> int | None:
    """The step that a JSON file says it is of; None without one."""
    try:
        step = json.loads(path.read_text())["step"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return int(step)


def table(result: dict[str, Any]) -> str:
    """The scores as text, overall last."""
    rows = [("family", "exact match", "blind", "guess", "questions")]
    for name, scores in [*result["families"].items(), ("overall", result)]:
        values = (f"{scores[k]:.3f}" for k in ("exact_match", "blind", "guess"))
        rows.append((name, *values, str(scores["questions"])))  # type: ignore[arg-type]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.evaluate", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", type=Path, nargs="?", help="a run directory, such as runs/demo")
    what.add_argument("--sweep", type=Path, metavar="DIR", help="where a sweep's jobs are: runs")
    parser.add_argument("--only", default="*", help="pattern of jobs' directories: 'demo,fusion=*'")
    parser.add_argument("--export", type=Path, help="the export (default: RUN/export)")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        if arguments.sweep is not None:
            return 2 if evaluate_sweep(arguments.sweep, arguments.only) else 0
        result = evaluate_run(arguments.run, arguments.export or arguments.run / "export")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if result["skipped"]:
        print(f"skipped samples that could not be read: {result['skipped']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
