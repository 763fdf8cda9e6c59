"""python -m casa_train.export RUN [--step N] --out DIR: a checkpoint as a Hugging Face directory.

`--push USER/NAME` uploads it to the hub; without RUN, the export that stands in DIR.
"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import sys
from collections.abc import Sequence

from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.export.adapters import KEEP, MERGE
from casa_train.export.from_run import export
from casa_train.export.push import push, repository
from casa_train.io.precision import DTYPES
from casa_train.io.quiet import quiet_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.export", description=__doc__)
    parser.add_argument(
        "run", type=local_path, nargs="?", help="a run directory, such as runs/demo"
    )
    parser.add_argument("--out", type=local_path, required=True, help="the directory to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the run's precision")
    parser.add_argument(
        "--lora",
        choices=(MERGE, KEEP),
        help="adapters added to the weights, or apart in peft's format (default: export.lora)",
    )
    parser.add_argument(
        "--push", type=repository, metavar="USER/NAME", help="upload the export to the hub"
    )
    parser.add_argument("--private", action="store_true", help="into a private repository")
    arguments = parser.parse_args(argv)
    if arguments.private and arguments.push is None:
        parser.error("--private says how to push; expected --push USER/NAME beside it")
    if arguments.run is None:
        if arguments.push is None:
            parser.error("expected RUN to export, or --push USER/NAME for the export in --out")
        if any(value is not None for value in (arguments.step, arguments.dtype, arguments.lora)):
            parser.error("--step, --dtype and --lora are of an export that is made: name its RUN")
    quiet_libraries()
    try:
        a = arguments
        if a.run is not None:
            print(export(a.run, a.out, a.step, a.dtype, a.lora))
            print(f"exported to {a.out}")
        if a.push is not None:
            print(f"pushed {a.out} to {push(a.out, a.push, a.private)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
