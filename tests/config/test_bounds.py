"""Every number of the configuration has bounds; what lies outside is refused by name."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from transformers import PretrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa_train.config.bounds import Bound, Leaf, Sizes, leaves, values
from casa_train.config.checks import check
from casa_train.config.compose import compose_config
from casa_train.config.data_schema import SourceConfig, StreamDatasetConfig
from casa_train.config.model_schema import Matched
from casa_train.config.schema import BenchmarkConfig, Config, GroupConfig, flatten
from casa_train.errors import UserError
from casa_train.modeling.backbones import BACKBONES
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.mechanisms import MECHANISMS, build_mechanism

SIZES = {
    ".".join(leaf.path[:-1]): leaf.kind.numbers
    for leaf in leaves(Config)
    if isinstance(leaf.kind, Sizes)
}
NUMBERS = [leaf for leaf in leaves(Config) if leaf.type in (int, float)]
BASE = compose_config([])
# The entries that dicts of the configuration may hold, so that each of their fields has a value.
ENTRIES = {
    "data.sources": {"a": SourceConfig("p", weight=1.0, limit=1)},
    "data.validation": {"a": SourceConfig("p", weight=1.0, limit=1)},
    "data.stream.datasets": {"a": StreamDatasetConfig("p", repeats={"s": 1})},
    "data.ratings": {"relevance": 3},
    "optim.groups": {"a": GroupConfig(["x"])},
    "evaluation.benchmarks": {"mme": BenchmarkConfig()},
}


def filled() -> Config:
    """A configuration in which every number stands once."""
    config = copy.deepcopy(BASE)
    for name, entry in ENTRIES.items():
        for found in values(config, tuple(name.split("."))):
            found.set(copy.deepcopy(entry))
    config.planned_ranks, config.metrics.peak_tflops = 1, 1.0
    config.metrics.profile_steps, config.evaluation.every = [5], 1
    config.model.new_parameters, config.model.matched = 9, Matched(9, 8, 7)
    return config


def refusal(leaf: Leaf, value: float) -> str | None:
    """What is said of the value in this field; one of the numbers it holds is replaced."""
    config = filled()
    for found in list(values(config, leaf.path))[:1]:
        found.set(value)
        try:
            check(config)
        except UserError as error:
            message = str(error)
            # A rule about two fields may follow: this one is about the number.
            return message if message.startswith(f"{found.name} is {value!r}; expected ") else None
        return None
    raise AssertionError(f"{leaf.name} has no value in the filled configuration")


def test_no_number_is_overlooked() -> None:
    """Counted again by the values themselves: those of a plain configuration and of its entries."""

    def numbers(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if is_dataclass(value):
            for field in fields(value):
                yield from numbers(getattr(value, field.name), (*path, field.name))
        elif isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from numbers(inner, (*path, "*"))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path

    config = filled()
    config.fusion, config.model.backbone.config, config.model.vision.config = {}, {}, {}
    assert {leaf.path for leaf in NUMBERS} == set(numbers(config, ()))
    assert len(NUMBERS) > 50 and "trainer.watchdog_minutes" in flatten(config)


@pytest.mark.parametrize("leaf", NUMBERS, ids=lambda leaf: leaf.name)
def test_what_lies_outside_is_refused(leaf: Leaf) -> None:
    bound = leaf.kind
    assert isinstance(bound, Bound), f"{leaf.name} has no bounds: see casa_train/config/bounds.py"
    assert bound.words and math.isfinite(bound.least), leaf.name
    if leaf.type is int:
        assert math.isfinite(bound.most), f"{leaf.name} may be larger than any array"
        outside, inside = [bound.least - 1, bound.most + 1], [bound.least, bound.most]
    else:
        below = bound.least if bound.open_least else math.nextafter(bound.least, -math.inf)
        inside = [math.nextafter(below, math.inf)]
        outside = [below, -1.0, math.nan, math.inf, -math.inf]
        if math.isfinite(bound.most):
            above = bound.most if bound.open_most else math.nextafter(bound.most, math.inf)
            outside.append(above)
            inside.append(math.nextafter(above, -math.inf))
    for value in outside:
        message = refusal(leaf, value)
        assert message is not None, f"{leaf.name} may be {value}"
        assert bound.words in message, message
    for value in inside:
        assert refusal(leaf, value) is None, f"{leaf.name} may not be {value}"


@pytest.mark.parametrize(
    ("name", "value"),
    [("trainer.watchdog_minutes", -1.0), ("trainer.max_hours", -0.5)],
)
def test_negative_times_are_refused(name: str, value: float) -> None:
    """They would end the run at once with the code that asks for another start."""
    with pytest.raises(UserError, match=f"{name} is {value}; expected 0"):
        compose_config([f"{name}={value}"])
    off = compose_config([f"{name}=0"])
    assert flatten(off)[name] == 0


def test_no_skipped_step_is_refused() -> None:
    with pytest.raises(UserError, match="trainer.max_skipped_steps is 0; expected at least 1"):
        compose_config(["trainer.max_skipped_steps=0"])


# ------------------------------------------------------------------------- the free-form sections

INHERITED = set(PretrainedConfig().to_dict())


def numbers_of(config: Any) -> set[str]:
    """The numbers of a model's configuration, ids of tokens aside."""
    return {
        name
        for name, value in config.to_dict().items()
        if isinstance(value, int | float) and not isinstance(value, bool)
        if name not in INHERITED and not name.endswith("_token_id")
    }


def test_the_numbers_of_models_have_bounds() -> None:
    found = set()
    for model_type in BACKBONES:
        found |= numbers_of(CasaConfig(text_config={"model_type": model_type}).text_config)
    assert found and not found - set(SIZES["model.backbone.config"])
    vision = numbers_of(Qwen2_5_VLVisionConfig())
    assert vision and not vision - set(SIZES["model.vision.config"])


@pytest.mark.parametrize(
    ("section", "name", "bound"),
    [(s, name, bound) for s, bounds in SIZES.items() for name, bound in bounds.items()],
)
def test_sizes_outside_are_refused(section: str, name: str, bound: Bound) -> None:
    below = bound.least if bound.open_least else bound.least - 1
    above = bound.most if bound.open_most else bound.most + 1
    for value in {below, above, math.nan, math.inf}:
        config = copy.deepcopy(BASE)
        for found in values(config, tuple(section.split("."))):
            found.value[name] = value
        with pytest.raises(UserError, match=f"{section}.{name} is .*; expected {bound.words}"):
            check(config)


def test_other_numbers_of_models_are_finite() -> None:
    with pytest.raises(UserError, match="model.backbone.config.logit_scale is nan; expected a num"):
        compose_config(["+model.backbone.config.logit_scale=nan"])
    compose_config(["+model.backbone.config.logit_scale=-0.5"])


@pytest.mark.parametrize(
    ("mechanism", "option"),
    [
        (name, option)
        for name, mechanism in MECHANISMS.items()
        for option, default in mechanism.options.items()
        if (isinstance(default, int) and not isinstance(default, bool)) or option == "layers"
    ],
)
def test_numbers_of_mechanisms_have_bounds(mechanism: str, option: str) -> None:
    text = CasaConfig(text_config={"model_type": "llama", "num_hidden_layers": 3}).text_config
    for value in (-1, math.nan, math.inf, 1.5, 2**31):
        for written in (value, [value]):
            with pytest.raises(ValueError, match=rf"fusion\.{option} is .*; expected"):
                build_mechanism({"mechanism": mechanism, option: written}, text)
