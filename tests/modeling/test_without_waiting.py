"""Nothing asks a tensor for its value between the images and the loss, nor in a decode step.

On the meta device tensors have no values, so an operation that asks for one raises there and its
line stands in the error; on a GPU the host would wait at that line for all work before it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from casa_train.modeling.modeling_casa import CasaForConditionalGeneration, PackedInputs
from casa_train.training.loss import answer_losses
from tests.helpers.tiny import HARD_PACK, VOCABULARY, fill, packed_inputs
from tests.helpers.variants import DAILY, build

daily_variant = pytest.mark.parametrize("variant", sorted(DAILY))


def pack_on(device: str) -> PackedInputs:
    """A pack of every special case with logits for every second token; pinned on its way."""
    inputs = packed_inputs(fill(HARD_PACK))

    def moved(x: torch.Tensor) -> torch.Tensor:
        return (x.pin_memory() if device == "cuda" else x).to(device, non_blocking=True)

    return dataclasses.replace(
        inputs,
        input_ids=moved(inputs.input_ids),
        images=[moved(image) for image in inputs.images],
        logits_index=moved(torch.arange(0, len(inputs.input_ids), 2)),
    )


def loss_of(model: CasaForConditionalGeneration, inputs: PackedInputs) -> torch.Tensor:
    """The sum of what a micro-step trains on, (); its targets are the ids themselves."""
    logits = model(packed=inputs).logits
    assert inputs.logits_index is not None
    targets = inputs.input_ids.index_select(0, inputs.logits_index)
    return answer_losses(logits, targets).sum()


@daily_variant
def test_a_micro_step_asks_for_no_value(variant: str) -> None:
    model = build(variant).to("meta").train()
    for blocks in ("none", "all"):
        model.checkpoint_activations(blocks)
        loss = loss_of(model, pack_on("meta"))
        assert loss.is_meta and loss.shape == ()
        model.zero_grad()
        loss.backward()
        assert any(p.grad is not None for p in model.visual.parameters())
        for name, parameter in model.model.named_parameters():
            assert parameter.grad is not None and parameter.grad.is_meta, name


@daily_variant
@torch.no_grad()
def test_a_decode_step_asks_for_no_value(variant: str) -> None:
    model = build(variant).to("meta")
    cache = DynamicCache()
    images = [torch.empty(3, 56, 84, dtype=torch.uint8, device="meta") for _ in range(3)]
    ids = torch.empty(2, 9, dtype=torch.long, device="meta")
    points = [[2, 7], [4]]
    first = model(
        input_ids=ids,
        pixel_values=images,
        image_embeds_insertion_points=points,
        past_key_values=cache,
    )
    assert first.logits.is_meta and first.logits.shape == (2, 9, VOCABULARY)
    for _ in range(3):
        token = torch.empty(2, 1, dtype=torch.long, device="meta")
        step = model(input_ids=token, past_key_values=cache)
        assert step.logits.is_meta and step.logits.shape == (2, 1, VOCABULARY)
        assert cache.casa.step.is_open


def test_the_meta_device_names_a_value_that_is_asked_for() -> None:
    """What the tests above would see."""
    model = build("casa").to("meta")

    def asks(_: torch.nn.Module, __: object, output: torch.Tensor) -> None:
        output.sum().item()

    model.adapter.register_forward_hook(asks)
    with pytest.raises(RuntimeError, match="item.*meta"):
        loss_of(model, pack_on("meta"))


@pytest.mark.gpu
@daily_variant
def test_the_host_does_not_wait_between_vision_tower_and_loss(variant: str) -> None:
    """torch itself raises at every call for which the host would wait for the GPU."""
    model = build(variant, dtype=torch.bfloat16).to("cuda").train()
    inputs = pack_on("cuda")
    loss_of(model, inputs).backward()  # what waits once, for libraries to load

    def begin(*_: object) -> None:
        torch.cuda.set_sync_debug_mode("error")

    model.visual.register_forward_pre_hook(begin)
    try:
        loss = loss_of(model, inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
