"""Parameters matched by `model.match` or `model.new_parameters`, on the configuration's side: the
mechanism that is named there, and a configuration as it was before a start chose its numbers.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import yaml

from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config
from casa_train.errors import UserError

READY = CONF_DIR / "fusion"
MECHANISM = "mechanism"


def fusion_fields(spec: Any, setting: str) -> dict[str, Any] | None:
    """A mechanism and its options, read where they are named.

    :param spec: the name of a file in conf/fusion, a YAML file, or the fields themselves; None:
        there are none.
    :param setting: what names it, for messages.
    :raises UserError: nothing of that kind, or fields without a mechanism.
    """
    if spec is None:
        return None
    values = dict(spec) if isinstance(spec, dict) else _read(str(spec), setting)
    if not isinstance(values.get(MECHANISM), str):
        raise UserError(f"{setting} is {spec!r}, which names no mechanism; expected {_expected()}.")
    return values


def as_given(config: Config) -> Config:
    """The configuration as it was before its parameters were matched: jobs of a sweep that were
    matched to one number differ in what was typed alone.

    Where the width had been left to its default, it stands there as a number.
    """
    matched = config.model.matched
    if matched is None:
        return config
    plain = copy.deepcopy(config)
    if matched.fusion:
        plain.fusion = dict(matched.fusion)
    if matched.intermediate_size is not None:
        plain.model.backbone.config["intermediate_size"] = matched.intermediate_size
    plain.model.matched = None
    return plain


def _expected() -> str:
    names = sorted(path.stem for path in READY.glob("*.yaml"))
    return (
        f"one of {', '.join(names)}, a YAML file laid out like those in conf/fusion, or fields "
        "such as {mechanism: casa, every: 2}"
    )


def _read(spec: str, setting: str) -> dict[str, Any]:
    ready = READY / f"{spec}.yaml"
    path = ready if "/" not in spec and ready.is_file() else Path(os.path.expanduser(spec))
    try:
        return _with_defaults(path)
    except (OSError, yaml.YAMLError, UnicodeError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{setting} is {spec!r}, which cannot be read ({first}); expected {_expected()}."
        ) from error


def _with_defaults(path: Path) -> dict[str, Any]:
    """The fields of a file and of those beside it that its `defaults` name, the later on top."""
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(own, dict):
        raise ValueError(f"{path} holds no fields")
    order = own.pop("defaults", [])
    if "_self_" not in order:
        order = [*order, "_self_"]
    values: dict[str, Any] = {}
    for name in order:
        if name == "_self_":
            values |= own
        elif isinstance(name, str):
            values |= _with_defaults(path.parent / f"{name}.yaml")
        else:
            raise ValueError(f"its defaults hold {name!r}, not the name of a file beside it")
    return values
