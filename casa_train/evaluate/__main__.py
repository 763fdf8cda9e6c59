"""python -m casa_train.evaluate RUN [--export DIR] [overrides ...]: exact match of an export on the
validation sets; with --sweep DIR of every job of a sweep, exported first where it is not.
python -m casa_train.evaluate RUN --text: does it answer without pictures as its plain backbone?
python -m casa_train.evaluate EXPORT --benchmarks all [--source DIR]: the benchmarks of the paper.
"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import Any

from casa_train.config.bounds import local_path
from casa_train.config.compose import add_config_dir
from casa_train.distributed.launched import launched_ranks
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.arguments import add_arguments, check_alone, request_of
from casa_train.evaluate.benchmarks.command import run_benchmarks
from casa_train.evaluate.benchmarks.results import PAGE
from casa_train.evaluate.benchmarks.table import benchmarks_table
from casa_train.evaluate.evaluation import OVERRIDES, evaluate_run, evaluate_sweep
from casa_train.evaluate.text_answers import compare_texts, text_table
from casa_train.io.log import drop_unwritten, log
from casa_train.io.quiet import quiet_libraries
from casa_train.io.tables import aligned
from casa_train.run.layout import EXPORT


def table(result: dict[str, Any]) -> str:
    """The scores as text, overall last."""
    rows = [("family", "exact match", "blind", "guess", "questions")]
    for name, scores in [*result["families"].items(), ("overall", result)]:
        shares = (scores[k] for k in ("exact_match", "blind", "guess"))
        values = ("-" if share is None else f"{share:.3f}" for share in shares)
        rows.append((name, *values, str(scores["questions"])))  # type: ignore[arg-type]
    return aligned(rows)


def live_table(live: dict[str, Any]) -> str:
    """The scores of live captions as text, overall last."""
    head = ("live captions", "match", "blind", "delay", "found", "false words", "seconds")
    rows = [(*head, "clips")]
    for name, scores in [*live["sources"].items(), ("overall", live)]:
        shares = [
            "-" if scores[k] is None else f"{scores[k]:.3f}"
            for k in ("match", "blind_match", "found")
        ]
        delay = scores["median_delay_frames"]
        frames = "-" if delay is None else f"{delay:g} frame{'' if abs(delay) == 1 else 's'}"
        minute = scores["false_words_per_minute"]
        false = "-" if minute is None else f"{minute:.1f}/min"
        counts = (str(scores["seconds"]), str(scores["clips"]))
        rows.append((name, *shares[:2], frames, shares[2], false, *counts))
    return aligned(rows)


def _benchmarks(arguments: argparse.Namespace) -> int:
    request = request_of(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        with launched_ranks() as ranks:
            result = run_benchmarks(request, ranks)
            if ranks.first:
                log(benchmarks_table(result))
                log(f"questions, answers and pictures: {request.out / PAGE}")
    except (KeyboardInterrupt, SystemExit) as stopped:
        print(
            f"stopped: every answered batch is kept in {request.out}; the same command goes on",
            file=sys.stderr,
        )
        return 128 + (signal.SIGTERM if isinstance(stopped, SystemExit) else signal.SIGINT)
    return 0


def _text(arguments: argparse.Namespace) -> int:
    stray = [f"--{n.replace('_', '-')}" for n in ("sweep", "config_dir") if vars(arguments)[n]]
    stray += ["--only"] * (arguments.only != "*") + arguments.overrides
    if stray:
        raise UserError(
            f"{', '.join(stray)} say{'s' if len(stray) == 1 else ''} nothing beside --text; name a "
            "run, and --export at most."
        )
    run = arguments.run
    print(text_table(compare_texts(run, arguments.export or run / EXPORT)))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.evaluate", description=__doc__)
    parser.add_argument(
        "run", type=local_path, nargs="?", help="a run directory, such as runs/demo"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        help=f"fields, such as evaluation.max_samples=200; those known: {', '.join(OVERRIDES)}",
    )
    parser.add_argument(
        "--sweep", type=local_path, metavar="DIR", help="where a sweep's jobs are: runs"
    )
    parser.add_argument("--only", default="*", help="pattern of jobs' directories: 'demo,fusion=*'")
    parser.add_argument("--export", type=local_path, help="the export (default: RUN/export)")
    parser.add_argument(
        "--text", action="store_true", default=None, help="compare texts without pictures, alone"
    )
    add_config_dir(parser)
    add_arguments(parser)
    arguments = parser.parse_intermixed_args(argv)
    config_dir = arguments.config_dir
    run, overrides = arguments.run, arguments.overrides
    if arguments.sweep is not None:
        overrides = [*([] if run is None else [str(run)]), *overrides]
    elif run is None:
        parser.error("name a run directory, or the directory of a sweep with --sweep")
    quiet_libraries()
    try:
        check_alone(arguments)
        if arguments.benchmarks is not None:
            return _benchmarks(arguments)
        if arguments.text:
            return _text(arguments)
        if (sweep := arguments.sweep) is not None:
            return 2 if evaluate_sweep(sweep, arguments.only, overrides, config_dir) else 0
        result = evaluate_run(run, arguments.export or run / EXPORT, overrides, config_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if result["questions"]:
        print(table(result))
    if result["live"] is not None:
        print(live_table(result["live"]))
    if result["skipped"]:
        print(f"skipped samples that could not be read: {result['skipped']}")
    if result["questions"] and result["guess"] is None:
        print("no image-free guess: it needs the prepared splits that were trained (data.sources)")
    return 0


if __name__ == "__main__":
    code = main()
    drop_unwritten()  # a console on a full disk is no failure
    sys.exit(code)
