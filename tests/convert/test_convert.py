"""Published checkpoints under plausible names become exports that compute the same, bit for bit.

What the rules do not know is refused, with what a rule is written from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from casa_train.convert import conversion
from casa_train.convert.__main__ import main
from casa_train.convert.conversion import open_source
from casa_train.convert.name_tree import name_tree
from casa_train.convert.rules import load_rules
from casa_train.convert.shard_files import write_weights
from casa_train.export.from_run import gate_conversations
from casa_train.export.loading import load_model, load_processor
from casa_train.io.files import EXPORT_MARKER
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.commands import TINY, on_data, run, train_command
from tests.helpers.foreign import convert_command, foreign_model, renamed, write_foreign
from tests.helpers.small_disk import small_disk
from tests.helpers.tiny_export import MAX_PIXELS

ENC = "image_prefix.enc.visual"
Capture = pytest.CaptureFixture[str]


def split_tower(ours: str) -> str | list[str]:
    """The tower's qkv in three, and everything else as the default naming has it."""
    theirs = str(renamed(tower=ENC)(ours))
    if ".attn.qkv." in theirs:
        return [theirs.replace("qkv", part) for part in ("q", "k", "v")]
    return theirs


def as_linear(ours: str, tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if "patch_embed" in ours else tensor


def without_time(ours: str, tensor: Tensor) -> Tensor:
    return tensor[:, :, 0] if "patch_embed" in ours else tensor


def one_slice(model: CasaForConditionalGeneration) -> None:
    """A patch projection without a time axis has one time slice."""
    model.visual.patch_embed.proj.weight.data[:, :, 1:] = 0


# name: options of the model, of the checkpoint, and of the command.
NAMINGS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "own projections in every layer": ({}, {"name": renamed()}, []),
    "in self-attention, Helium's prefix": (
        {"mechanism": "casa"},
        {"name": renamed(ENC, "self_attn.casa", "model.model.", r"\1_proj_casa"), "tower": ENC},
        ["--fusion", "mechanism=casa"],
    ),
    "shared": ({"share_parameters": True}, {"name": renamed(ENC), "tower": ENC}, []),
    "shared casa": (
        {"mechanism": "casa", "share_parameters": True},
        {"name": renamed()},
        ["--fusion", "mechanism=casa"],
    ),
    "insertion, tied": (
        {"mechanism": "insertion", "tied": True},
        {"name": renamed(ENC), "tower": ENC, "model_type": "Helium1_VL_2B"},
        [],
    ),
    "one tensor for q, k and v": ({}, {"name": renamed(fusion="xa"), "qkv": "qkv_proj"}, []),
    "Qwen, with biases": (
        {"backbone": "qwen2_5_vl"},
        {
            "name": renamed(fusion="cross_attn.mha", prefix="model.language_model."),
            "model_type": "CASA_Qwen2_5_VL_3B",
        },
        [],
    ),
    "every second layer": (
        {"every": 2, "mechanism": "casa"},
        {"name": renamed(fusion="ca")},
        ["--fusion", "every=2", "mechanism=casa"],
    ),
    "a tower's qkv in three": ({}, {"name": split_tower, "tower": ENC}, []),
    "patches as a linear": ({}, {"name": renamed(), "reshape": as_linear}, []),
    "patches without a time axis": ({}, {"name": renamed(), "reshape": without_time}, []),
}


@torch.no_grad()
def assert_same(model: CasaForConditionalGeneration, export: Path) -> None:
    """Every value and all logits of a conversation with images, bit for bit."""
    loaded, processor = load_model(export, torch.float32).eval(), load_processor(export)
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for messages in gate_conversations(MAX_PIXELS):
        batch = processor.tokenize_messages(messages)
        assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    assert len(batch["input_ids"][0]) > 5


@pytest.mark.parametrize("naming", NAMINGS)
def test_the_export_computes_what_the_original_does(
    naming: str, tmp_path: Path, capsys: Capture
) -> None:
    options, written, words = NAMINGS[naming]
    model = foreign_model(**options)
    if written.get("reshape") is without_time:
        one_slice(model)
    source = write_foreign(tmp_path / "source", model, **written)
    out = tmp_path / "out"
    assert main(convert_command(source, out, *words)) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert "0 ignored" in printed or options.get("tied")
    assert "are not verified" in printed
    config = json.loads((out / "config.json").read_text())
    assert config["fusion"]["mechanism"] == options.get("mechanism", config["fusion"]["mechanism"])
    assert_same(model, out)
    record = json.loads((out / EXPORT_MARKER).read_text())
    assert record["verified"] is None and record["rules"]["verified"] is False
    assert "Not verified" in (out / "README.md").read_text()


def test_names_of_ones_own_take_rules_of_ones_own(tmp_path: Path, capsys: Capture) -> None:
    plain = renamed()

    def strange(ours: str) -> str:
        theirs = str(plain(ours))
        return re.sub(r"layers\.(\d+)\.casa_attn\.(\w)_proj", r"read.\1.w\2", theirs).replace(
            "casa_attn.norm", "reader_norm"
        )

    model = foreign_model()

    def extra(stored: dict[str, Tensor]) -> None:
        stored["loss_scale"] = torch.ones(1)
        del stored["model.layers.1.reader_norm.weight"]

    model.model.layers[1].fusion.norm.weight.data = model.model.layers[
        1
    ].input_layernorm.weight.data.clone()
    source = write_foreign(tmp_path / "source", model, strange, edit=extra, more={"gain_of": 3})
    out = tmp_path / "out"
    assert main(convert_command(source, out)) == 2
    error = capsys.readouterr().err
    assert "gain_of: 3" in error and "ignore" in error
    rules: dict[str, Any] = {
        "extends": "kyutai",
        "config": {"ignore": {"gain_of": "how loud it was trained"}},
    }
    file = tmp_path / "rules.yaml"
    file.write_text(yaml.safe_dump(rules))
    assert main(convert_command(source, out, "--rules", str(file))) == 2
    error = capsys.readouterr().err
    assert "? model.read.{0..1}.wq.weight  [64, 64]  x2" in error
    assert "? loss_scale  [1]" in error and "= model.norm.weight" in error
    assert not out.exists() and not list(tmp_path.glob("out*"))
    layer = r"model.layers.\1.fusion"
    rules["tensors"] = [
        {"from": r"model\.read\.(\d+)\.w(.)\.weight", "to": layer + r".\2_proj.weight"},
        {"from": r"model\.layers\.(\d+)\.reader_norm\.weight", "to": layer + ".norm.weight"},
        {"from": "loss_scale", "ignore": "of training alone"},
        {"from": "no_such_.*", "ignore": "never there"},
    ]
    file.write_text(yaml.safe_dump(rules))
    assert main(convert_command(source, out, "--rules", str(file))) == 0
    printed = capsys.readouterr().out
    assert "ignored 1 (loss_scale, ...): of training alone" in printed
    assert "filled 1 (model.layers.1.fusion.norm.weight, ...): " in printed
    assert "the rule 'no_such_.*' matches nothing" in printed
    assert_same(model, out)


def drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda stored: stored.__delitem__(name) or None


def cut(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda stored: stored.__setitem__(name, stored[name][:5].clone())


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda stored: stored.__setitem__("model.layers.0.gate.alpha", torch.ones(2)),
            ["1 tensors that lead nowhere", "? model.layers.0.gate.alpha  [2]"],
        ),
        (
            drop("model.layers.1.casa_attn.v_proj.weight"),
            ["1 of this model that nothing fills", "model.layers.1.fusion.v_proj.weight  [32, 64]"],
        ),
        (
            cut("model.layers.0.mlp.up_proj.weight"),
            ["layers.0.mlp.up_proj.weight has shape [5, 64], expected [96, 64]"],
        ),
        (
            lambda stored: stored.__setitem__("image_prefix.visual.blocks.9.x", torch.ones(2)),
            ["would be visual.blocks.9.x, which this model has not"],
        ),
        (
            lambda stored: stored.__setitem__("language_model.norm.weight", torch.ones(64)),
            ["would both be model.norm.weight"],
        ),
        (
            lambda stored: stored.__setitem__(
                "model.norm.weight", torch.ones(64, dtype=torch.int8)
            ),
            ["is stored as ['I8']"],
        ),
    ],
)
def test_tensors_that_do_not_fit(
    edit: Callable[[dict[str, Tensor]], None], words: list[str], tmp_path: Path, capsys: Capture
) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed(), edit=edit)
    assert main(convert_command(source, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and all(word in error for word in words), error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"model_type": "llava"}, "model_type 'llava'; expected one of the families"),
        ({"xa_gate": "tanh"}, 'nothing reads: xa_gate: "tanh"'),
        ({"pre_image_tokens": [3, 4]}, "has pre_image_tokens [3, 4]"),
        ({"vocab_size": 30}, "vocab_size 30, its tokenizer 512 tokens"),
        ({"text_config": {"model_type": "mamba"}}, "has text_config.model_type 'mamba'"),
        ({"vision_config": {"depht": 2}}, "nothing reads: vision_config.depht: 2"),
    ],
)
def test_settings_that_do_not_fit(
    more: dict[str, Any], words: str, tmp_path: Path, capsys: Capture
) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed(), more=more)
    assert main(convert_command(source, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Some of what transformers 4.51.3 writes into a configuration, and into each section of it.
OF_4_51 = {
    **dict.fromkeys(("torchscript", "tf_legacy_loss", "is_decoder", "do_sample"), False),
    **dict.fromkeys(("min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), 0),
    **dict.fromkeys(("bad_words_ids", "sep_token_id", "task_specific_params", "prefix"), None),
    **{"max_length": 20, "num_beams": 1, "temperature": 1.0, "pruned_heads": {}},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("backbone", ["llama", "qwen2_5_vl"])
def test_settings_may_stand_where_any_release_wrote_them(
    backbone: str, nested: bool, tmp_path: Path
) -> None:
    model = foreign_model(backbone=backbone)
    model_type = "CASA_Helium1_VL_2B" if backbone == "llama" else "CASA_Qwen2_5_VL_3B"
    source = write_foreign(tmp_path / "source", model, renamed(), model_type)
    config = json.loads((source / "config.json").read_text())
    vision = {**config.pop("vision_config"), **OF_4_51, "tie_word_embeddings": True}
    code = {key: config.pop(key) for key in ("auto_map", "architectures", "model_type")}
    text = {**config, **OF_4_51}
    rope = text.pop("rope_parameters")  # of transformers 5
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None if backbone == "llama" else {**rope, "type": "default"}
    decoder = "llama" if backbone == "llama" else "qwen2_5_vl_text"
    where = {"text_config": {**text, "model_type": decoder}} if nested else text
    config = {**code, **where, "vision_config": vision, "image_token_id": 3}
    (source / "config.json").write_text(json.dumps(config))
    assert main(convert_command(source, tmp_path / "out")) == 0
    assert_same(model, tmp_path / "out")


def test_a_tied_head_has_the_embeddings_values(tmp_path: Path, capsys: Capture) -> None:
    for name, factor, code in (("equal", 1, 0), ("other", 2, 2)):

        def head(stored: dict[str, Tensor], factor: int = factor) -> None:
            stored["lm_head.weight"] = factor * stored["model.embed_tokens.weight"]

        model = foreign_model(tied=True)
        source = write_foreign(tmp_path / name, model, renamed(), edit=head)
        assert main(convert_command(source, tmp_path / f"out_{name}")) == code
    told = capsys.readouterr()
    assert "hold other values" in told.err
    assert "ignored 1 (lm_head.weight, ...): a tied head is the embedding" in told.out


def test_bad_commands(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "broken.yaml").write_text("tensors: [{from: '('}]")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    out = str(tmp_path / "out")
    cases: list[tuple[list[str], str]] = [
        ([str(tmp_path / "nowhere"), "--out", out], "neither a directory nor a hub id"),
        ([str(source), "--out", str(tmp_path / "full")], "full exists already"),
        ([str(source), "--out", str(tmp_path / "with.dot")], "must not contain a dot"),
        (["kyutai/CASA-Helium1-VL-2B", "--out", out], "Download it where there is a network"),
        ([str(source), "--out", out, "--rules", str(tmp_path / "broken.yaml")], "broken.yaml"),
        ([str(source), "--out", out, "--rules", str(tmp_path / "none.yaml")], "cannot be read"),
        ([str(source), "--out", out, "--fusion", "mechanism"], "expected KEY=VALUE"),
        (
            convert_command(source, Path(out), "--fusion", "mechanism=sum")[1:],
            "'sum'",
        ),
        ([str(source), "--out", out, "--template", "nothing"], "--template is 'nothing'"),
        ([str(source), "--out", out, "--trust-remote-code"], "without --verify"),
        ([str(source), "--out", out, "--image-size", "20"], "--image-size is 20"),
        ([str(source)], "--out is missing"),
    ]
    for words, expected in cases:
        assert main(["kyutai", *words]) == 2, words
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error, (words, error)
    assert not Path(out).exists()
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_an_export_that_is_there_stays(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    words = convert_command(source, tmp_path / "out")
    assert main(words) == 0
    before = (tmp_path / "out" / EXPORT_MARKER).stat().st_mtime_ns
    assert main(words) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "out" / EXPORT_MARKER).stat().st_mtime_ns == before


def test_checkpoints_that_are_broken(tmp_path: Path, capsys: Capture) -> None:
    whole = write_foreign(tmp_path / "whole", foreign_model(), renamed())
    cases: list[tuple[str, str, Callable[[Path], Any]]] = [
        (
            "index",
            "has no weight_map",
            lambda d: (d / "model.safetensors.index.json").write_text('{"metadata": {}}'),
        ),
        (
            "list",
            "config.json is missing or no JSON object",
            lambda d: (d / "config.json").write_text("[3]"),
        ),
        (
            "tokens",
            "--tokenizer names another",
            lambda d: (d / "tokenizer.json").unlink(),
        ),
        (
            "half",
            "cannot be read",
            lambda d: os.truncate(d / "model.safetensors", 90_000),
        ),
    ]
    for name, expected, spoil in cases:
        source = tmp_path / name
        shutil.copytree(whole, source)
        spoil(source)
        assert main(convert_command(source, tmp_path / "out")) == 2, name
        error = capsys.readouterr().err
        assert expected in error and "Traceback" not in error, error
        assert not list(tmp_path.glob("out*"))


def test_values_that_are_no_numbers_leave_nothing(tmp_path: Path, capsys: Capture) -> None:
    def spoil(stored: dict[str, Tensor]) -> None:
        stored["model.layers.1.mlp.up_proj.weight"][7, 5] = torch.inf

    source = write_foreign(tmp_path / "source", foreign_model(), renamed(), edit=spoil)
    assert main(convert_command(source, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj.weight would hold NaN or infinity" in error
    assert not list(tmp_path.glob("out*"))


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(directory: Path, sizes: Any, read: Any) -> None:
        (directory / "model-00001-of-00007.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    monkeypatch.setattr(conversion, "write_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(convert_command(source, tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_weights_that_belong_to_no_tensor_are_named(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    shutil.copy(source / "model.safetensors", source / "consolidated.safetensors")
    assert main(convert_command(source, tmp_path / "out")) == 0
    assert "note: consolidated.safetensors is not read" in capsys.readouterr().out


def test_a_disk_without_room(tmp_path: Path, capsys: Capture) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    with small_disk(tmp_path / "disk", "8m") as disk:
        assert main(convert_command(source, disk / "out")) == 2
        assert "bytes are free" in capsys.readouterr().err
        assert not list(disk.iterdir())


def test_weights_in_several_files_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    held: list[int] = []

    def small(directory: Path, sizes: Any, read: Any) -> None:
        write_weights(directory, sizes, read, shard_bytes=100_000)
        held.extend(file.stat().st_size for file in directory.glob("model-*.safetensors"))

    monkeypatch.setattr(conversion, "write_weights", small)
    model = foreign_model()
    source = write_foreign(tmp_path / "source", model, renamed())
    assert main(convert_command(source, tmp_path / "out")) == 0
    # A tensor larger than that has a file of its own.
    largest = max(p.numel() * 4 for p in model.parameters())
    assert len(held) > 3 and max(held) < max(largest, 100_000) + 10_000
    assert_same(model, tmp_path / "out")
    # And so may the source be: it is read one tensor at a time.
    shards = open_source(str(tmp_path / "out"))
    assert len(shards.shapes()) == len(dict(model.named_parameters()))


def test_a_precision_may_be_chosen(tmp_path: Path) -> None:
    model = foreign_model()
    source = write_foreign(tmp_path / "source", model, renamed())
    assert main(convert_command(source, tmp_path / "out", "--dtype", "bf16")) == 0
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for name, value in model.named_parameters():
            assert torch.equal(file.get_tensor(name), value.bfloat16())
    assert load_model(tmp_path / "out", "auto").dtype == torch.bfloat16


@pytest.mark.slow
def test_a_run_starts_from_it(data_dir: Path, tmp_path: Path) -> None:
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    out = tmp_path / "out"
    assert main(convert_command(source, out)) == 0
    small = [word for word in TINY if ".config." not in word]
    given = ["+experiment=demo", "fusion=cross_attention", *small, *on_data(data_dir)]
    sizes = ["~model.backbone.config", "~model.vision.config", f"model.init_from={out}"]
    steps = ["trainer.steps=1", f"run_dir={tmp_path / 'run'}", "model.vision.train_last_blocks=1"]
    printed = run(train_command([*given, *sizes, *steps])).stdout
    assert re.search(r"model: 61 tensors loaded from", printed), printed


def test_the_tree_is_short_and_told_apart(capsys: Capture, tmp_path: Path) -> None:
    shapes = {f"layers.{n}.w": [2, 3] for n in range(12)} | {"layers.3.w": [2, 4], "head": [7]}
    assert name_tree(shapes).splitlines() == [
        "  head  [7]",
        "  layers.{0,1,2,4,5,6,7,8,9,10,11}.w  [2, 3]  x11",
        "  layers.3.w  [2, 4]",
    ]
    source = write_foreign(tmp_path / "source", foreign_model(), renamed())
    assert main(["kyutai", str(source), "--tree"]) == 0
    assert "  model.layers.{0..1}.casa_attn.q_proj.weight  [64, 64]  x2" in capsys.readouterr().out


def test_the_shipped_rules_say_that_nobody_has_verified_them() -> None:
    rules = load_rules("kyutai")
    assert not rules.verified and len(rules.sources) > 3
    readme = Path(str(conversion.__file__)).parents[1] / "export" / "README.md"
    assert "not verified" in readme.read_text()
