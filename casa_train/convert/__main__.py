"""python -m casa_train.convert kyutai DIR_OR_HUB_ID --out EXPORT [--verify --trust-remote-code]: a
released CASA checkpoint as an export of this project, and the proof by its own code.

`python -m casa_train.convert gguf FILE --out DIR` is another conversion: a Llama out of a GGUF file
as a backbone to start from (`gguf_backbone.py`).

With --verify and an EXPORT that was converted from the same files, it is compared alone.
"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from casa_train.config.bounds import local_path, path_or_hub_id
from casa_train.convert import gguf_backbone
from casa_train.convert.conversion import Choices, convert, open_source
from casa_train.convert.name_tree import name_tree
from casa_train.convert.original import Places
from casa_train.convert.record import (
    check_same_choices,
    check_same_source,
    source_digest,
    write_verified,
)
from casa_train.convert.rules import Rules, load_rules, shipped_names
from casa_train.convert.verify import TOLERANCES, Setting, check_device, facts, verify
from casa_train.errors import UserError
from casa_train.io.files import EXPORT_MARKER
from casa_train.io.precision import DTYPES
from casa_train.io.quiet import quiet_libraries
from casa_train.modeling.image_processing_casa import square
from casa_train.setup.pretrained import Pretrained


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 1 where --verify found a difference."""
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["gguf"]:
        return gguf_backbone.main(given[1:])
    arguments = _parser().parse_args(given)
    quiet_libraries()
    try:
        if arguments.verify and not arguments.trust_remote_code:
            raise UserError(
                "--verify runs the code that lies in SOURCE in this process; expected consent. "
                "Read that code, then add --trust-remote-code."
            )
        if arguments.trust_remote_code and not arguments.verify:
            raise UserError(
                "--trust-remote-code says nothing without --verify: a conversion runs no code."
            )
        alone = [n for n in ("device", "precision", "attention") if getattr(arguments, n)]
        if alone and not arguments.verify:
            raise UserError(
                f"--{alone[0]} says nothing without --verify: a conversion computes nothing with "
                "the original. Leave it out, or add --verify --trust-remote-code."
            )
        rules = load_rules(arguments.publisher, arguments.rules)
        source = open_source(arguments.source)
        if arguments.tree:
            print(name_tree(source.shapes()))
            return 0
        if arguments.out is None:
            raise UserError("--out is missing: name the directory to write.")
        setting = Setting(
            arguments.device or "cpu", arguments.precision or "fp32", arguments.attention
        )
        check_device(setting.device)  # before gigabytes are written
        choices = Choices(
            arguments.dtype,
            arguments.template,
            arguments.tokenizer,
            _pixels(arguments.image_size),
            dict(_pair(text) for text in arguments.fusion),
        )
        if arguments.verify and (arguments.out / EXPORT_MARKER).is_file():
            digest = source_digest(source.directory)
            check_same_source(arguments.out, digest, source.name)
            own = None if arguments.rules is None else rules
            check_same_choices(arguments.out, choices.given(), own)
            print(f"{arguments.out} was converted from {source.name}: compared alone")
        else:
            convert(source, arguments.out, rules, choices, print)
            print(f"converted to {arguments.out}")
        if arguments.verify:
            return _verify(source, arguments.out, rules, setting)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m casa_train.convert", description=__doc__)
    parser.add_argument("publisher", choices=shipped_names(), help="whose rules")
    parser.add_argument("source", type=path_or_hub_id, help="a checkpoint: directory or hub id")
    parser.add_argument("--out", type=local_path, help="the export, a new directory")
    parser.add_argument("--rules", type=local_path, help="a rules file of your own (YAML)")
    parser.add_argument("--tree", action="store_true", help="print the names of its tensors alone")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: as the tensors are")
    parser.add_argument("--template", help="auto, a name of conf/model/template, a file, or fields")
    parser.add_argument("--tokenizer", type=path_or_hub_id, help="default: the checkpoint's")
    parser.add_argument("--image-size", type=int, help="at most so many pixels squared")
    parser.add_argument(
        "--fusion", nargs="*", default=[], metavar="KEY=VALUE", help="such as mechanism=casa"
    )
    own = parser.add_argument_group("comparison with the original")
    own.add_argument("--verify", action="store_true", help="run both, compare logits and layers")
    own.add_argument(
        "--trust-remote-code", action="store_true", help="let --verify run SOURCE's own code"
    )
    own.add_argument("--device", help="cpu, the default, or cuda")
    own.add_argument("--precision", choices=sorted(TOLERANCES), help="default: fp32")
    own.add_argument("--attention", help="the original's attn_implementation")
    return parser


def _pixels(side: int | None) -> int | None:
    try:
        return None if side is None else square(side, "--image-size")
    except ValueError as error:
        raise UserError(f"{error}; expected a larger one.") from error


def _pair(text: str) -> tuple[str, object]:
    key, found, value = text.partition("=")
    if not found or not key:
        raise UserError(f"--fusion {text!r}; expected KEY=VALUE, such as mechanism=casa.")
    return key, yaml.safe_load(value)


def _verify(source: Pretrained, out: Path, rules: Rules, setting: Setting) -> int:
    """Compares, says so and records it; returns the exit code."""
    verdict = verify(source.directory, out, Places(rules.layer, rules.vision), setting)
    print(verdict.table())
    if not verdict.passed:
        print(
            f"NOT equal: the first difference is in {verdict.first_difference}. Its setting, or a "
            "rule for it, is wrong: --fusion, --template and --rules change them, in a conversion "
            "to another --out."
        )
        return 1
    digest = source_digest(source.directory)
    write_verified(out, facts(verdict, digest, setting))
    print(f"verified: logits equal to {verdict.worst:.1e}, noted in {out / EXPORT_MARKER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
