"""python -m casa_train.bench NAME: runs a benchmark and prints its table."""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment(training=True, quiet_torch=True)  # before anything imports torch

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from casa_train.errors import UserError
from casa_train.io.files import write_atomic

if TYPE_CHECKING:  # it imports torch
    from casa_train.bench._benchmark import Benchmark


def benchmarks() -> dict[str, Benchmark]:
    """All benchmarks by name."""
    from casa_train.bench import attention, faults, images, packing, step, streaming

    modules = attention, faults, images, packing, step, streaming
    return {module.__name__.rpartition(".")[2]: module.BENCHMARK for module in modules}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.bench", description=__doc__)
    names = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    known = benchmarks()
    from casa_train.bench._benchmark import add_common_arguments

    for name, benchmark in known.items():
        own = names.add_parser(
            name,
            help=benchmark.measures,
            description=benchmark.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        benchmark.add_arguments(own)
        add_common_arguments(own)
    arguments = parser.parse_args(argv)
    try:
        if arguments.json and not arguments.json.absolute().parent.is_dir():
            raise UserError(f"--json {arguments.json}: the folder does not exist; create it first.")
        report = known[arguments.name].run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not report.text:  # of several ranks one speaks
        return 0
    print(report.text)
    if arguments.json:
        write_atomic(arguments.json, json.dumps(report.data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
