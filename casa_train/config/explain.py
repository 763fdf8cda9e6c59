"""What Hydra and OmegaConf found wrong, in one message with what to write instead."""

from __future__ import annotations

import difflib
import re
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf

from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config


def explain(error: Exception) -> str:
    """One message for what Hydra or OmegaConf found wrong, without search paths and types."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if "Config search path:" in lines:
        lines = lines[: lines.index("Config search path:")]
    keys = [x.removeprefix("full_key:").strip() for x in lines if x.startswith("full_key:")]
    noise = ("full_key:", "object_type=", "reference_type=", "To append", "See https:", "^")
    message = " ".join(line for line in lines if not line.startswith(noise)).rstrip(".")
    message = message.removeprefix("In 'train': ")
    cause = str(error.__cause__ or "").splitlines() if isinstance(error, HydraException) else []
    if cause:
        message += f" ({cause[0].strip().rstrip('.')})"
    if keys and keys[0] not in message:
        message = f"{keys[0]}: {message}"
    message += "."
    if "is not a ListConfig" in message:
        name = (keys or ["NAME"])[0]
        return f"{name} is no list; expected one, in brackets: {name}=[VALUE,...]."
    if isinstance(error, OverrideParseException):
        at = "" if error.override in message else f"{error.override}: "
        message = f"{at}{message} Put values with special characters in quotes: 'NAME=\"VALUE\"'."
    if "No match in the defaults list" in message and "'experiment'" in message:
        return message + " Experiments are added: write +experiment=NAME."
    if "Multiple values for experiment" in message:
        return message + " A sweep names its own: write experiment=NAME, without the +."
    if re.search(r"not in '|not in struct|Could not override", message):
        overridden = re.search(r"override '\+?([^'=]+)", message)
        name = overridden.group(1) if overridden else (keys or [""])[0]
        parent = name.rpartition(".")[0]
        known = known_fields(parent)
        if parent == "fusion":
            message += f" {fusion_options(name)}"
        elif re.fullmatch(r"optim\.groups\.[^.]+", parent):
            message += f" Groups in conf/optim: {', '.join(group_names())}."
        elif known:
            message += f" Fields of {parent or 'the configuration'}: {', '.join(known)}."
        else:
            message += f" To add a new entry write +{name}=VALUE."
    return message


def known_fields(parent: str) -> list[str]:
    """Names of the fields under a dotted name, none where it names no section."""
    node: Any = OmegaConf.structured(Config)
    for name in parent.split(".") if parent else []:
        if not isinstance(node, DictConfig) or name not in node:
            return []
        node = node._get_node(name)
    return sorted(map(str, node.keys())) if isinstance(node, DictConfig) else []


def group_names() -> list[str]:
    """The parameter groups that the project's own optimisers have."""
    files = (CONF_DIR / "optim").glob("*.yaml")
    loaded: list[Any] = [OmegaConf.load(file) for file in files]
    return sorted({str(name) for raw in loaded for name in raw.get("groups") or {}})


def fusion_options(name: str) -> str:
    """What to write for an option that the chosen mechanism does not have, or nobody has."""
    files = sorted((CONF_DIR / "fusion").glob("*.yaml"))
    options = {
        file.stem: [str(key) for key in OmegaConf.load(file) if key != "defaults"] for file in files
    }
    known = sorted({key for keys in options.values() for key in keys})
    key = name.rpartition(".")[2]
    owners = [mechanism for mechanism, keys in options.items() if key in keys]
    if owners:
        return f"fusion.{key} is an option of {', '.join(owners)}: choose fusion={owners[0]}."
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean fusion.{close[0]}?"
    return f"Options of the mechanisms: {', '.join(known)}; conf/fusion explains them."
