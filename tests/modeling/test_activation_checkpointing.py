"""Activation checkpointing: the same gradients, fewer bytes, and only what was asked for."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

from casa_train.cost.memory import saved_bytes
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.tiny import HARD_PACK, fill
from tests.helpers.tiny_export import write_tiny_export
from tests.helpers.variants import MECHANISMS, VARIANTS, build, case, gradients_of, packed_logits


def trained(model: CasaForConditionalGeneration, blocks: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of a training step's forward and backward pass."""
    model.train().zero_grad()
    model.checkpoint_activations(blocks)
    logits = packed_logits(model, fill(HARD_PACK))
    logits.float().pow(2).sum().backward()
    return logits.detach(), gradients_of(model)


@pytest.mark.parametrize(
    ("variant", "frozen"),
    [*(case(v, False) for v in VARIANTS), *((m, True) for m in MECHANISMS)],
)
def test_gradients_are_the_same_bit_for_bit(variant: str, frozen: bool) -> None:
    model = build(variant)
    if frozen:
        model.model.requires_grad_(False)
        model.lm_head.requires_grad_(False)
        for layer in model.model.layers:
            if layer.fusion is not None:
                layer.fusion.requires_grad_(True)
        model.visual.set_trainable(1)
    expected = trained(model, "none")
    assert any(bool(gradient.any()) for gradient in expected[1].values())
    logits, gradients = trained(model, "all")
    assert torch.equal(logits, expected[0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected[1][name]), name


def held(model: CasaForConditionalGeneration, blocks: str) -> tuple[int, int]:
    """Bytes that the decoder and that the vision tower keep for the backward pass."""
    model.checkpoint_activations(blocks)
    saved = saved_bytes(model, lambda: packed_logits(model, fill(HARD_PACK)))
    vision = sum(size for name, size in saved.items() if name.startswith("visual"))
    return sum(saved.values()) - vision, vision


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_what_is_kept_shrinks_where_it_was_asked(mechanism: str) -> None:
    model = build(mechanism, blocks=4).train()
    decoder, vision = held(model, "none")
    assert held(model, "decoder")[0] < 0.5 * decoder and held(model, "decoder")[1] == vision
    assert held(model, "vision")[0] == decoder and held(model, "vision")[1] < 0.6 * vision
    assert held(model, "all") == (held(model, "decoder")[0], held(model, "vision")[1])
    # In evaluation no block runs twice, and frozen blocks of the tower never are.
    assert held(model.eval(), "all") == held(model, "none")
    model.train().visual.set_trainable(0)
    assert held(model, "vision") == held(model, "none")


def test_the_switch_stays_out_of_configuration_and_copies_with_the_model() -> None:
    model = build("casa")
    before = model.config.to_json_string()
    model.checkpoint_activations("decoder")
    assert model.config.to_json_string() == before
    assert copy.deepcopy(model).checkpointed == "decoder"
    with pytest.raises(ValueError, match="'layers' is unknown; choose one of"):
        model.checkpoint_activations("layers")


def work(model: CasaForConditionalGeneration, inputs: dict[str, Tensor]) -> int:
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    total: int = counter.get_total_flops()
    return total


def test_transformers_own_switch_on_an_export(tmp_path: Path) -> None:
    """As its Trainer uses it; the deprecated name is the one that both generations have."""
    path = write_tiny_export(tmp_path / "tiny", "casa")
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
    assert not model.is_gradient_checkpointing  # the export carries nothing
    ids = torch.arange(12)[None] % 50
    images = [torch.zeros(3, 56, 56, dtype=torch.uint8)]
    points = [[2]]
    inputs = dict(
        input_ids=ids, labels=ids, pixel_values=images, image_embeds_insertion_points=points
    )
    plain = work(model.train(), inputs)
    expected = gradients_of(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    assert work(model, inputs) > 1.1 * plain
    assert all(torch.equal(g, expected[name]) for name, g in gradients_of(model).items())
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5
        for option in ({"offload": True}, {"every_n_layers": 2}):
            with pytest.raises(ValueError, match="leave both out"):
                model.activation_checkpointing_enable(**option)
    assert not model.is_gradient_checkpointing
