"""`evaluate --text`: what an export says without pictures, beside the backbone it came from."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from casa_train.config.compose import compose_config
from casa_train.evaluate.__main__ import main
from tests.helpers.commands import TINY, on_data, run, train_command

pytestmark = pytest.mark.slow


def trained(data: Path, folder: Path, backbone: Path, trainable: bool) -> Path:
    """A run of two steps, exported."""
    out = folder / f"trainable_{trainable}"
    sizes = [o for o in TINY if "backbone.config" not in o]
    run(
        train_command(
            [
                *(*sizes, *on_data(data), f"run_dir={out}", "name=text", "trainer.steps=2"),
                *("~model.backbone.config", f"model.backbone.pretrained={backbone}"),
                *(f"model.backbone.trainable={trainable}", "optim.groups.backbone.lr=3e-2"),
                *("optim.warmup_steps=0", "metrics.tensorboard=false"),
            ]
        )
    )
    run([sys.executable, "-m", "casa_train.export", str(out), "--out", str(out / "export")])
    return out


def test_a_frozen_backbone_says_the_same_and_a_trained_one_does_not(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = tmp_path / "backbone"
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    # What published ones say of sampling is not what is compared.
    model.generation_config = GenerationConfig(repetition_penalty=1.8, no_repeat_ngram_size=2)
    model.save_pretrained(backbone)
    frozen = trained(data_dir, tmp_path, backbone, False)
    assert main([str(frozen), "--text"]) == 0
    assert "bit for bit in 6 of 6 texts, answers token for token in 6" in capsys.readouterr().out
    moved = trained(data_dir, tmp_path, backbone, True)
    assert main([str(moved), "--text"]) == 0
    assert "bit for bit in 0 of 6 texts" in capsys.readouterr().out
    texts = json.loads((moved / "text_answers.json").read_text())["texts"]
    assert all(text["largest_difference"] > 1e-3 for text in texts)
    assert any(text["answer"] != text["plain_answer"] for text in texts)

    assert main([str(frozen), "--text", "evaluation.max_samples=3"]) == 2
    assert "evaluation.max_samples=3 says nothing beside --text" in capsys.readouterr().err
    for stray in (["--only", "*casa*"], ["--config-dir", str(tmp_path)]):
        assert main([str(frozen), "--text", *stray]) == 2
        assert f"{stray[0]} says nothing beside --text" in capsys.readouterr().err
    backbone.rename(tmp_path / "elsewhere")
    assert main([str(frozen), "--text"]) == 2
    said = capsys.readouterr().err
    assert f"model.backbone.pretrained {backbone} cannot be loaded" in said


def test_a_backbone_that_began_at_random_has_nothing_beside_it(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "random"
    out.mkdir()
    config = compose_config([*TINY, *on_data(data_dir), f"run_dir={out}"])
    (out / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    assert main([str(out), "--text"]) == 2
    assert "names no backbone" in capsys.readouterr().err
