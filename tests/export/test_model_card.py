"""What the model card of an export says, where it depends on the model."""

from __future__ import annotations

import pytest
import torch

from casa_train.config.compose import compose_config
from casa_train.cost.sizes import size_model
from casa_train.export.model_card import model_card
from casa_train.setup.lora import plain_layers
from casa_train.setup.model import meta_model


@pytest.mark.parametrize(("kind", "release"), [("smollm3", "4.53"), ("qwen3", "4.51.3")])
def test_the_card_names_the_release_that_the_backbone_needs(kind: str, release: str) -> None:
    chosen = f"model.backbone.config.model_type={kind}"
    config = compose_config(["+experiment=demo", "dry_run=true", chosen])
    card = model_card(config, 7, meta_model(config, size_model(config, [])))
    assert f'pip install torch "transformers>={release}" einops' in card


def test_adapters_that_lie_apart_are_found_in_a_directory_and_on_a_hub() -> None:
    """No name on a hub has a folder's behind it: `me/my-casa/adapter` is none."""
    overrides = ["+experiment=demo", "dry_run=true", "model.backbone.trainable=lora"]
    config = compose_config([*overrides, "model.backbone.lora.rank=5"])
    model = meta_model(config, size_model(config, []))
    card = model_card(config, 7, model, "keep")
    assert 'PeftModel.from_pretrained(model, path, subfolder="adapter")' in card
    assert "LoRA adapters of rank 5" in card
    model.config.kept_adapter = "adapter"
    with plain_layers(model), pytest.raises(ValueError, match=r'PATH, subfolder="adapter"\)'):
        model(input_ids=torch.zeros(1, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("chosen", "tower"), [("tiny_llama", "Qwen2.5-VL"), ("tiny_llama_siglip2", "SigLIP2")]
)
def test_the_card_names_the_tower_and_no_other(chosen: str, tower: str) -> None:
    config = compose_config(["+experiment=demo", "dry_run=true", f"model={chosen}"])
    card = model_card(config, 7, meta_model(config, size_model(config, [])))
    words = card.split("## Configuration")[0]
    assert f"The tower's architecture is {tower}'s" in words
    assert [name in words for name in ("Qwen2.5-VL", "SigLIP2")].count(True) == 1
