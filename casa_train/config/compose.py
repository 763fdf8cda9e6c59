"""Composing conf/ onto the dataclasses of `schema.py`.

YAML is merged once onto `Config`, so a misspelt key or a wrong type fails by name before anything
loads.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import warnings
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from casa_train.config.bounds import local_path
from casa_train.config.checks import check, refuse_unquoted, resolve_places
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.explain import explain
from casa_train.config.matched import fusion_fields
from casa_train.config.model_schema import TemplateConfig
from casa_train.config.overrides import as_typed
from casa_train.config.schema import RENAMED, Config
from casa_train.config.sweep_jobs import store_settings
from casa_train.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}

# conf/train.yaml starts from these defaults, so that every field can be overridden by name. They
# are plain values, because Hydra cannot add an entry to a dict of dataclasses. `to_config` checks
# the types.
ConfigStore.instance().store(
    name="schema", node=OmegaConf.to_container(OmegaConf.structured(Config), resolve=False)
)
store_settings()


def job_directory(name: str, overrides: Sequence[str]) -> str:
    """One directory name for a job of a sweep: the run's name and its overrides.

    Experiment, sweep, the name itself and Hydra's settings are left out; what no file system likes
    is replaced. A long name keeps only the ends of keys and paths, and says by a hash what it has
    lost.
    """
    parts, short = [name], [name]
    for override in overrides:
        key, equals, value = override.lstrip("+~").partition("=")
        if key not in ("experiment", "sweep", "name") and not key.startswith(("hydra.", "hydra/")):
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
        container: Any = OmegaConf.to_container(raw, resolve=True)
        container = without_nulls(Config, with_new_names(container))
        model = container.setdefault("model", {})  # a file cut short may lack it
        if isinstance(model, dict):
            model["template"] = template_fields(model.get("template"), overrides)
            model["match"] = fusion_fields(model.get("match"), "model.match")
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


def with_new_names(container: Any) -> dict[str, Any]:
    """Plain values in which fields of earlier versions have the names of today."""
    named = dict(container)
    for old, new in RENAMED.items():
        if old in named:
            value = named.pop(old)
            named[new] = value if named.get(new) is None else named[new]
    return named


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
