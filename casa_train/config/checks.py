"""What no run can have: text that YAML read as a number, URLs as places, values out of bounds, and
fields that contradict each other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from casa_train.config.bounds import Place, leaves, values
from casa_train.config.model_schema import LORA, LoraSettings
from casa_train.config.schema import BENCHMARKS, RENAMED, Config, flatten
from casa_train.errors import UserError


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
        if leaf.kind is not None and not isinstance(leaf.kind, Place):
            for found in values(config, leaf.path):
                if expected := leaf.kind.refusal(found.name, found.value):
                    raise refused(found.name, found.value, expected)
    rules = _data, _optimiser, _mechanism, _matching, _lora, _fp8, _evaluation, _exports, _wandb
    for rule in (*rules, _resume_allow):
        rule(config)


def _data(config: Config) -> None:
    data = config.data
    if not data.sources and not data.stream.datasets:
        expected = "at least one source, or data.stream.datasets instead"
        raise refused("data.sources", data.sources, expected)
    if data.sources and data.stream.datasets:
        expected = "none beside data.sources: a run is either prepared or streamed"
        raise refused("data.stream.datasets", sorted(data.stream.datasets), expected)
    if data.min_pixels > data.max_pixels:
        expected = f"at most data.max_pixels ({data.max_pixels})"
        raise refused("data.min_pixels", data.min_pixels, expected)


def _optimiser(config: Config) -> None:
    optim = config.optim
    if len(optim.betas) != 2:
        raise refused("optim.betas", optim.betas, "two numbers")
    if not optim.groups:
        raise refused("optim.groups", optim.groups, "at least one group")
    for name, group in optim.groups.items():
        for pattern in group.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"optim.groups.{name}.patterns holds {pattern!r}; expected a regular "
                    f"expression ({error}). Mend it."
                ) from error


def _mechanism(config: Config) -> None:
    if "mechanism" not in config.fusion:
        raise refused("fusion", config.fusion, "a fusion group, such as fusion=casa")


def _matching(config: Config) -> None:
    model = config.model
    if model.match and model.new_parameters is not None:
        expected = "null beside model.match, which says how many: one of the two"
        raise refused("model.new_parameters", model.new_parameters, expected)
    if model.init_from is not None and (model.match or model.new_parameters is not None):
        name = "model.match" if model.match else "model.new_parameters"
        expected = (
            "none beside model.init_from, whose widths and options are those of the export: leave "
            "it out, and give fields of model.backbone.config and fusion as they stand in the "
            "export's config.json"
        )
        raise refused(name, model.match or model.new_parameters, expected)


def _lora(config: Config) -> None:
    backbone = config.model.backbone
    if backbone.trainable is None:
        raise refused("model.backbone.trainable", None, f"true, false or {LORA}")
    if backbone.trainable != LORA:
        for name, default in vars(LoraSettings()).items():
            if (value := getattr(backbone.lora, name)) != default:
                expected = f"nothing there, or model.backbone.trainable={LORA} beside it"
                raise refused(f"model.backbone.lora.{name}", value, expected)
        if config.export.lora != "merge":
            expected = f"merge where there are no adapters (model.backbone.trainable={LORA})"
            raise refused("export.lora", config.export.lora, expected)
    targets = backbone.lora.targets
    if targets == []:
        raise refused("model.backbone.lora.targets", targets, "at least one, or null for all")
    for target in targets or []:
        try:
            re.compile(target)
        except re.error as error:
            raise UserError(
                f"model.backbone.lora.targets holds {target!r}; expected a name or a regular "
                f"expression ({error}). Mend it."
            ) from error


def _fp8(config: Config) -> None:
    parallel = config.parallel
    if parallel.frozen_precision == "fp8":
        if parallel.precision != "bf16":
            expected = "bf16 beside parallel.frozen_precision=fp8, whose results are bf16"
            raise refused("parallel.precision", parallel.precision, expected)
        if parallel.zero_stage == 3:
            expected = "1 or 2 beside parallel.frozen_precision=fp8: ZeRO-3 shards frozen weights"
            raise refused("parallel.zero_stage", parallel.zero_stage, expected)


def _evaluation(config: Config) -> None:
    evaluation = config.evaluation
    for name in evaluation.benchmarks:
        if name not in BENCHMARKS:
            raise UserError(
                f"evaluation.benchmarks.{name} is no benchmark; expected some of "
                f"{', '.join(BENCHMARKS)}. Name one of them, or take it out."
            )
    watched = evaluation.attention_while_training
    if watched and evaluation.every and not config.data.validation:
        expected = "0 where validations measure no held-out sample (data.validation)"
        raise refused("evaluation.attention_while_training", watched, expected)
    if evaluation.benchmarks and not evaluation.every:
        expected = "none where nothing is validated (evaluation.every=0)"
        raise refused("evaluation.benchmarks", sorted(evaluation.benchmarks), expected)


def _exports(config: Config) -> None:
    export, every = config.export, config.checkpoint.every
    if export.every % every:
        raise refused(
            "export.every", export.every, f"0 or a multiple of checkpoint.every = {every}"
        )
    if export.best and not (config.evaluation.every and config.data.validation):
        expected = (
            "false where nothing is validated (evaluation.every and data.validation): the best "
            "step has the lowest loss on held-out samples, and benchmarks alone have none"
        )
        raise refused("export.best", export.best, expected)


def _wandb(config: Config) -> None:
    tags, project = config.metrics.wandb_tags, config.metrics.wandb_project
    if not all(1 <= len(tag) <= 64 for tag in tags):
        raise refused("metrics.wandb_tags", tags, "tags of 1 to 64 characters, wandb's limit")
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", project):
        expected = "1 to 128 characters without any of / \\ # ? % :, as wandb wants it"
        raise refused("metrics.wandb_project", project, expected)


def _resume_allow(config: Config) -> None:
    known = flatten(config)
    for allowed in config.checkpoint.resume_allow:
        if allowed not in known and allowed not in RENAMED:
            raise UserError(
                f"checkpoint.resume_allow names {allowed!r}; expected a field of this "
                "configuration, such as 'trainer.steps'."
            )


def refused(name: str, value: Any, expected: str) -> UserError:
    """What to say of a field's value that cannot be."""
    return UserError(
        f"{name} is {value!r}; expected {expected}. "
        "Set it on the command line or in the experiment."
    )
