"""Starting with SigLIP2's tower: out of published formats and exports, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Siglip2Config, Siglip2Model, Siglip2VisionModel

from casa_train.config.compose import to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config
from casa_train.cost.full_pack import memory_of_rank
from casa_train.cost.sizes import size_model
from casa_train.data.build import build_fits, open_splits
from casa_train.data.materialize import encode_sample
from casa_train.data.processor import build_processor
from casa_train.errors import UserError
from casa_train.export.loading import load_model, load_processor, side_of_tokens
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.tower_kinds import TOWER_KINDS
from casa_train.modeling.towers import build_tower
from casa_train.modeling.vision_siglip import SiglipTower
from casa_train.setup.first_values import HOST
from casa_train.setup.fp8 import Fp8Linear, use_fp8
from casa_train.setup.model import build_model, build_model_config, meta_model
from casa_train.setup.parts import part_sizes
from casa_train.setup.pretrained import Account
from casa_train.setup.weights import find_weights, open_sources, start_weights
from tests.helpers.commands import TINY, on_data
from tests.helpers.tiny import random_image, tiny_model, tiny_siglip_config, tiny_vision_config
from tests.helpers.tiny_export import write_tiny_export

SIGLIP = ["model=tiny_llama_siglip2", "model.vision.train_last_blocks=1"]
NO_SIZES = "~model.vision.config"
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 40,
}


def configured(data: Path, *overrides: str) -> Config:
    sizes = [one for one in TINY if ".vision." not in one]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        chosen = ["+experiment=demo", *SIGLIP, *sizes, *on_data(data), *overrides]
        return to_config(compose("train", overrides=chosen))


def started(config: Config) -> tuple[CasaForConditionalGeneration, list[Account]]:
    processor, sources = build_processor(config), open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    start = find_weights(model, sources)
    start_weights(model, start, config.seed, HOST, torch.float32, lambda block: None)
    return model.eval(), start.accounts


def save_siglip(path: Path, alone: bool = False) -> dict[str, torch.Tensor]:
    """A tiny SigLIP2 as the hub holds it; returns its tower's tensors by their whole names."""
    torch.manual_seed(4)
    vision = tiny_siglip_config().to_dict()
    whole = Siglip2Model(Siglip2Config(text_config=TEXT, vision_config=vision))
    saved: nn.Module = whole
    if alone:
        saved = Siglip2VisionModel(tiny_siglip_config())
    saved.save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    prefix = "vision_model."
    return {
        n if n.startswith(prefix) else prefix + n: tensor
        for n, tensor in weights.items()
        if not alone or n.startswith(prefix) or "." in n
    }


def check_tower(model: CasaForConditionalGeneration, theirs: dict[str, torch.Tensor]) -> None:
    names = (("patch_embed.", "embeddings."), ("blocks.", "encoder.layers."), ("merger.", ""))
    for name, parameter in model.visual.named_parameters():
        for ours, published in names:
            if name.startswith(ours):
                stored = theirs["vision_model." + published + name.removeprefix(ours)]
                assert torch.equal(parameter, stored), name


@pytest.mark.parametrize("form", ["whole", "alone", "alone, flat", "alone, nested"])
def test_the_tower_comes_out_of_every_published_form(
    data_dir: Path, tmp_path: Path, form: str
) -> None:
    """Whole, or the vision model alone: as this release of transformers writes it, and as either
    generation does.
    """
    theirs = save_siglip(tmp_path / "siglip", alone=form != "whole")
    if "," in form:
        cut = len("vision_model.") if "flat" in form else 0
        renamed = {name[cut:]: tensor for name, tensor in theirs.items()}
        save_file(renamed, tmp_path / "siglip" / "model.safetensors", metadata={"format": "pt"})
    overrides = [NO_SIZES, f"model.vision.pretrained={tmp_path / 'siglip'}"]
    model, (account,) = started(configured(data_dir, *overrides))
    check_tower(model, theirs)
    assert len(account.loaded) == len(list(model.visual.parameters()))
    assert account.unused and "its pooling head is not used" in account.line()
    assert all(".head." in f".{n}" or not n.startswith("vision_model.") for n in account.unused)
    assert model.visual.token_side == 32 and model.adapter.in_features == 128


@pytest.mark.parametrize("tower", list(TOWER_KINDS))
def test_the_tower_comes_out_of_an_export_and_its_adapter_does_not(
    data_dir: Path, tmp_path: Path, tower: str
) -> None:
    vision: Any = tiny_siglip_config() if tower == "siglip2" else tiny_vision_config(width=48)
    earlier = tiny_model(vision_config=vision, seed=6)
    earlier.save_pretrained(tmp_path / "export")
    overrides = [NO_SIZES, f"model.vision.pretrained={tmp_path / 'export'}"]
    model, (account,) = started(configured(data_dir, *overrides, f"model.vision.type={tower}"))
    theirs = dict(earlier.visual.named_parameters())
    assert theirs.keys() == dict(model.visual.named_parameters()).keys()
    assert all(torch.equal(p, theirs[n]) for n, p in model.visual.named_parameters())
    assert "its adapter is not used" in account.line()
    # The backbone beside it starts at random, and trains.
    assert model.lm_head.weight.shape != earlier.lm_head.weight.shape


def test_what_does_not_fit_is_refused_by_name(data_dir: Path, tmp_path: Path) -> None:
    def message(*overrides: str) -> str:
        with pytest.raises(UserError) as caught:
            started(configured(data_dir, NO_SIZES, *overrides))
        return str(caught.value)

    save_siglip(tmp_path / "siglip")
    named = f"model.vision.pretrained={tmp_path / 'siglip'}"
    found = message(named, "model.vision.type=qwen2_5_vl")
    assert "holds a vision tower of type 'siglip2'" in found
    assert "Set model.vision.type=siglip2" in found
    file = tmp_path / "siglip" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "model_type": "siglip"}))
    assert "is of type 'siglip'" in message(named) and "take a NaFlex one" in message(named)
    tiny_model(vision_config=tiny_siglip_config(), adapter="mlp").save_pretrained(tmp_path / "mlp")
    later = f"model.init_from={tmp_path / 'mlp'}"
    tokenizer = "model.tokenizer=" + str(data_dir / "tokenizer")
    assert "Set model.vision.type=siglip2" in message(
        later, tokenizer, "model.vision.type=qwen2_5_vl"
    )
    small = f"data.max_pixels={32 * 32 - 1}"
    assert "needs 1024 pixels (32x32)" in message(small, "data.min_pixels=0")
    with pytest.raises(UserError, match=r"qwen2_5_vl or siglip2"):
        configured(data_dir, "model.vision.type=clip")
    with pytest.raises(UserError, match=r"linear or mlp"):
        configured(data_dir, "model.vision.adapter=qformer")
    with pytest.raises(UserError, match=r"unknown configuration key model.vision.config.depth"):
        started(configured(data_dir, "+model.vision.config.depth=2"))
    for values in ({"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}):
        with pytest.raises(ValueError, match=r"qwen2_5_vl_vision.*siglip2_vision_model"):
            CasaConfig(vision_config=values)


def test_an_export_with_another_adapter_is_refused(data_dir: Path, tmp_path: Path) -> None:
    config = configured(data_dir, "model.vision.adapter=mlp")
    model, _ = started(config)
    model.save_pretrained(tmp_path / "mlp")
    later = [f"model.init_from={tmp_path / 'mlp'}", f"model.tokenizer={data_dir / 'tokenizer'}"]
    with pytest.raises(UserError, match=r"type 'mlp'.*Set model.vision.adapter=mlp"):
        started(configured(data_dir, *later))
    again, (account,) = started(configured(data_dir, *later, "model.vision.adapter=mlp"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, dict(again.named_parameters())[name]), name
    assert len(account.loaded) == len(list(model.parameters()))


def test_prepared_data_serve_towers_of_either_grid(data_dir: Path) -> None:
    """An index holds the sizes of stored images, not their tokens: those follow the tower."""
    lengths = {}
    for tower, side in (("qwen2_5_vl", 28), ("siglip2", 32)):
        config = configured(data_dir, NO_SIZES, f"model.vision.type={tower}")
        processor = build_processor(config)
        splits = open_splits(config.data.sources, processor)
        (fit,) = build_fits(config, splits, processor).values()
        (split,) = splits.values()
        text, images, _ = fit.lengths()
        shown = [row for row in range(60) if images[row]]
        assert len(shown) > 20
        for row in shown:
            sample, max_pixels = fit.apply(row, split.read(row))
            encoded = encode_sample(
                sample, processor, processor.image_processor.at_most(max_pixels)
            )
            assert encoded.chunk().image_tokens == images[row]
            assert all(p.shape[1] % side == 0 == p.shape[2] % side for p in encoded.images)
        lengths[tower] = images.tolist()
    assert lengths["qwen2_5_vl"] != lengths["siglip2"]


@pytest.mark.parametrize("adapter", ["linear", "mlp"])
def test_sizes_and_memory_know_the_tower(data_dir: Path, adapter: str) -> None:
    config = configured(data_dir, f"model.vision.adapter={adapter}")
    model = meta_model(config, size_model(config, []))
    sizes = part_sizes(model)
    assert sizes["vision tower"] == sum(p.numel() for p in model.visual.parameters())
    linears = 512 * 32 + 32 + (32 * 32 + 32 if adapter == "mlp" else 0)
    assert sum(p.numel() for p in model.adapter.parameters()) == linears
    memory = memory_of_rank(config, model, 1)
    assert memory.activations["vision tower"] > 0


def test_an_exports_processor_keeps_the_grid(tmp_path: Path) -> None:
    """In what it resizes to and in the bounds it takes; one from before it was written has 28."""
    export = write_tiny_export(tmp_path / "siglip", tower="siglip2")
    picture = Image.new("RGB", (100, 60), "teal")
    processor = load_processor(export)
    assert processor.image_processor.load(picture).shape == (3, 64, 96)
    assert side_of_tokens(processor) == 32 != side_of_tokens(object())
    small = load_processor(export, image_size=64)
    assert small.image_processor.load(picture).shape == (3, 32, 64)
    batch = small.tokenize_messages(
        [{"role": "user", "content": [{"type": "image", "image": picture}]}]
    )
    assert load_model(export, torch.float32)(**batch).logits.isfinite().all()
    with pytest.raises(UserError, match=r"image_size is 30; one image token is 32x32"):
        load_processor(export, image_size=30)
    file = export / "processor_config.json"
    config = json.loads(file.read_text())
    assert config.pop("token_side") == 32
    file.write_text(json.dumps(config))
    assert load_processor(export).image_processor.load(picture).shape == (3, 56, 112)


def test_frozen_blocks_run_in_fp8_too() -> None:
    tower = build_tower(tiny_siglip_config(3)).bfloat16()
    assert isinstance(tower, SiglipTower)
    tower.set_trainable(1)
    generator = torch.Generator().manual_seed(8)
    images = [random_image(generator, 2, 3, side=32), random_image(generator, 1, 1, side=32)]
    with torch.no_grad():
        plain = tower(images).float()
        use_fp8(tower)
        lowered = tower(images).float()
    counts = [sum(isinstance(m, Fp8Linear) for m in block.modules()) for block in tower.blocks]
    assert counts == [6, 6, 0]
    assert 0 < (lowered - plain).norm() < 0.1 * plain.norm()


def test_mlp_stands_where_widths_agree_too() -> None:
    for adapter, kind in (("linear", nn.Identity), ("mlp", nn.Sequential)):
        model = tiny_model(vision_config=tiny_vision_config(), adapter=adapter)
        assert type(model.adapter) is kind
    first, act, last = model.adapter
    torch.nn.init.normal_(first.bias)
    x = torch.randn(5, first.in_features, dtype=torch.float64)
    hidden = x @ first.weight.double().T + first.bias.double()
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ last.weight.double().T + last.bias.double()
    torch.testing.assert_close(model.adapter(x.float()).double(), expected, rtol=0, atol=1e-5)
