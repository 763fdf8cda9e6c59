"""Composing conf/ onto the dataclasses of `config.py`: types, cross-field checks, messages.

YAML is merged once onto `Config`, so a misspelt key or a wrong type fails by name before anything
loads.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from casa_train.config.bounds import Bound, Place, leaves, local_path, values
from casa_train.config.overrides import as_typed
from casa_train.config.schema import SIZES, Config, TemplateConfig, flatten
from casa_train.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
CONF_DIR = Path(__file__).resolve().parents[1] / "conf"
"""The project's own groups: in a checkout a link to its conf/, in a wheel the files themselves."""

# conf/train.yaml starts from these defaults, so that every field can be overridden by name. They
# are plain values, because Hydra cannot add an entry to a dict of dataclasses. `to_config` checks
# the types.
ConfigStore.instance().store(
    name="schema", node=OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)
)


def job_directory(name: str, overrides: Sequence[str]) -> str:
    """One directory name for a job of a sweep: the run's name and its overrides.

    Experiment, sweep and the name itself are left out; what no file system likes is replaced. A
    long name keeps only the ends of keys and paths, and says by a hash what it has lost.
    """
    parts, short = [name], [name]
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if key not in ("experiment", "sweep", "name"):
            parts.append(override)
            short.append(key.rpartition(".")[2] + equals + value.rpartition("/")[2])
    joined, brief = (re.sub(r"[^A-Za-z0-9.,=+~_-]", "_", ",".join(p)) for p in (parts, short))
    if len(joined) > 200:  # file names end at 255 bytes
        joined = brief[:180] + "," + hashlib.sha256(joined.encode()).hexdigest()[:16]
    return joined


# Hydra 1.3 uses names that omegaconf 2.4 gave up, and would say so at every start.
warnings.filterwarnings("ignore", message=r"register_new_resolver\(\) is deprecated")
warnings.filterwarnings("ignore", message=r"Implicit conversion from Version to str")
OmegaConf.register_new_resolver("job_directory", job_directory, replace=True)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    """Declares the option that Hydra gives to `python -m casa_train`, for the other commands."""
    parser.add_argument(
        "--config-dir",
        "-cd",
        type=local_path,
        metavar="DIR",
        help="a folder of your own laid out like conf/, such as DIR/experiment/mine.yaml",
    )


def search_path(config_dir: Path | None) -> list[str]:
    """The override that makes Hydra look into a user's own folder, after the project's.

    :raises UserError: no such folder.
    """
    if config_dir is None:
        return []
    if not config_dir.is_dir():
        raise UserError(
            f"--config-dir {config_dir} is not a directory; expected a folder laid out like conf/, "
            "such as DIR/experiment/mine.yaml."
        )
    path = str(config_dir.absolute()).replace("\\", "\\\\").replace("'", "\\'")
    return [f"hydra.searchpath=['file://{path}']"]


def experiment_names(config_dir: Path | None) -> list[str]:
    """What `+experiment=` takes, the user's own among them."""
    folders = [CONF_DIR, *([] if config_dir is None else [config_dir])]
    return sorted({f.stem for folder in folders for f in (folder / "experiment").glob("*.yaml")})


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """What `python -m casa_train OVERRIDES` would train.

    :param config_dir: a folder of the user's own with more groups and experiments.
    :raises UserError: naming the field or the override.
    """
    return _composed("train", overrides, config_dir)


def compose_onto(
    stored: Config, overrides: Sequence[str], config_dir: Path | None = None
) -> Config:
    """The configuration of a run with overrides on top, groups and experiments among them.

    :param config_dir: a folder of the user's own with more groups and experiments.
    :raises UserError: naming the field or the override.
    """
    node = OmegaConf.to_container(OmegaConf.structured(stored))
    ConfigStore.instance().store(name="stored", node=node)
    return _composed("stored", overrides, config_dir)


def _composed(root: str, overrides: Sequence[str], config_dir: Path | None) -> Config:
    """:param root: the configuration that the overrides are put onto."""
    overrides, where = as_typed(overrides), search_path(config_dir)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            raw = compose(root, overrides=[*where, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    return to_config(raw, overrides)


def refuse_one_directory(overrides: Sequence[str], sweep: str) -> None:
    """:param sweep: the option that makes a sweep of the overrides.

    :raises UserError: `run_dir` for all jobs.
    """
    given = next((o for o in overrides if o.lstrip("+").startswith("run_dir=")), None)
    if given is not None:
        raise UserError(
            f"{given} beside {sweep}: expected none, since every job of a sweep has a run "
            "directory of its own, called after its overrides. Choose the folder of these "
            "directories with hydra.sweep.dir=DIR."
        )


def to_config(raw: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Merges a composed configuration onto the dataclasses and checks it.

    :param overrides: of the command line, where a template's line breaks are written out.
    :raises UserError: naming the field, what was found and what was expected.
    """
    schema = OmegaConf.structured(Config)
    try:
        refuse_unquoted(OmegaConf.to_container(raw, resolve=False))
        # Through plain values: Hydra's "+key=value" would slip past the schema otherwise.
        container: Any = without_nulls(Config, OmegaConf.to_container(raw, resolve=True))
        model = container.setdefault("model", {})  # a file cut short may lack it
        if isinstance(model, dict):
            model["template"] = template_fields(model.get("template"), overrides)
        plain = OmegaConf.create(container)
        merged = OmegaConf.merge(schema, plain)
        absent = sorted(OmegaConf.missing_keys(plain))
        if raw.get("dry_run") is True:
            for name in absent:  # paths and templates, which a dry run does not read
                OmegaConf.update(plain, name, "not given")
        elif absent:
            raise UserError(
                f"{', '.join(absent)} must be given: the configuration leaves them open. Write "
                f"{absent[0]}=VALUE on the command line or set them in the experiment."
            )
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(explain(error)) from error
    assert isinstance(config, Config)
    resolve_places(config)
    check(config)
    return config


def without_nulls(kind: type, values: Any) -> dict[str, Any]:
    """The values without the entries that `NAME: null` deletes: sources, datasets, groups.

    A dict of dataclasses that is null itself becomes empty.

    :param kind: the dataclass that the values are of.
    """
    hints = get_type_hints(kind)
    kept = dict(values)
    for name, value in values.items():
        hint = hints.get(name)
        if is_dataclass(hint) and isinstance(value, dict):
            kept[name] = without_nulls(hint, value)  # type: ignore[arg-type]
        elif get_origin(hint) is dict and is_dataclass(get_args(hint)[1]):
            if value is None or isinstance(value, dict):
                kept[name] = {k: v for k, v in (value or {}).items() if v is not None}
    return kept


def template_fields(values: Any, overrides: Sequence[str]) -> Any:
    """The fields of `model.template`, read where a file or the tokenizer's own is named, with the
    line breaks, tabs and backslashes that the command line writes out.

    :raises UserError: a name that is no template's.
    """
    if values is None:
        return {}
    if not isinstance(values, dict):
        from casa_train.config.ready_templates import read_template

        return read_template(str(values), "model.template")
    if "trim" not in values:  # of a run of an earlier version: what it does not name was empty
        texts = {f.name: "" for f in fields(TemplateConfig) if str(f.type).startswith("str")}
        values = {**texts, "system_always": False, "trim": [], **values}
    written = {o.partition("=")[0].lstrip("+").removeprefix("model.template.") for o in overrides}
    return {
        name: re.sub(r"\\([nt\\])", lambda m: ESCAPES[m[1]], value)
        if isinstance(value, str) and written & {name, "model.template"}
        else value
        for name, value in values.items()
    }


def refuse_unquoted(container: Any) -> None:
    """Text that YAML read as a value has lost its writing: 012 is 10 there, and 1:30 is 90.

    :param container: plain values, nothing resolved.
    :raises UserError: naming the field.
    """
    for leaf in leaves(Config):
        if leaf.type is str:
            for found in values(container, leaf.path):
                if isinstance(found.value, bool | int | float):
                    raise UserError(
                        f"{found.name} is {found.value!r} as YAML reads it, a "
                        f"{type(found.value).__name__}; expected text. Put it in quotes where it "
                        "is written."
                    )


def resolve_places(config: Config) -> None:
    """Expands `~` in every path.

    :raises UserError: a URL, or a home directory that there is not.
    """
    parts = Path(config.name).parts
    if not config.name or parts[0][0] in "~/" or ".." in parts or "://" in config.name:
        raise refused("name", config.name, "a name; where the run is written says run_dir")
    for leaf in leaves(Config):
        if isinstance(leaf.kind, Place):
            for found in values(config, leaf.path):
                try:
                    found.set(leaf.kind.resolve(found.name, found.value))
                except ValueError as error:
                    raise UserError(f"{error}.") from error


def check(config: Config) -> None:
    """Refuses values that no run can have.

    :raises UserError: naming the field.
    """
    for leaf in leaves(Config):
        if isinstance(leaf.kind, Bound):
            for found in values(config, leaf.path):
                if expected := leaf.kind.refusal(found.value):
                    raise refused(found.name, found.value, expected)
    for section, bounds in SIZES.items():
        for found in values(config, (*section.split("."), "*")):
            if isinstance(found.value, int | float) and not isinstance(found.value, bool):
                bound = bounds.get(
                    found.name.rpartition(".")[2], Bound(-math.inf, words="a number")
                )
                if expected := bound.refusal(found.value):
                    raise refused(found.name, found.value, expected)
    data, parallel, optim = config.data, config.parallel, config.optim
    rules = [
        (
            bool(data.sources or data.stream.datasets),
            "data.sources",
            data.sources,
            "at least one source, or data.stream.datasets instead",
        ),
        (
            not (data.sources and data.stream.datasets),
            "data.stream.datasets",
            sorted(data.stream.datasets),
            "none beside data.sources: a run is either prepared or streamed",
        ),
        (
            data.min_pixels <= data.max_pixels,
            "data.min_pixels",
            data.min_pixels,
            f"at most data.max_pixels ({data.max_pixels})",
        ),
        (
            parallel.precision in ("bf16", "fp32"),
            "parallel.precision",
            parallel.precision,
            "bf16 or fp32",
        ),
        (
            parallel.activation_checkpointing in ("none", "decoder", "vision", "all"),
            "parallel.activation_checkpointing",
            parallel.activation_checkpointing,
            "none, decoder, vision or all",
        ),
        (
            config.checkpoint.resume in ("auto", "never"),
            "checkpoint.resume",
            config.checkpoint.resume,
            "auto or never",
        ),
        (len(optim.betas) == 2, "optim.betas", optim.betas, "two numbers"),
        (bool(optim.groups), "optim.groups", optim.groups, "at least one group"),
        (
            config.export.every % config.checkpoint.every == 0,
            "export.every",
            config.export.every,
            f"0 or a multiple of checkpoint.every = {config.checkpoint.every}",
        ),
        (
            not config.export.best or bool(config.evaluation.every and data.validation),
            "export.best",
            config.export.best,
            "false where nothing is validated (evaluation.every and data.validation)",
        ),
        (
            all(1 <= len(tag) <= 64 for tag in config.metrics.wandb_tags),
            "metrics.wandb_tags",
            config.metrics.wandb_tags,
            "tags of 1 to 64 characters, wandb's limit",
        ),
        (
            bool(re.fullmatch(r"[^/\\#?%:]{1,128}", config.metrics.wandb_project)),
            "metrics.wandb_project",
            config.metrics.wandb_project,
            "1 to 128 characters without any of / \\ # ? % :, as wandb wants it",
        ),
        (
            "mechanism" in config.fusion,
            "fusion",
            config.fusion,
            "a fusion group, such as fusion=casa",
        ),
    ]
    for holds, name, value, expected in rules:
        if not holds:
            raise refused(name, value, expected)
    for name, group in optim.groups.items():
        for pattern in group.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"optim.groups.{name}.patterns holds {pattern!r}; expected a regular "
                    f"expression ({error}). Mend it."
                ) from error
    for allowed in config.checkpoint.resume_allow:
        if allowed not in flatten(config):
            raise UserError(
                f"checkpoint.resume_allow names {allowed!r}; expected a field of this "
                "configuration, such as 'trainer.steps'."
            )


def refused(name: str, value: Any, expected: str) -> UserError:
    """What to say of a field's value that cannot be."""
    return UserError(
        f"{name} is {value!r}; expected {expected}. Set it on the command line or in the "
        "experiment."
    )


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
