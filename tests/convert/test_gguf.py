"""A Llama in a GGUF file as a Hugging Face directory: values, tokenizer, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import RopeScalingType
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from casa_train.convert.__main__ import main
from tests.helpers.gguf_files import TOKENS, write_llama


def tiny_llama(tied: bool) -> Any:
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(TOKENS) + 4,  # padded, as published vocabularies are
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rms_norm_eps=3e-5,
        rope_parameters={"rope_theta": 70000.0, "rope_type": "default"},
        tie_word_embeddings=tied,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # else all ones: any norm would do
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def padded() -> list[str]:
    return [*TOKENS, *(f"<unused{i}>" for i in range(4))]


@pytest.mark.parametrize("tied", [True, False])
def test_a_directory_has_the_model_that_was_written(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tied)
    write_llama(tmp_path / "tiny.gguf", model, tokens=padded())
    out = tmp_path / "out"
    assert main(["gguf", str(tmp_path / "tiny.gguf"), "--out", str(out)]) == 0
    assert "bit for bit" in capsys.readouterr().out
    again: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert again.config.tie_word_embeddings is tied
    assert again.config.rms_norm_eps == 3e-5
    ids = torch.tensor([[1, 20, 33, 47, 60, 20]])
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)
    again.save_pretrained(tmp_path / "again")  # what is read from GGUF itself refuses to be saved
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert "license: apache-2.0" in (out / "README.md").read_text()
    assert not list(tmp_path.glob("*.partial"))


def test_its_tokenizer_cuts_digits_and_spaces_as_it_was_trained(tmp_path: Path) -> None:
    model = tiny_llama(True)
    cuts = {}
    for cut in ("smollm", "gpt-2"):
        file, out = tmp_path / f"{cut}.gguf", tmp_path / cut
        write_llama(file, model, cut=cut, tokens=padded())
        assert main(["gguf", str(file), "--out", str(out)]) == 0
        tokenizer: Any = AutoTokenizer.from_pretrained(out)
        cuts[cut] = tokenizer.tokenize("in  12 cat")
        assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
        text = tokenizer.apply_chat_template([{"role": "user", "content": "cat"}], tokenize=False)
        assert text == "<|im_start|>user\ncat<|im_end|>\n"
    # llama.cpp cuts digits off first for smollm, which leaves two spaces to themselves.
    assert cuts["smollm"] == ["in", "ĠĠ", "1", "2", "Ġcat"]
    assert cuts["gpt-2"] == ["in", "Ġ", "Ġ", "1", "2", "Ġcat"]


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["gguf", *arguments]) == 2
    return capsys.readouterr().err


def test_what_cannot_be_converted_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(True)
    out = tmp_path / "out"
    to = ["--out", str(out)]
    absent = tmp_path / "absent.gguf"
    assert f"{absent} does not exist" in refused([str(absent), *to], capsys)
    text = tmp_path / "text.gguf"
    text.write_text("no model\n" * 100)
    assert "cannot be read as GGUF" in refused([str(text), *to], capsys)
    other = tmp_path / "other.gguf"
    write_llama(other, model, architecture="gpt2", tokens=padded())
    said = refused([str(other), *to], capsys)
    assert "architecture 'gpt2'; expected 'llama'" in said and "safetensors" in said
    cut = tmp_path / "cut.gguf"
    write_llama(cut, model, cut="llama-bpe", tokens=padded())
    said = refused([str(cut), *to], capsys)
    assert "by the rule 'llama-bpe'" in said and "--tokenizer" in said
    more = tmp_path / "more.gguf"
    write_llama(more, model, tokens=[*padded(), "<more>"])
    said = refused([str(more), *to], capsys)
    assert f"{len(TOKENS) + 4} rows, the tokenizer {len(TOKENS) + 5} tokens" in said
    whole = tmp_path / "whole.gguf"
    write_llama(whole, model, tokens=padded())
    half = tmp_path / "half.gguf"
    half.write_bytes(whole.read_bytes()[:-5000])
    assert "half.gguf" in refused([str(half), *to], capsys)
    assert not out.exists() and not list(tmp_path.glob("*.partial"))
    out.mkdir()
    assert f"--out {out} exists already" in refused([str(whole), *to], capsys)


def test_another_tokenizer_takes_the_place_of_one_that_is_cut_by_an_unknown_rule(
    tmp_path: Path,
) -> None:
    model = tiny_llama(True)
    for cut in ("smollm", "llama-bpe"):  # the second would be cut otherwise
        write_llama(tmp_path / f"{cut}.gguf", model, cut=cut, tokens=padded())
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["gguf", str(tmp_path / "smollm.gguf"), "--out", str(first)]) == 0
    given = [str(tmp_path / "llama-bpe.gguf"), "--out", str(second), "--tokenizer", str(first)]
    assert main(["gguf", *given]) == 0
    texts = [AutoTokenizer.from_pretrained(d).tokenize("in  12 cat") for d in (first, second)]
    assert texts[0] == texts[1]


def test_without_the_package_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    said = refused([str(tmp_path / "any.gguf"), "--out", str(tmp_path / "out")], capsys)
    assert "pip install 'casa_train[real]'" in said


def rope_of_llama_3(writer: Any) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, 4, dtype=np.float32))


def biases(writer: Any) -> None:
    writer.add_tensor("blk.1.attn_q.bias", np.ones(48, np.float32))


def stretched(writer: Any) -> None:
    writer.add_rope_scaling_type(RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)


def first_of_two(writer: Any) -> None:
    writer.add_uint16("split.count", 2)


def experts(writer: Any) -> None:
    writer.add_expert_count(4)


@pytest.mark.parametrize(
    ("more", "lacking", "said"),
    [
        (rope_of_llama_3, (), "1 tensors that transformers does not read, such as rope_freqs"),
        (biases, (), "such as blk.1.attn_q.bias"),
        (stretched, (), "llama.rope.scaling.type"),
        (experts, (), "'llama.expert_count': 4"),
        (first_of_two, (), "one of 2 files"),
        (None, ("blk.2.ffn_up.weight",), "lacks 1 tensors of 3 layers, such as blk.2.ffn_up"),
    ],
)
def test_what_transformers_would_leave_out_or_draw_at_random_is_refused(
    more: Any, lacking: tuple[str, ...], said: str, tmp_path: Path, capsys: Any
) -> None:
    whole, file, out = tmp_path / "whole.gguf", tmp_path / "file.gguf", tmp_path / "out"
    options = {"lacking": lacking} if more is None else {"more": more}
    write_llama(file, tiny_llama(True), tokens=padded(), **options)
    assert said in refused([str(file), "--out", str(out)], capsys)
    # Whatever the tokenizer.
    write_llama(whole, tiny_llama(True), tokens=padded())
    assert main(["gguf", str(whole), "--out", str(tmp_path / "words")]) == 0
    capsys.readouterr()
    given = ["--tokenizer", str(tmp_path / "words")]
    assert said in refused([str(file), "--out", str(out), *given], capsys)
    assert not out.exists()


def test_settings_that_change_nothing_are_taken(tmp_path: Path) -> None:
    def neutral(writer: Any) -> None:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.add_key_length(8)
        writer.add_value_length(8)
        writer.add_expert_count(0)

    write_llama(tmp_path / "any.gguf", tiny_llama(True), tokens=padded(), more=neutral)
    assert main(["gguf", str(tmp_path / "any.gguf"), "--out", str(tmp_path / "out")]) == 0


def test_tokenizers_that_may_be_read_wrongly_or_are_another_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tiny_llama(True), ["--out", str(tmp_path / "out")]
    unknown, pieces = tmp_path / "unknown.gguf", tmp_path / "pieces.gguf"
    write_llama(unknown, model, cut="default", tokens=padded())  # its writer knew no rule
    assert "by the rule 'default'" in refused([str(unknown), *out], capsys)
    write_llama(pieces, model, kind="llama", tokens=padded())
    assert "of the kind 'llama'; expected 'gpt2'" in refused([str(pieces), *out], capsys)
    other, words = tmp_path / "other.gguf", tmp_path / "words"
    write_llama(other, model, tokens=[*padded()[:3], *padded()[:2:-1]])
    whole = tmp_path / "whole.gguf"
    write_llama(whole, model, tokens=padded())
    assert main(["gguf", str(whole), "--out", str(words)]) == 0
    said = refused([str(other), *out, "--tokenizer", str(words)], capsys)
    assert f"--tokenizer {words} has other tokens than {other}" in said


def test_the_file_that_is_named_is_read_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(True)
    here, there = tmp_path / "here", tmp_path / "there it is"
    here.mkdir()
    there.mkdir()
    write_llama(there / "tiny.gguf", model, tokens=padded())
    other = tiny_llama(True)
    torch.nn.init.ones_(other.model.embed_tokens.weight)
    write_llama(here / "tiny.gguf", other, tokens=padded())
    monkeypatch.chdir(here)
    assert main(["gguf", str(there / "tiny.gguf"), "--out", str(tmp_path / "first")]) == 0
    first: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "first", dtype=torch.float32)
    assert torch.equal(first.model.embed_tokens.weight, model.model.embed_tokens.weight)
    strange = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "cat": 1}, "<|endoftext|>"))
    strange.save(str(there / "tokenizer.json"))
    assert main(["gguf", str(there / "tiny.gguf"), "--out", str(tmp_path / "second")]) == 0
    texts = [
        AutoTokenizer.from_pretrained(tmp_path / d).tokenize("in  12 cat")
        for d in ("first", "second")
    ]
    assert texts[0] == texts[1] and len(texts[0]) > 2
