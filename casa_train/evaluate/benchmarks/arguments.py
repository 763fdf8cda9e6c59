"""The options of `python -m casa_train.evaluate` that belong to `--benchmarks`."""

from __future__ import annotations

import argparse
from pathlib import Path

from casa_train.config.bounds import local_path, whole_from
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.request import Request, default_out, export_of
from casa_train.io.precision import DTYPES
from casa_train.modeling.image_processing_casa import SIDE

BATCH_SIZE = 16
"""The authors' own."""
OTHERS = ("sweep", "export", "config_dir", "text")
"""Options of other evaluations, by their names in the namespace."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; each is None until it is given."""
    group = parser.add_argument_group(
        "benchmarks",
        "python -m casa_train.evaluate EXPORT --benchmarks NAMES: the benchmarks of the paper "
        "instead of a run's validation sets; EXPORT may be a run. Also under torchrun.",
    )
    group.add_argument(
        "--benchmarks", metavar="NAMES", help=f"all, or some of {','.join(BENCHMARKS)}"
    )
    group.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        help="; ".join(f"{p.name}: {p.source}" for p in PROTOCOLS.values()) + " (default: casa)",
    )
    group.add_argument(
        "--source",
        type=local_path,
        metavar="DIR",
        help="local copies of the data sets: DIR/ChartQA, ... (default: from the hub)",
    )
    group.add_argument(
        "--out", type=local_path, metavar="DIR", help="for answers and scores (default: beside it)"
    )
    group.add_argument(
        "--samples",
        type=whole_from(1),
        metavar="N",
        help="questions of each, evenly (default: all)",
    )
    group.add_argument(
        "--batch-size", type=whole_from(1), metavar="N", help=f"questions at once ({BATCH_SIZE})"
    )
    group.add_argument(
        "--image-size",
        type=whole_from(SIDE),
        metavar="PIXELS",
        help="an image has at most the pixels of a square of this side (default: the protocol's)",
    )
    group.add_argument(
        "--dtype", choices=list(DTYPES), help="of the parameters (default: that of the files)"
    )


OWN = ("protocol", "source", "out", "samples", "batch_size", "image_size", "dtype")


def check_alone(arguments: argparse.Namespace) -> None:
    """Options of benchmarks and of other evaluations do not stand together.

    :raises UserError: naming them.
    """
    asked = arguments.benchmarks is not None
    stray = [name for name in (OTHERS if asked else OWN) if getattr(arguments, name) is not None]
    if asked and arguments.only != "*":
        stray.append("only")
    options = [f"--{name.replace('_', '-')}" for name in stray]
    if asked:
        options += arguments.overrides
    if options:
        raise UserError(
            f"{', '.join(options)} say{'s' if len(options) == 1 else ''} nothing "
            f"{'beside' if asked else 'without'} --benchmarks; leave it out"
            + (".", ", or name the benchmarks: --benchmarks all.")[not asked]
        )


def request_of(arguments: argparse.Namespace) -> Request:
    """What is asked for.

    :raises UserError: no export, unknown benchmarks, a folder that is not there, answers that
        would be files of the export.
    """
    names = names_of(arguments.benchmarks)
    export = export_of(arguments.run)
    protocol = arguments.protocol or "casa"
    source: Path | None = arguments.source
    if source is not None and not source.is_dir():
        raise UserError(
            f"--source {source}: there is no such folder; expected one with copies of the data "
            "sets, such as DIR/ChartQA."
        )
    beside = default_out(export, protocol)
    out: Path = arguments.out or beside
    if out.resolve() == export.resolve():
        raise UserError(
            f"--out {out} is the export itself, which would be another one with every file that is "
            f"put there; expected a folder of its own. Leave --out away for {beside}."
        )
    return Request(
        export,
        names,
        protocol,
        source,
        out,
        arguments.samples,
        arguments.batch_size or BATCH_SIZE,
        arguments.image_size,
        arguments.dtype,
    )


def names_of(text: str) -> list[str]:
    """`chartqa,docvqa` or `all` -> names, in the order of the tables.

    :raises UserError: an unknown one, or none.
    """
    asked = [name.strip().lower() for name in text.split(",") if name.strip()]
    unknown = [name for name in asked if name not in (*BENCHMARKS, "all")]
    if unknown or not asked:
        raise UserError(
            f"--benchmarks {text}: {', '.join(unknown) or 'nothing'} is no benchmark; expected "
            f"some of {','.join(BENCHMARKS)}, or all."
        )
    return [name for name in BENCHMARKS if name in asked or "all" in asked]
