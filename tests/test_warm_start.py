"""Pretrained directories in the published formats, built here in miniature."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    HeliumConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
)

from casa_train.assemble import (
    build_model,
    build_model_config,
    build_processor,
    open_sources,
    start_weights,
)
from casa_train.compose import CONF_DIR, to_config
from casa_train.config import Config
from casa_train.errors import UserError
from casa_train.export import export
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.warm_start import Account
from tests.commands import TINY, on_data, run, train_command

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 256,
}
BACKBONES = {"llama": LlamaConfig, "helium": HeliumConfig, "qwen2": Qwen2Config}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 48,
    "fullatt_block_indexes": [1],
}


def save_backbone(path: Path, kind: str, tied: bool, shard: str = "10GB") -> PreTrainedModel:
    """A tiny language model, saved as the hub would hold it."""
    torch.manual_seed(1)
    extra = {"head_dim": 12} if kind == "helium" else {}
    config = BACKBONES[kind](**SIZES, **extra, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # biases and norms too
    model.save_pretrained(path, max_shard_size=shard)
    return model


def save_qwen_vl(path: Path) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny full Qwen2.5-VL checkpoint, language model included."""
    torch.manual_seed(2)
    text = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=VISION)
    ).eval()
    model.save_pretrained(path)
    return model


TEMPLATE = [
    'model.template.bos="<|bos|>"',
    'model.template.user_start="<|user|>"',
    'model.template.user_end="<|end|>"',
    'model.template.assistant_start="<|assistant|>"',
    'model.template.assistant_end="<|end|>"',
]


def common(data: Path) -> list[str]:
    """A run on a prepared dataset whose sizes all come from the checkpoints."""
    sizes = [override for override in TINY if ".config." not in override]
    tower = "model.vision.train_last_blocks=1"
    return ["+experiment=demo", "model=pretrained", *sizes, *on_data(data), *TEMPLATE, tower]


def configured(data: Path, *overrides: str) -> Config:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return to_config(compose("train", overrides=[*common(data), *overrides]))


def started(config: Config) -> tuple[CasaForConditionalGeneration, list[Account]]:
    processor, sources = build_processor(config), open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    return model.eval(), start_weights(model, sources)


@pytest.fixture(scope="module")
def qwen_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen_vl")
    save_qwen_vl(path)
    return path


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", sorted(BACKBONES))
def test_text_logits_equal_the_backbone_s_own(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    plain = save_backbone(tmp_path / "base", kind, tied, shard="100KB" if tied else "10GB")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists() == tied
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}"]
    model, (backbone, vision) = started(configured(data_dir, *overrides))
    ids = torch.randint(0, 640, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(ids).logits)
    assert len(backbone.loaded) == len(dict(plain.named_parameters()))
    assert not backbone.unused and all(".fusion." in name for name in backbone.new)
    # The fusion layers start as copies of what was loaded, not of the random start.
    layer = model.model.layers[1]
    assert torch.equal(layer.fusion.k_proj.weight, plain.model.layers[1].self_attn.k_proj.weight)
    assert "newly initialised" in backbone.line() and "unused" in vision.line()


@pytest.mark.parametrize("prefix", ["visual.", "model.visual."])
def test_the_tower_comes_out_of_a_full_checkpoint(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, prefix: str
) -> None:
    shutil.copytree(qwen_vl, tmp_path / "full")
    weights = load_file(tmp_path / "full" / "model.safetensors")
    renamed = {}
    for name, tensor in weights.items():
        at = name.find("visual.")
        renamed[prefix + name[at + 7 :] if at >= 0 else name] = tensor
    assert any(name.startswith(prefix + "blocks") for name in renamed)
    save_file(renamed, tmp_path / "full" / "model.safetensors", metadata={"format": "pt"})
    save_backbone(tmp_path / "base", "llama", tied=True)
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={tmp_path / 'full'}"]
    model, (_, vision) = started(configured(data_dir, *overrides))
    original = Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_vl)
    tower = dict(original.model.visual.named_parameters())
    ours = dict(model.visual.named_parameters())
    assert ours.keys() == tower.keys()
    assert all(torch.equal(ours[name], tower[name]) for name in tower)
    assert len(vision.loaded) == len(tower)
    assert vision.unused and not any("visual" in name for name in vision.unused)


def broken(weights: dict[str, Any], change: str) -> dict[str, Any]:
    if change == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif change == "unexpected":
        weights["model.layers.1.mlp.extra.weight"] = torch.zeros(2)
    else:
        weights["model.norm.weight"] = torch.zeros(3)
    return weights


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", "missing model.layers.1.mlp.up_proj.weight"),
        ("unexpected", "unexpected model.layers.1.mlp.extra.weight"),
        ("shape", r"model.norm.weight has shape \[3\], expected \[48\]"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, change: str, words: str
) -> None:
    save_backbone(tmp_path / "base", "llama", tied=False)
    weights = broken(load_file(tmp_path / "base" / "model.safetensors"), change)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}"]
    with pytest.raises(UserError, match=words):
        started(configured(data_dir, *overrides))


def test_unusable_directories_are_named(data_dir: Path, qwen_vl: Path, tmp_path: Path) -> None:
    def message(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            started(configured(data_dir, *overrides))
        return str(caught.value)

    assert "model.backbone names no model" in message()
    assert "neither a directory nor a hub id" in message("model.backbone.pretrained=/nowhere")
    (tmp_path / "empty").mkdir()
    assert "config.json is missing" in message(f"model.backbone.pretrained={tmp_path / 'empty'}")
    save_backbone(tmp_path / "base", "llama", tied=True)
    base = f"model.backbone.pretrained={tmp_path / 'base'}"
    assert "expected a Qwen2.5-VL checkpoint" in message(
        base, f"model.vision.pretrained={tmp_path / 'base'}"
    )
    tower = f"model.vision.pretrained={qwen_vl}"
    # An export brings everything, so what the earlier stage began with may be gone.
    assert "model.init_from is '/nowhere'" in message(base, tower, "model.init_from=/nowhere")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    assert "backbone 'gpt2' is not supported" in message(base, tower)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 100)
    assert "cannot be read" in message(base, tower)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in message(base, tower)


@pytest.mark.slow
def test_a_later_stage_starts_from_an_export(data_dir: Path, qwen_vl: Path, tmp_path: Path) -> None:
    save_backbone(tmp_path / "base", "llama", tied=True)
    pretrained = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    pretrained += [f"model.vision.pretrained={qwen_vl}"]
    first = [f"run_dir={tmp_path / 'first'}"]
    done = run(train_command([*common(data_dir), "trainer.steps=2", *first, *pretrained]))
    assert re.search(r"backbone: 29 tensors loaded from .*, \d+ newly initialised", done.stdout)
    assert re.search(r"vision tower: \d+ tensors loaded from .*, \d+ .* unused", done.stdout)
    # Neither base model is needed any more.
    shutil.rmtree(tmp_path / "base")
    export(tmp_path / "first", tmp_path / "stage1")
    card = (tmp_path / "stage1" / "README.md").read_text()
    assert str(qwen_vl) in card and "inherit their terms" in card
    second = [f"run_dir={tmp_path / 'second'}", f"model.init_from={tmp_path / 'stage1'}"]
    second += pretrained
    more = ["trainer.steps=2", "model.backbone.trainable=false"]
    done = run(train_command([*common(data_dir), *second, *more]))
    model, _ = started(configured(data_dir, *second))
    assert f"model: {len(list(model.parameters()))} tensors loaded" in done.stdout
    weights = load_file(tmp_path / "stage1" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
