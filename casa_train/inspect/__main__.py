"""python -m casa_train.inspect TARGET [overrides ...]: a page of the data as training sees it.

TARGET is a prepared split, a run directory or an experiment, also one that streams its data.
"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from casa_train.config.bounds import local_path
from casa_train.config.compose import (
    add_config_dir,
)
from casa_train.distributed.threads import use_threads
from casa_train.errors import UserError
from casa_train.inspect.data_page import Page, write_page
from casa_train.inspect.pages import find_target, inspect_plan, inspect_sample
from casa_train.io.numbers import memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.inspect", description=__doc__)
    parser.add_argument(
        "target", type=local_path, help="DIR/train of prepared data, a run, or an experiment"
    )
    parser.add_argument("overrides", nargs="*", help="fields, such as data.text_tokens=4096")
    parser.add_argument(
        "--out", type=local_path, default=Path("inspect.html"), help="file to write"
    )
    parser.add_argument("--packs", type=int, default=4, help="packs that are drawn (default: 4)")
    parser.add_argument("--first", type=int, help="first of them (default: spread over a plan)")
    parser.add_argument("--sample", metavar="[SOURCE/]KEY", help="show this sample alone")
    parser.add_argument("--seed", type=int, help="the order's seed (default: the configuration's)")
    parser.add_argument("--experiment", help="whose tokenizer, template and budgets a split gets")
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.packs < 0 or (arguments.first or 0) < 0:
        parser.error("--packs and --first must be 0 or more")
    try:
        target = find_target(
            str(arguments.target), arguments.experiment, arguments.overrides, arguments.config_dir
        )
        if arguments.seed is not None:
            target.config.seed = arguments.seed
        use_threads(target.config.parallel.threads)
        if arguments.sample is not None:
            page = inspect_sample(target, arguments.sample)
        else:
            page = inspect_plan(target, arguments.packs, arguments.first)
        write_page(page, arguments.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    size = memory(arguments.out.stat().st_size)
    print(f"{target.title}: {summary(page)}, page {arguments.out} ({size})")
    return 0


def summary(page: Page) -> str:
    """The page in a few words."""
    failures = sum(len(pack.failures) for pack in page.packs)
    failed = f", {failures} of their samples failed" if failures else ""
    if page.stream is not None:
        stream = page.stream
        return (
            f"{stream.packs:,} packs drawn of a stream of {sum(s.rows for s in stream.subsets):,} "
            f"rows, {stream.samples:,} samples, text fill {stream.fills[0]:.1%}, image fill "
            f"{stream.fills[1]:.1%}, {stream.left_out:,} rows fit no pack, "
            f"{len(stream.failures):,} rows could not be used"
        )
    if page.plan is None:
        return f"sample {page.sample.id}{failed}" if page.sample else failed
    plan = page.plan
    return (
        f"{plan.packs:,} packs planned of {plan.samples:,} samples, text fill "
        f"{plan.fills[0]:.1%}, image fill {plan.fills[1]:.1%}, {plan.dropped:,} samples fit no "
        f"pack; {len(page.packs)} packs drawn{failed}"
    )


if __name__ == "__main__":
    sys.exit(main())
