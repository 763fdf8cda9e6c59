"""What the model card of an export says, where it depends on the model."""

from __future__ import annotations

import pytest

from casa_train.config.compose import compose_config
from casa_train.cost.sizes import size_model
from casa_train.export.model_card import model_card
from casa_train.setup.model import meta_model


@pytest.mark.parametrize(("kind", "release"), [("smollm3", "4.53"), ("qwen3", "4.51.3")])
def test_the_card_names_the_release_that_the_backbone_needs(kind: str, release: str) -> None:
    chosen = f"model.backbone.config.model_type={kind}"
    config = compose_config(["+experiment=demo", "dry_run=true", chosen])
    card = model_card(config, 7, meta_model(config, size_model(config, [])))
    assert f'pip install torch "transformers>={release}" einops' in card
