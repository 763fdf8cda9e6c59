"""Composing conf/ onto the dataclasses of `config.py`: types, cross-field checks, messages.

YAML is merged once onto `Config`, so a misspelt key or a wrong type fails by name before anything
loads.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
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
from yaml import YAMLError

from casa_train.config import Config, TemplateConfig, flatten
from casa_train.errors import UserError

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
CONF_DIR = Path(__file__).resolve().parent / "conf"
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
        type=Path,
        metavar="DIR",
        help="a folder of your own laid out like conf/, such as DIR/experiment/mine.yaml",
    )


def search_path(*folders: Path | None) -> list[str]:
    """The override that makes Hydra look into more folders, after the one it composes from.

    :raises UserError: no such folder.
    """
    given = [folder for folder in folders if folder is not None]
    for folder in given:
        if not folder.is_dir():
            raise UserError(
                f"--config-dir {folder} is not a directory; expected a folder laid out like conf/, "
                "such as DIR/experiment/mine.yaml."
            )
    paths = (str(f.absolute()).replace("\\", "\\\\").replace("'", "\\'") for f in given)
    quoted = ",".join(f"'file://{path}'" for path in paths)
    return [f"hydra.searchpath=[{quoted}]"] if given else []


def experiment_names(config_dir: Path | None) -> list[str]:
    """What `+experiment=` takes, the user's own among them."""
    folders = [CONF_DIR, *([] if config_dir is None else [config_dir])]
    return sorted({f.stem for folder in folders for f in (folder / "experiment").glob("*.yaml")})


def compose_config(overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """What `python -m casa_train OVERRIDES` would train.

    :param config_dir: a folder of the user's own with more groups and experiments.
    :raises UserError: naming the field or the override.
    """
    where = search_path(config_dir)
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            raw = compose("train", overrides=[*where, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    return to_config(raw, overrides)


def compose_stored(path: Path, overrides: Sequence[str], config_dir: Path | None = None) -> Config:
    """The configuration that a run stored, with overrides on top; groups and experiments, too.

    :param path: of its config.yaml.
    :param config_dir: a folder of the user's own with more groups and experiments.
    :raises UserError: naming the field or the override.
    """
    where = search_path(CONF_DIR, config_dir)
    try:
        with initialize_config_dir(str(path.parent.absolute()), version_base="1.3"):
            raw = compose(path.stem, overrides=[*where, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{path} cannot be read ({error}). Restore it from a backup.") from error
    return to_config(raw, overrides)


def to_config(raw: DictConfig, overrides: Sequence[str] = ()) -> Config:
    """Merges a composed configuration onto the dataclasses and checks it.

    :param overrides: of the command line, where a template's line breaks are written out.
    :raises UserError: naming the field, what was found and what was expected.
    """
    schema = OmegaConf.structured(Config)
    try:
        # Through plain values: Hydra's "+key=value" would slip past the schema otherwise.
        container: Any = without_nulls(Config, OmegaConf.to_container(raw, resolve=True))
        model = container["model"]
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
        from casa_train.data.templates import read_template  # loads torch

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


def check(config: Config) -> None:
    """Refuses values that no run can have.

    :raises UserError: naming the field.
    """
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
        (data.stream.lanes >= 1, "data.stream.lanes", data.stream.lanes, "at least 1"),
        (
            data.stream.open_units >= 1,
            "data.stream.open_units",
            data.stream.open_units,
            "at least 1",
        ),
        (
            data.stream.memory_mib >= 1,
            "data.stream.memory_mib",
            data.stream.memory_mib,
            "at least 1",
        ),
        (data.stream.attempts >= 1, "data.stream.attempts", data.stream.attempts, "at least 1"),
        (
            data.stream.retry_seconds >= 0,
            "data.stream.retry_seconds",
            data.stream.retry_seconds,
            "0 or more",
        ),
        (data.text_tokens >= 2, "data.text_tokens", data.text_tokens, "at least 2"),
        (data.image_tokens >= 2, "data.image_tokens", data.image_tokens, "at least 2"),
        (data.max_pixels >= 784, "data.max_pixels", data.max_pixels, "at least 784 (28x28)"),
        (
            0 <= data.min_pixels <= data.max_pixels,
            "data.min_pixels",
            data.min_pixels,
            f"0 to data.max_pixels ({data.max_pixels})",
        ),
        (data.packs_per_step >= 1, "data.packs_per_step", data.packs_per_step, "at least 1"),
        (data.open_packs >= 1, "data.open_packs", data.open_packs, "at least 1"),
        (data.balance_block >= 1, "data.balance_block", data.balance_block, "at least 1"),
        (data.balance_group >= 1, "data.balance_group", data.balance_group, "at least 1"),
        (0 <= data.video_share <= 1, "data.video_share", data.video_share, "a share 0..1"),
        (data.locality >= 0, "data.locality", data.locality, "0 or more"),
        (data.workers >= 0, "data.workers", data.workers, "0 or more"),
        (0 <= data.max_bad_share <= 1, "data.max_bad_share", data.max_bad_share, "a share 0..1"),
        (parallel.zero_stage in (1, 2, 3), "parallel.zero_stage", parallel.zero_stage, "1, 2 or 3"),
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
        (parallel.threads >= 0, "parallel.threads", parallel.threads, "0 or more"),
        (
            config.world_size is None or config.world_size >= 1,
            "world_size",
            config.world_size,
            "at least 1",
        ),
        (config.trainer.steps >= 1, "trainer.steps", config.trainer.steps, "at least 1"),
        (
            config.trainer.log_every >= 1,
            "trainer.log_every",
            config.trainer.log_every,
            "at least 1",
        ),
        (config.trainer.gc_every >= 0, "trainer.gc_every", config.trainer.gc_every, "0 or more"),
        (config.checkpoint.every >= 1, "checkpoint.every", config.checkpoint.every, "at least 1"),
        (
            config.checkpoint.keep_last >= 1,
            "checkpoint.keep_last",
            config.checkpoint.keep_last,
            "at least 1",
        ),
        (
            config.checkpoint.resume in ("auto", "never"),
            "checkpoint.resume",
            config.checkpoint.resume,
            "auto or never",
        ),
        (len(optim.betas) == 2, "optim.betas", optim.betas, "two numbers"),
        (bool(optim.groups), "optim.groups", optim.groups, "at least one group"),
        (all(0 <= b < 1 for b in optim.betas), "optim.betas", optim.betas, "numbers from 0 to 1"),
        (optim.eps > 0, "optim.eps", optim.eps, "a positive number"),
        (optim.clip >= 0, "optim.clip", optim.clip, "0 (off) or more"),
        (optim.warmup_steps >= 0, "optim.warmup_steps", optim.warmup_steps, "0 or more"),
        (optim.decay_steps >= 0, "optim.decay_steps", optim.decay_steps, "0 or more"),
        (
            config.checkpoint.keep_every >= 0,
            "checkpoint.keep_every",
            config.checkpoint.keep_every,
            "0 or more",
        ),
        (config.evaluation.every >= 0, "evaluation.every", config.evaluation.every, "0 or more"),
        (
            config.evaluation.loss_samples >= 1,
            "evaluation.loss_samples",
            config.evaluation.loss_samples,
            "at least 1",
        ),
        (
            config.evaluation.questions >= 0,
            "evaluation.questions",
            config.evaluation.questions,
            "0 or more",
        ),
        (
            config.export.every >= 0 and config.export.every % config.checkpoint.every == 0,
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
            config.evaluation.batch_size >= 1,
            "evaluation.batch_size",
            config.evaluation.batch_size,
            "at least 1",
        ),
        (
            config.evaluation.max_samples >= 1,
            "evaluation.max_samples",
            config.evaluation.max_samples,
            "at least 1",
        ),
        (
            config.evaluation.max_new_tokens >= 1,
            "evaluation.max_new_tokens",
            config.evaluation.max_new_tokens,
            "at least 1",
        ),
        (
            config.evaluation.attention_samples >= 0,
            "evaluation.attention_samples",
            config.evaluation.attention_samples,
            "0 (off) or more",
        ),
        (
            config.metrics.peak_tflops is None or config.metrics.peak_tflops > 0,
            "metrics.peak_tflops",
            config.metrics.peak_tflops,
            "a positive number of TFLOP/s, or null",
        ),
        (
            "mechanism" in config.fusion,
            "fusion",
            config.fusion,
            "a fusion group, such as fusion=casa",
        ),
    ]
    for holds, name, found, expected in rules:
        if not holds:
            raise UserError(
                f"{name} is {found!r}; expected {expected}. Set it on the command line or in the "
                "experiment."
            )
    for name, group in optim.groups.items():
        if group.lr < 0 or group.weight_decay < 0:
            raise UserError(
                f"optim.groups.{name} has rate {group.lr} and decay {group.weight_decay}; expected "
                "0 or more. Set them on the command line or in the experiment."
            )
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
    for name, source in [*data.sources.items(), *data.validation.items()]:
        if source.repeats < 1 or (source.weight is not None and source.weight <= 0):
            raise UserError(
                f"data source {name!r} has weight {source.weight} and repeats {source.repeats}; "
                "expected a positive weight and at least one repeat."
            )
    for name, dataset in data.stream.datasets.items():
        for subset, repeats in dataset.repeats.items():
            if repeats < 1:
                raise UserError(
                    f"data.stream.datasets.{name}.repeats.{subset} is {repeats}; expected at least "
                    "one. To leave a subset out name it in exclude."
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
