"""Two models that must agree: insertion, and casa turned towards it switch by switch."""

from __future__ import annotations

import functools
from typing import Any

from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.tiny import tiny_model, tiny_text_config

# Casa with D1 to D5 turned towards insertion.
TOWARDS_INSERTION: dict[str, Any] = {
    "share_parameters": True,
    "text_in_window": True,
    "placement": "replace",
    "every": 1,
    "update_image_tokens": "ffn_and_attention",
    "history": "all",
    "image_positions": "advance",
}


@functools.cache
def insertion_twins(backbone: str) -> tuple[CasaForConditionalGeneration, ...]:
    """Insertion, and casa turned towards it, with the same weights."""
    config = tiny_text_config(backbone, layers=3)
    inserted = tiny_model("insertion", text_config=config)
    turned = tiny_model("casa", text_config=config, seed=1, **TOWARDS_INSERTION)
    turned.load_state_dict(inserted.state_dict(), strict=True)
    return inserted, turned
