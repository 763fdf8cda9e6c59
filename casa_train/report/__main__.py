"""python -m casa_train.report RUN, or --sweep DIR: one self-contained HTML page about a run, or
about the jobs of a sweep; with --match, their comparison by abilities, with what it carries.
"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import sys
from collections.abc import Sequence

from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.evaluate.evaluation import scores_said
from casa_train.report.comparison_page import write_comparison
from casa_train.report.jobs import read_sweep
from casa_train.report.read_points import MATCHES
from casa_train.report.run_report import report
from casa_train.report.sweep_page import markdown, write_sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.report", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("run", type=local_path, nargs="?", help="a run directory, such as runs/demo")
    what.add_argument(
        "--sweep", type=local_path, metavar="DIR", help="where a sweep's jobs are: runs"
    )
    parser.add_argument("--only", default="*", help="pattern of jobs' directories: 'demo,fusion=*'")
    parser.add_argument(
        "--match", choices=MATCHES, help="of --sweep: compare variants where this was the same"
    )
    parser.add_argument(
        "--baseline",
        metavar="VARIANT",
        help="of --match: insertion if there is one, else the first",
    )
    arguments = parser.parse_args(argv)
    if arguments.match is not None and arguments.sweep is None:
        parser.error("--match compares the jobs of a sweep: name one with --sweep DIR")
    if arguments.baseline is not None and arguments.match is None:
        parser.error("--baseline belongs to a comparison: say by what it is matched with --match")
    try:
        if arguments.match is not None:
            lines, page = write_comparison(
                arguments.sweep, arguments.only, arguments.match, arguments.baseline
            )
            print(*lines, "", f"report {page}", sep="\n")
            return 0
        if arguments.sweep is not None:
            jobs = read_sweep(arguments.sweep, arguments.only)
            page = write_sweep(jobs, arguments.sweep.resolve().name, arguments.sweep)
            print(*markdown(jobs), "", f"report {page}", sep="\n")
            return 0
        path, evaluation = report(arguments.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    parts = [f"report {path}"]
    if evaluation is not None:
        scores = scores_said(evaluation)
        if evaluation["guess"] is not None:
            scores.insert(2, f"image-free guess {evaluation['guess']:.3f}")
        parts = [*scores, f"export {evaluation['export']}", *parts]
    print(f"{arguments.run.name}: {', '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
