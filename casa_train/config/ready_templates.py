"""Chat templates by name: ready files in conf/model/template, a YAML file, or fields on the command
line.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.model_schema import TemplateConfig
from casa_train.errors import UserError

READY = CONF_DIR / "model" / "template"


AUTO = "auto"


NAMES = tuple(field.name for field in fields(TemplateConfig))


def ready_names() -> list[str]:
    """Names of the files in conf/model/template."""
    return sorted(path.stem for path in READY.glob("*.yaml") if path.stem != AUTO)


def read_template(spec: str, setting: str) -> dict[str, Any]:
    """The fields of a template that is named on a command line; those of "auto" are none.

    :param spec: auto, the name of a ready file, a YAML file, or fields as a YAML mapping.
    :param setting: what names it, for messages.
    :raises UserError: nothing of that kind, or fields that no template has.
    """
    if spec == AUTO:
        return {}
    if spec in ready_names():
        path = READY / f"{spec}.yaml"
    elif not spec.lstrip().startswith("{"):
        path = Path(os.path.expanduser(spec))
    else:
        path = None
    try:
        values = yaml.safe_load(spec if path is None else path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeError) as error:
        first = str(error).splitlines()[0]
        raise UserError(
            f"{setting} is {spec!r}, which cannot be read ({first}); expected auto, one of "
            f"{', '.join(ready_names())}, a YAML file, or fields such as "
            "'{user_start: \"<|user|>\", ...}'."
        ) from error
    if not isinstance(values, dict) or not set(values) <= set(NAMES):
        raise UserError(
            f"{setting} is {spec!r}, which holds {values!r:.200}; expected fields out of "
            f"{', '.join(NAMES)}."
        )
    return values
