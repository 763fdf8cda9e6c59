"""Models of every mechanism whose work and memory are counted, and the shapes they work on."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from casa_train.modeling.block_work import Pairs
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.segments import Segments
from casa_train.modeling.windows import Chunk
from tests.helpers.tiny import Layout

FUSIONS: list[dict[str, Any]] = [
    {"mechanism": "casa"},
    {"mechanism": "casa", "text_in_window": False},
    {"mechanism": "casa", "share_parameters": True},
    {"mechanism": "casa", "placement": "before"},
    {"mechanism": "casa", "placement": "after", "share_parameters": True},
    {"mechanism": "casa", "placement": "replace", "every": 2},
    {"mechanism": "casa", "placement": "replace", "every": 2, "share_parameters": True},
    {"mechanism": "casa", "placement": "replace", "history": "all"},
    {"mechanism": "casa", "every": 2, "history": "all"},
    {"mechanism": "casa", "update_image_tokens": "ffn"},
    {"mechanism": "casa", "update_image_tokens": "ffn_and_attention", "share_parameters": True},
    {"mechanism": "cross_attention"},
    {"mechanism": "cross_attention", "update_image_tokens": "ffn_and_attention"},
    {"mechanism": "insertion"},
    {"mechanism": "qformer_insertion", "queries": 4, "ffn_width": 72},
    {"mechanism": "gated_cross_attention", "every": 2, "ffn_width": 40},
    {"mechanism": "hyper_attention", "layers": [1]},
]


def names(fusion: dict[str, Any]) -> str:
    return ",".join(str(value) for value in fusion.values())


def shapes(pack: list[Layout]) -> list[Chunk]:
    return [layout.chunk() for layout in pack]


def frozen_model(config: CasaConfig, trainable: bool, trained: int) -> CasaForConditionalGeneration:
    """A model frozen as `setup.model.set_trainable` does it."""
    model = CasaForConditionalGeneration(config)
    for part in (model.model, model.lm_head):
        part.requires_grad_(trainable)
    for layer in model.model.layers:
        if layer.fusion is not None:
            layer.fusion.requires_grad_(True)
    model.visual.set_trainable(trained)
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("nothing trains")
    return model


def dense_pairs(model: CasaForConditionalGeneration, pack: list[Chunk]) -> Pairs:
    """The pairs that torch's plain attention works through: masked and padded ones too."""

    def dense(segments: Segments | None) -> int:
        groups = [] if segments is None else segments.groups[0]
        return sum(math.prod(group.query.shape) * group.key.shape[1] for group in groups)

    plan = model.mechanism.plan(model.mechanism.compress(pack), None, None, torch.device("cpu"))
    return Pairs(dense(plan.self_attention), dense(plan.cross), dense(plan.image_cross))
