"""python -m casa_train.export RUN [--step N] --out DIR: a checkpoint as a Hugging Face
directory.
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
from casa_train.io.precision import DTYPES
from casa_train.io.quiet import quiet_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.export", description=__doc__)
    parser.add_argument("run", type=local_path, help="a run directory, such as runs/demo")
    parser.add_argument("--out", type=local_path, required=True, help="the directory to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the run's precision")
    parser.add_argument(
        "--lora",
        choices=(MERGE, KEEP),
        help="adapters added to the weights, or apart in peft's format (default: export.lora)",
    )
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        a = arguments
        print(export(a.run, a.out, a.step, a.dtype, a.lora))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
