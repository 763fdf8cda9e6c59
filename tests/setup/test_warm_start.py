"""Pretrained directories in the published formats, built here in miniature."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    HeliumConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from casa_train.config.compose import to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config
from casa_train.data.processor import build_processor
from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.errors import UserError
from casa_train.export.from_run import export
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.rope import rope_settings
from casa_train.setup import pretrained
from casa_train.setup.first_values import HOST, FirstValues, blocks, with_new_rows
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.pretrained import INDEX, SINGLE, Account, Pretrained, Stored
from casa_train.setup.weights import find_weights, open_sources, start_weights
from data_recipes.__main__ import main as recipes
from tests.helpers.commands import TINY, on_data, run, train_command

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 640,
    "max_position_embeddings": 256,
}
BACKBONES = {
    "llama": LlamaConfig,
    "helium": HeliumConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "smollm3": SmolLM3Config,
}
# Qwen3's heads are wider than its width would have them; Mistral has no windows from v0.2 on.
OWN: dict[str, dict[str, Any]] = {
    "helium": {"head_dim": 12},
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layer_interval": 2, "pad_token_id": 5, "bos_token_id": 4},
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 48,
    "fullatt_block_indexes": [1],
}


def save_backbone(
    path: Path, kind: str, tied: bool, shard: str = "10GB", **options: Any
) -> PreTrainedModel:
    """A tiny language model, saved as the hub would hold it."""
    torch.manual_seed(1)
    values = {**SIZES, **OWN.get(kind, {}), **options}
    config = BACKBONES[kind](**values, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # biases and norms too
    model.save_pretrained(path, max_shard_size=shard)
    return model


def save_qwen_vl(
    path: Path, tied: bool = False, out_hidden_size: int = 48
) -> Qwen2_5_VLForConditionalGeneration:
    """A tiny full Qwen2.5-VL checkpoint, language model included."""
    torch.manual_seed(2)
    text = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 2]}}
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "hidden_size": out_hidden_size},
            vision_config={**VISION, "out_hidden_size": out_hidden_size},
            tie_word_embeddings=tied,
        )
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
    start = find_weights(model, sources, config.model.backbone.resize_embeddings)
    start_weights(model, start, config.seed, HOST, torch.float32, lambda block: None)
    return model.eval(), start.accounts


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
    assert not backbone.unused and all(".fusion." in name for name in backbone.copied)
    # The fusion layers start as copies of what was loaded, not of the random start.
    layer = model.model.layers[1]
    assert torch.equal(layer.fusion.k_proj.weight, plain.model.layers[1].self_attn.k_proj.weight)
    assert backbone.copied and not backbone.new
    assert "copied from the blocks" in backbone.line() and "unused" in vision.line()


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 32, "rope_type": "llama3"}
# What config.json holds on the hub beside what a tiny model needs, and what it lacks there.
HUB: dict[str, dict[str, Any]] = {
    "llama": {"rope_scaling": LLAMA3_ROPE, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"rope_scaling": None, "head_dim": None},
    "qwen3": {"rope_scaling": None, "max_window_layers": 28, "sliding_window": None},
    "smollm3": {"rope_scaling": None, "max_window_layers": 28, "sliding_window": None},
}


@pytest.mark.parametrize("kind", HUB)
def test_a_configuration_in_the_hub_s_words_is_read(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, kind: str
) -> None:
    """RoPE beside the sizes, as releases before 5 wrote it, a dtype under its old name, fields that
    no model reads; only SmolLM3 is there with the kinds of its layers.
    """
    rope = {"rope_theta": 70000.0, "rope_scaling": HUB[kind]["rope_scaling"]}
    plain = save_backbone(tmp_path / "base", kind, tied=kind == "qwen3", **rope)
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("rope_parameters")["rope_theta"] == rope["rope_theta"]
    config |= {"rope_theta": rope["rope_theta"], **HUB[kind]}
    config |= {"torch_dtype": config.pop("dtype"), "transformers_version": "4.51.0"}
    if kind != "smollm3":
        config.pop("layer_types", None)
    path.write_text(json.dumps(config))
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}"]
    model, _ = started(configured(data_dir, *overrides))
    ids = torch.randint(0, 640, (2, 70))  # past the original length of the stretched RoPE
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(ids).logits)


def test_weights_that_a_repository_holds_twice_are_fetched_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mistral publishes its models: in transformers' format, and in one file of its own."""
    save_backbone(tmp_path / "base", "mistral", tied=True)
    there = ["config.json", "consolidated.safetensors", "model-00001-of-00003.safetensors"]
    fetched: list[str] = []

    def fetch(name: str, **patterns: list[str]) -> str:
        fetched.extend(filter_repo_objects(there, **patterns))
        return str(tmp_path / "base")

    monkeypatch.setattr(pretrained, "snapshot_download", fetch)
    Pretrained("owner/name", "model.backbone.pretrained")
    assert fetched == ["config.json", "model-00001-of-00003.safetensors"]


@pytest.mark.parametrize("new_words", [True, False])
@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (["+{}.rope_theta=123.0"], (123.0, "linear", 4.0)),
        (["+{}.rope_scaling={{rope_type: linear, factor: 2.0}}"], (70000.0, "linear", 2.0)),
        (["+{}.rope_scaling=null"], (70000.0, "default", None)),
        (
            ["+{}.rope_parameters={{rope_theta: 5.0, rope_type: default}}"],
            (5.0, "default", None),
        ),
    ],
)
def test_fields_go_before_the_checkpoint_s_by_whichever_name(
    data_dir: Path,
    tmp_path: Path,
    new_words: bool,
    fields: list[str],
    wanted: tuple[float, str, float | None],
) -> None:
    """RoPE has names of two transformers generations, of which the library follows one alone."""
    there = {"rope_type": "linear", "factor": 4.0}
    save_backbone(tmp_path / "base", "llama", True, rope_theta=70000.0, rope_scaling=dict(there))
    path = tmp_path / "base" / "config.json"
    values = json.loads(path.read_text())
    if not new_words:
        del values["rope_parameters"]
        path.write_text(json.dumps({**values, "rope_theta": 70000.0, "rope_scaling": there}))
    named = [f"model.backbone.pretrained={tmp_path / 'base'}", "model.vision.pretrained=null"]
    fields = [field.format("model.backbone.config") for field in fields]
    config = configured(data_dir, *named, *fields)
    text = build_model_config(config, build_processor(config), open_sources(config)).text_config
    rope = rope_settings(text)
    assert (rope["rope_theta"], rope["rope_type"], rope.get("factor")) == wanted


def test_another_interval_goes_before_the_checkpoint_s_layers_without_rope(
    data_dir: Path, tmp_path: Path
) -> None:
    save_backbone(tmp_path / "base", "smollm3", tied=True)
    named = [f"model.backbone.pretrained={tmp_path / 'base'}", "model.vision.pretrained=null"]
    interval = "+model.backbone.config.no_rope_layer_interval=3"
    config = configured(data_dir, *named, interval)
    text = build_model_config(config, build_processor(config), open_sources(config)).text_config
    assert list(text.no_rope_layers) == [1, 1, 0]


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


def newer_name(name: str) -> str:
    """A tensor of a Qwen2.5-VL checkpoint as releases name it that do not rename when they save."""
    if name.startswith("model."):
        return name.replace("model.", "model.language_model.", 1)
    return f"model.{name}" if name.startswith("visual.") else name


@pytest.mark.parametrize("style", ["hub", "nested", "language_model"])
@pytest.mark.parametrize("tied", [True, False])
def test_text_comes_out_of_a_qwen_vl_checkpoint(
    data_dir: Path, tmp_path: Path, style: str, tied: bool
) -> None:
    """As the hub holds it, with text fields beside vision_config, and as newer releases save it."""
    plain = save_qwen_vl(tmp_path / "whole", tied)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    weights = load_file(tmp_path / "whole" / "model.safetensors")
    assert "model.norm.weight" in weights and ("lm_head.weight" in weights) != tied
    if style == "hub":
        text = config.pop("text_config")
        rope = text.pop("rope_parameters")
        text |= {"rope_theta": rope["rope_theta"], "sliding_window": 32768}
        text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        config = {**text, **config, "torch_dtype": "bfloat16"}
        del config["layer_types"], config["dtype"]
    elif style == "language_model":  # and tying where releases before 5.0 wrote it
        config["text_config"]["tie_word_embeddings"] = config.pop("tie_word_embeddings")
        weights = {newer_name(name): tensor for name, tensor in weights.items()}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"model.{part}.pretrained={tmp_path / 'whole'}" for part in ("backbone", "vision")]
    model, (backbone, vision) = started(configured(data_dir, *overrides))
    ids = torch.randint(0, 640, (2, 9))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(ids).logits)
    assert model.config.text_config.model_type == "qwen2_5_vl_text"
    assert len(backbone.loaded) + len(vision.loaded) == len(weights)
    assert set(backbone.unused) == {name for name in weights if "visual." in name}
    assert set(vision.unused) == set(weights) - set(backbone.unused)


@pytest.mark.parametrize(("kind", "tensors"), [("qwen2", 7), ("qwen3", 6)])
def test_replacing_layers_adopt_self_attention(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, kind: str, tensors: int
) -> None:
    """Projections with their biases (Qwen2) or norms of heads (Qwen3)."""
    plain = save_backbone(tmp_path / "base", kind, tied=True)
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}"]
    overrides += ["fusion.placement=replace", "fusion.every=2"]
    model, (backbone, _) = started(configured(data_dir, *overrides))
    fused, source = model.model.layers[1], plain.model.layers[1]
    assert fused.self_attn is None
    for name, value in source.self_attn.state_dict().items():
        assert torch.equal(fused.fusion.state_dict()[name], value), name
    assert len(source.self_attn.state_dict()) == tensors
    assert torch.equal(fused.fusion.norm.weight, source.input_layernorm.weight)
    assert backbone.copied == ["model.layers.1.fusion.norm.weight"] and not backbone.new
    assert not backbone.unused and len(backbone.loaded) == len(list(plain.parameters()))
    # Without a start from self-attention there is no room for it; one lost tensor is still missed.
    _, (backbone, _) = started(configured(data_dir, *overrides, "fusion.init=random"))
    assert len(backbone.unused) == tensors
    assert all("layers.1.self_attn" in name for name in backbone.unused)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    lost = "k_proj" if kind == "qwen2" else "k_norm"
    del weights[f"model.layers.1.self_attn.{lost}.weight"]
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"missing model.layers.1.fusion.{lost}.weight"):
        started(configured(data_dir, *overrides))


def test_widths_that_differ_get_an_adapter(data_dir: Path, tmp_path: Path) -> None:
    save_qwen_vl(tmp_path / "tower", out_hidden_size=64)
    save_backbone(tmp_path / "base", "llama", tied=True)
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={tmp_path / 'tower'}"]
    model, (backbone, _) = started(configured(data_dir, *overrides))
    assert model.adapter.weight.shape == (48, 64)
    assert {"adapter.weight", "adapter.bias"} <= set(backbone.new)


# ------------------------------------------------------------------------------ added tokens


def grown_tokenizer(data: Path, out: Path, tokens: int) -> Any:
    """The dataset's tokenizer with so many tokens more."""
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    assert tokenizer.add_tokens([f"<place_{i}>" for i in range(tokens)]) == tokens
    save_tokenizer(tokenizer, out)
    return tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["helium", "llama", "qwen2"])
def test_added_tokens_get_rows_that_start_as_the_mean(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, kind: str, tied: bool
) -> None:
    plain = save_backbone(tmp_path / "base", kind, tied, shard="100KB" if tied else "10GB")
    size = len(grown_tokenizer(data_dir, tmp_path / "grown", 131))
    assert size == 643 == SIZES["vocab_size"] + 3
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}", f"model.tokenizer={tmp_path / 'grown'}"]
    config = configured(data_dir, *overrides, "model.backbone.resize_embeddings=true")
    model, (backbone, _) = started(config)
    assert model.config.text_config.vocab_size == size
    parts = [(model.model.embed_tokens, plain.get_input_embeddings())]
    parts += [(model.lm_head, plain.get_output_embeddings())]
    for ours, theirs in parts:
        assert ours.weight.shape == (size, 48)
        assert torch.equal(ours.weight[:640], theirs.weight)
        mean = theirs.weight.double().mean(0)
        assert (ours.weight[640:].double() - mean).abs().max() < 1e-7
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    ids = torch.randint(0, 640, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :640], plain(ids).logits)
    assert (
        "model.embed_tokens.weight has 643 rows instead of 640, new ones start as their mean"
        in (backbone.line())
    )


def test_added_tokens_without_rows_are_one_clear_message(
    data_dir: Path, qwen_vl: Path, tmp_path: Path
) -> None:
    save_backbone(tmp_path / "base", "llama", tied=True)
    grown_tokenizer(data_dir, tmp_path / "grown", 129)
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}", f"model.tokenizer={tmp_path / 'grown'}"]
    resize, given = "model.backbone.resize_embeddings=true", "+model.backbone.config.vocab_size="
    for more in ([], [given + "641"]):  # whatever vocab_size says, the way out is the same
        with pytest.raises(UserError) as caught:
            started(configured(data_dir, *overrides, *more))
        words = f"{tmp_path / 'grown'} has 641 tokens, the backbone's embedding 640 rows"
        assert words in str(caught.value) and resize in str(caught.value)
    with pytest.raises(UserError, match="vocab_size is 640, but .* 641 tokens; leave it out"):
        started(configured(data_dir, *overrides, resize, given + "640"))
    model, _ = started(configured(data_dir, *overrides, resize, given + "704"))
    assert len(model.model.embed_tokens.weight) == 704  # more rows than tokens, where asked for
    # Rows that a padded vocabulary has to spare are taken as they are.
    grown_tokenizer(data_dir, tmp_path / "spare", 128)
    model, _ = started(configured(data_dir, *overrides, f"model.tokenizer={tmp_path / 'spare'}"))
    assert model.config.text_config.vocab_size == 640


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_means_are_not_made_in_the_checkpoint_s_precision(dtype: torch.dtype) -> None:
    """2,999 rows in parts that do not divide them, far from 0, where sums in bf16 would stall."""
    table = (3 + torch.randn(2999, 8, generator=torch.Generator().manual_seed(0))).to(dtype)
    whole = with_new_rows(table, 3001, HOST, torch.float32)
    assert torch.equal(whole[:2999], table.float())
    expected = table.double().mean(0).float().expand(2, 8)
    torch.testing.assert_close(whole[2999:], expected, rtol=1e-6, atol=0)
    half = with_new_rows(table, 3001, HOST, torch.bfloat16)
    assert torch.equal(half[2999:], expected.bfloat16())


@pytest.mark.slow
def test_added_tokens_train_resume_export_and_grow_again(
    data_dir: Path, qwen_vl: Path, tmp_path: Path
) -> None:
    save_backbone(tmp_path / "base", "qwen2", tied=False)
    resize = "model.backbone.resize_embeddings=true"
    for name, tokens in (("one", 131), ("two", 133)):
        size = len(grown_tokenizer(data_dir, tmp_path / name, tokens))
        target = ["--tokenizer", str(tmp_path / name), "--template", "demo"]
        out = ["--data", str(data_dir), "--out", str(tmp_path / f"data_{name}"), "--workers", "1"]
        assert recipes(["retokenize", *out, *target]) == 0

    def command(name: str, steps: int, *more: str) -> list[str]:
        data = on_data(tmp_path / f"data_{name}")
        common_ones = [o for o in common(data_dir) if o not in on_data(data_dir)]
        where = [f"run_dir={tmp_path / name}_run", f"trainer.steps={steps}", resize]
        vision = f"model.vision.pretrained={qwen_vl}"
        return train_command([*common_ones, *data, *where, vision, *more])

    base = f"model.backbone.pretrained={tmp_path / 'base'}"
    done = run(command("one", 1, base))
    assert "lm_head.weight has 643 rows instead of 640" in done.stdout
    allow = "checkpoint.resume_allow=[trainer.steps]"
    again = run(command("one", 2, base, allow))
    assert "resuming from" in again.stdout and "rows instead of" not in again.stdout
    export(tmp_path / "one_run", tmp_path / "stage1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stage1", trust_remote_code=True)
    assert model.config.text_config.vocab_size == 643 and len(model.lm_head.weight) == 643
    start = f"model.init_from={tmp_path / 'stage1'}"
    done = run(command("two", 1, start, "model.backbone.trainable=false"))
    assert "lm_head.weight has 645 rows instead of 643" in done.stdout
    assert "note: model.backbone.trainable is false, so the rows of new tokens stay" in done.stdout
    assert size == 645


# --------------------------------------------------------------------------------- first values

MECHANISMS = (
    *("casa", "cross_attention", "insertion"),
    *("qformer_insertion", "gated_cross_attention", "hyper_attention"),
)


def drawn(data: Path, *overrides: str, seed: int = 0) -> CasaForConditionalGeneration:
    """A model that starts from nothing."""
    tiny = ["+experiment=demo", *TINY, *on_data(data), f"seed={seed}"]
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return started(to_config(compose("train", overrides=[*tiny, *overrides])))[0]


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_parameter_is_drawn(data_dir: Path, mechanism: str) -> None:
    """Norms one; biases and gates zero; patches by their fan-in, other tensors by the backbone's
    initializer_range; hyper attention's gates as the mechanism says.
    """
    model = drawn(data_dir, f"fusion={mechanism}", "model.vision.config.out_hidden_size=24")
    assert not list(model.buffers())
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        assert value.device == HOST and bool(value.isfinite().all()), name
        if "fusion.gate." in name:
            continue
        if name.endswith(("bias", "_gate")):
            assert not bool(value.any()), name
        elif "norm" in name or "ln_q" in name:
            assert bool((value == 1).all()), name
        else:
            patches = "patch_embed" in name
            std = (
                value[0].numel() ** -0.5 if patches else model.config.text_config.initializer_range
            )
            assert float(value.std()) == pytest.approx(std, rel=0.25), name


def test_draws_depend_on_seed_and_name_alone(data_dir: Path) -> None:
    """Not on what else the model has, nor on what was drawn before."""
    small = drawn(data_dir, "fusion=insertion")
    torch.manual_seed(123)
    state = torch.get_rng_state()
    large = drawn(data_dir, "fusion.init=random", "model.backbone.config.num_hidden_layers=3")
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, large.get_parameter(name)), name
    weights = [large.model.layers[i].mlp.up_proj.weight for i in range(3)]
    assert not torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    other = drawn(data_dir, "fusion=insertion", seed=1)
    assert not torch.equal(other.lm_head.weight, small.lm_head.weight)


def test_a_parameter_without_a_first_value_is_named() -> None:
    class Forgetful(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.empty(3))

    with torch.device("meta"):
        model = torch.nn.Sequential(Forgetful())
    values = FirstValues(lambda module: None, Stored(), 0, HOST, torch.float32)
    ((name, block),) = blocks(model)
    with pytest.raises(NotImplementedError, match="Forgetful gives 0.scale no first value"):
        values.fill(name, block)


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
    index = {"weight_map": {"model.norm.weight": SINGLE, "model.lost.weight": SINGLE}}
    (tmp_path / "base" / INDEX).write_text(json.dumps(index))
    assert "lacks tensors that model.safetensors.index.json names: ['model.lost" in message(
        base, tower
    )
    (tmp_path / "base" / INDEX).unlink()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"x" * 100)
    assert "cannot be read" in message(base, tower)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in message(base, tower)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [0, 131])
def test_every_zero_stage_starts_and_resumes_with_the_same_weights(
    data_dir: Path, qwen_vl: Path, tmp_path: Path, tokens: int
) -> None:
    """Two ranks; frozen, tied and bias parameters among them, and rows of added tokens."""
    size = len(grown_tokenizer(data_dir, tmp_path / "grown", tokens))
    save_backbone(tmp_path / "base", "qwen2", tied=True)
    overrides = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    overrides += [f"model.vision.pretrained={qwen_vl}", "model.backbone.trainable=false"]
    overrides += [f"model.tokenizer={tmp_path / 'grown'}", "model.backbone.resize_embeddings=true"]
    out = tmp_path / "digests.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc_per_node=2", "-m", "tests.helpers.zero_start", str(out)]
    run([*torchrun, *script, *common(data_dir), *overrides])
    model, _ = started(configured(data_dir, *overrides))
    assert len(model.lm_head.weight) == max(640, size)
    found = json.loads(out.read_text())
    for dtype in (torch.float32, torch.bfloat16):
        expected = {
            name: hashlib.sha256(p.detach().to(dtype).float().numpy().tobytes()).hexdigest()
            for name, p in model.named_parameters(remove_duplicate=False)
        }
        assert expected["lm_head.weight"] == expected["model.embed_tokens.weight"]
        for case in ("1", "2", "3"):
            precision = "fp32" if dtype == torch.float32 else "bf16"
            assert found[f"{precision} {case}"] == {"started": expected, "resumed": expected}


@pytest.mark.slow
def test_a_later_stage_starts_from_an_export(data_dir: Path, qwen_vl: Path, tmp_path: Path) -> None:
    save_backbone(tmp_path / "base", "llama", tied=True)
    pretrained = [f"model.backbone.pretrained={tmp_path / 'base'}"]
    pretrained += [f"model.vision.pretrained={qwen_vl}"]
    first = [f"run_dir={tmp_path / 'first'}"]
    done = run(train_command([*common(data_dir), "trainer.steps=2", *first, *pretrained]))
    assert re.search(r"backbone: 29 tensors loaded from .*, \d+ copied from", done.stdout)
    assert re.search(r"vision tower: \d+ tensors loaded from .*, \d+ .* unused", done.stdout)
    # A resume takes everything from the checkpoint.
    again = run(train_command([*common(data_dir), "trainer.steps=2", *first, *pretrained]))
    assert "resuming from" in again.stdout and "tensors loaded" not in again.stdout
    # Neither base model is needed any more.
    shutil.rmtree(tmp_path / "base")
    export(tmp_path / "first", tmp_path / "stage1")
    card = (tmp_path / "stage1" / "README.md").read_text()
    assert f"`{qwen_vl.parent.name}/{qwen_vl.name}`" in card and "inherit their terms" in card
    assert str(qwen_vl) not in card  # nobody else has this folder
    second = [f"run_dir={tmp_path / 'second'}", f"model.init_from={tmp_path / 'stage1'}"]
    second += pretrained
    more = ["trainer.steps=2", "model.backbone.trainable=false"]
    done = run(train_command([*common(data_dir), *second, *more]))
    model, _ = started(configured(data_dir, *second))
    assert f"model: {len(list(model.parameters()))} tensors loaded" in done.stdout
    weights = load_file(tmp_path / "stage1" / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    # A stage may change how the same weights are used, and says so; other weights are refused.
    _, (account,) = started(configured(data_dir, *second, "fusion.window_scope=all_frames"))
    assert "fusion.window_scope 'frame' there, 'all_frames' here" in account.line()
    for override, words in (
        ("fusion=cross_attention", "mechanism 'casa', this run has 'cross_attention'.*fusion=casa"),
        ("fusion.every=2", "unexpected .* differ: fusion.every 1 there, 2 here"),
        (f"model.init_from={qwen_vl}", "of type 'qwen2_5_vl'; expected an export"),
    ):
        with pytest.raises(UserError, match=words):
            started(configured(data_dir, *second, override))
