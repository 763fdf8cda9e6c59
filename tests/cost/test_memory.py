"""Counted activations: beside what autograd saves on the CPU, and a GPU's measured peak."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from casa_train.config.compose import compose_config
from casa_train.cost.full_pack import full_inputs, full_pack, memory_of_rank
from casa_train.cost.memory import saved_bytes
from casa_train.cost.sizes import size_model
from casa_train.io.precision import DTYPES
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.setup.lora import add_adapters
from casa_train.setup.model import joins_image_keys, meta_model, set_trainable
from casa_train.training.loss import answer_losses
from tests.helpers.counted_models import FUSIONS, frozen_model, names, shapes
from tests.helpers.tiny import Layout, tiny_text_config, tiny_vision_config

# Where the CPU's attention stands and what reads it: SDPA saves masks, and a copy of what it gives
# or takes where its batches are padded or out of order. The GPU's varlen kernels do not.
ATTENTION = re.compile(r"layers\.\d+$|\.fusion$|self_attn|fusion\.o_proj|\.attn|cross_attn")
# The CPU keeps the statistics of a bf16 LayerNorm in bf16, other devices in fp32.
STATISTICS = re.compile(r"^resampler\..*norm$")


def saved(model: CasaForConditionalGeneration, pack: list[Any]) -> dict[str, int]:
    device = model.model.norm.weight.device
    return saved_bytes(model, lambda: model(packed=full_inputs(pack, device, 28)))


def outside_attention(found: dict[str, int]) -> dict[str, int]:
    skipped = (ATTENTION, STATISTICS)
    return {n: size for n, size in found.items() if not any(p.search(n) for p in skipped)}


@pytest.mark.parametrize(
    ("trainable", "trained", "dtype"),
    [
        pytest.param(True, -1, torch.float32, id="trained", marks=pytest.mark.slow),
        pytest.param(False, 1, torch.bfloat16, id="frozen-bf16"),
        pytest.param(True, 0, torch.bfloat16, id="frozen-vision-bf16", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("fusion", FUSIONS, ids=names)
def test_activations_are_what_autograd_saves(
    fusion: dict[str, Any], trainable: bool, trained: int, dtype: torch.dtype
) -> None:
    # One image, so nothing is padded; as many key as query heads.
    config = CasaConfig(
        text_config=tiny_text_config(layers=3, num_key_value_heads=4),
        vision_config=tiny_vision_config(),
        fusion=fusion,
    )
    pack = shapes([Layout(24, (0,), ((8, 12),))])
    real = frozen_model(config, trainable, trained).to(dtype).train()
    with torch.device("meta"):
        meta = frozen_model(config, trainable, trained).to(dtype).train()
    # What the CPU saves beyond this, see ATTENTION, goes where blocks are computed again.
    for blocks, least in (("none", 0.9), ("all", 0.98)):
        real.checkpoint_activations(blocks)
        meta.checkpoint_activations(blocks)
        measured, counted = saved(real, pack), saved(meta, pack)
        assert least <= sum(counted.values()) / sum(measured.values()) <= 1
        assert outside_attention(counted) == outside_attention(measured)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.backbone.trainable=false"],
        ["parallel.precision=bf16"],
        ["parallel.precision=bf16", "model.vision.train_last_blocks=1"],
        ["fusion=insertion"],
        ["fusion=cross_attention", "fusion.update_image_tokens=ffn_and_attention"],
        ["fusion=qformer_insertion", "fusion.queries=4", "parallel.precision=bf16"],
        ["fusion=gated_cross_attention", "model.backbone.trainable=false"],
        ["fusion=hyper_attention"],
        ["model.backbone.trainable=lora", "model.backbone.lora.dropout=0.1"],
    ],
    ids=lambda overrides: ",".join(o.rpartition(".")[2] for o in overrides) or "demo",
)
def test_the_demos_estimate_is_what_autograd_saves(overrides: list[str]) -> None:
    config = compose_config(["+experiment=demo", *overrides])
    model_config = size_model(config, [])
    memory = memory_of_rank(config, meta_model(config, model_config), world=1)
    model = CasaForConditionalGeneration(model_config)
    if config.model.backbone.trainable == "lora":
        add_adapters(model, config.model.backbone)
    model.train()
    set_trainable(model, config)
    model.to(DTYPES[config.parallel.precision])
    model.joint_image_keys = joins_image_keys(config.parallel)
    measured = sum(saved(model, full_pack(config)).values())
    estimate = sum(memory.activations.values()) - memory.activations["logits"]
    # 37 small images: the CPU pads, and 4 to 7 % of what it saves is masks and copies.
    assert 0.93 <= estimate / measured <= 1


def test_joint_image_keys_save_memory_and_are_left_out_where_they_would_take_it() -> None:
    def fusion(*overrides: str) -> int:
        config = compose_config(["+experiment=demo", "dry_run=true", *overrides])
        memory = memory_of_rank(config, meta_model(config, size_model(config, [])), 1)
        return memory.activations.get("fusion", 0)

    off = fusion("parallel.joint_image_keys=off")
    assert fusion() < 0.9 * off  # of few layers; of 28 it is 0.3
    assert fusion("parallel.zero_stage=3") == off
    kept = fusion("parallel.activation_checkpointing=decoder")
    left_out = ["parallel.activation_checkpointing=decoder", "parallel.joint_image_keys=off"]
    assert kept == fusion(*left_out) < off


@pytest.mark.slow
def test_a_checkpointed_block_is_counted_beside_what_all_blocks_keep() -> None:
    def parts(blocks: str) -> dict[str, int]:
        setting = f"parallel.activation_checkpointing={blocks}"
        config = compose_config(["+experiment=helium_casa", "dry_run=true", setting])
        return memory_of_rank(config, meta_model(config, size_model(config, [])), 1).activations

    none, everything = parts("none"), parts("all")
    # In bf16: the text of every block, the image tokens once, and patches of four vision blocks.
    text, images, patches = 28 * 2048 * 2048 * 2, 20_468 * 2048 * 2, 4 * 20_468 * 1280 * 2
    assert text + images < everything["text backbone"] < 1.2 * (text + images)
    assert "fusion" not in everything
    assert 4 * patches < everything["vision tower"] < none["vision tower"] / 5
    block = everything["logits, or a checkpointed block"]
    assert block == pytest.approx(none["vision tower"] / 4, rel=0.2) and block > none["logits"]


@pytest.mark.gpu
@pytest.mark.parametrize("blocks", ["none", "all"])
@pytest.mark.parametrize("fusion", ["casa", "insertion", "gated_cross_attention"])
def test_the_estimate_is_near_a_gpus_peak(fusion: str, blocks: str) -> None:
    config = compose_config(
        [
            "+experiment=helium_casa",
            "dry_run=true",
            f"fusion={fusion}",
            f"parallel.activation_checkpointing={blocks}",
            "+model.backbone.config.num_hidden_layers=6",
            "data.image_tokens=8192",
        ]
    )
    model_config = size_model(config, [])
    memory = memory_of_rank(config, meta_model(config, model_config), world=1)
    with torch.device("cuda"):
        model = CasaForConditionalGeneration(model_config).to(torch.bfloat16).train()
    set_trainable(model, config)
    model.checkpoint_activations(blocks)
    model.joint_image_keys = joins_image_keys(config.parallel)
    inputs = full_inputs(full_pack(config), "cuda", 28)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer_losses(model(packed=inputs).logits, inputs.input_ids).sum().backward()
    torch.cuda.synchronize()
    measured = torch.cuda.max_memory_allocated() - before
    # Gradients appear while activations go: neither of them alone is the peak.
    gradients = sum(2 * p.numel() for p in model.parameters() if p.requires_grad)
    estimate = sum(memory.activations.values())
    assert 0.85 * estimate <= measured <= 1.15 * estimate + gradients
