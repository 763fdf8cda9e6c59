"""What the start says of fusion layers that begin far from what their backbone can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from casa_train.config.compose import compose_config
from casa_train.cost.sizes import size_model
from casa_train.modeling.fusion import FusionMechanism
from casa_train.setup.fusion_start import start_warning
from casa_train.setup.model import meta_model
from tests.helpers.commands import TINY, on_data, run, train_command

FROZEN = "model.backbone.trainable=false"


def warning(experiment: str, *overrides: str) -> str | None:
    """Of an experiment at full size, on the meta device."""
    config = compose_config([f"+experiment={experiment}", "dry_run=true", *overrides])
    return start_warning(config, meta_model(config, size_model(config, [])))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "said", "advice"),
    [
        ((), "fusion.init=from_self_attention", " fusion.init=zero_output begins"),
        (("fusion=cross_attention",), "fusion.init=from_self_attention", "=zero_output begins"),
        (("fusion.placement=after",), "fusion.init=from_self_attention", "=zero_output begins"),
        (
            ("fusion.share_parameters=true",),
            "fusion.share_parameters=true",
            " fusion.share_parameters=false with fusion.init=zero_output begins",
        ),
    ],
)
def test_copies_beside_a_frozen_text_backbone_are_named(
    overrides: tuple[str, ...], said: str, advice: str
) -> None:
    told = warning("helium_casa", FROZEN, *overrides)
    assert told is not None and told.startswith(f"warning: {said} ") and advice in told
    assert "frozen llama backbone" in told  # what Helium1-2B's configuration calls itself


def test_adapters_stand_beside_a_frozen_backbone_too() -> None:
    told = warning("demo", "model.backbone.trainable=lora")
    assert told is not None and "frozen llama backbone" in told
    assert warning("demo", "model.backbone.trainable=true") is None


class Repeating(FusionMechanism):
    """A mechanism of a user's own, with options of its own."""

    name = "repeating"
    options = {"copies": 1}

    def start_advice(self) -> tuple[str, str] | None:
        copies = self.fusion["copies"]
        return (f"fusion.copies={copies}", "fusion.copies=0") if copies else None


def test_a_mechanism_of_a_users_own_is_named_by_its_own_options() -> None:
    config = compose_config(["+experiment=helium_casa", "dry_run=true", FROZEN])
    model = meta_model(config, size_model(config, []))
    text = model.config.text_config
    model.mechanism = Repeating({"mechanism": "repeating", "copies": 2}, text)
    told = start_warning(config, model)
    assert told is not None and told.startswith("warning: fusion.copies=2 reads ")
    assert " fusion.copies=0 begins " in told
    model.mechanism = Repeating({"mechanism": "repeating", "copies": 0}, text)
    assert start_warning(config, model) is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "overrides"),
    [
        # The published recipes: trained, or frozen and multimodal.
        ("helium_casa", ()),
        ("helium_ca_shared", ()),
        ("qwen_casa", ()),
        ("qwen_ca", ()),
        ("qwen_ca_shared", ()),
        ("qwen_casa_shared", ()),
        ("helium_casa", (FROZEN, "fusion.init=zero_output")),
        ("helium_casa", (FROZEN, "fusion.init=random")),
        ("helium_casa", (FROZEN, "fusion.placement=replace", "fusion.every=2")),
        ("helium_casa", (FROZEN, "fusion=hyper_attention")),
        ("helium_casa", (FROZEN, "fusion=gated_cross_attention")),
        ("helium_casa", (FROZEN, "fusion=insertion")),
        ("helium_casa", (FROZEN, "model.init_from=an_export")),
    ],
)
def test_nothing_is_said_of_others(experiment: str, overrides: tuple[str, ...]) -> None:
    assert warning(experiment, *overrides) is None


@pytest.mark.slow
def test_the_start_warns_and_a_resume_does_not(data_dir: Path, tmp_path: Path) -> None:
    given = ["+experiment=demo", *TINY, *on_data(data_dir), FROZEN, f"run_dir={tmp_path / 'run'}"]
    done = run(train_command([*given, "trainer.steps=1"]))
    told = [line for line in done.stdout.splitlines() if line.startswith("warning: fusion.init=")]
    assert len(told) == 1 and "frozen llama backbone" in told[0]
    allow = "checkpoint.resume_allow=[trainer.steps]"
    again = run(train_command([*given, "trainer.steps=2", allow]))
    assert "resuming from" in again.stdout and "warning: fusion.init" not in again.stdout
