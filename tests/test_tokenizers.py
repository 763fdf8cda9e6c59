"""Tokenizers as users bring them: in exports, with code of their own, without pad or bos."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from casa_train.data.templates import resolve
from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.tiny_export import FULL_TEMPLATE, write_tiny_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("tiny") / "export")


@pytest.fixture
def no_keyboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt would wait 15 seconds on every rank."""

    def asked(*words: Any) -> str:
        raise AssertionError(f"somebody was asked: {words}")

    monkeypatch.setattr("builtins.input", asked)


def test_our_own_exports_are_loaded_without_a_question(export: Path, no_keyboard: None) -> None:
    tokenizer = load_tokenizer(str(export))
    assert len(tokenizer) == len(build_tokenizer())
    # Its template is the one that is written down beside it, field for field.
    template = resolve({}, tokenizer, str(export), "model.template").template
    assert {n: v for n, v in template.given().items() if n != "trim"} == FULL_TEMPLATE


def test_code_of_others_is_refused_without_a_question(
    export: Path, tmp_path: Path, no_keyboard: None
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(export, foreign)
    (foreign / "casa_train_export.json").unlink()
    config = json.loads((foreign / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (foreign / "tokenizer_config.json").write_text(json.dumps(config))
    (foreign / "own.py").write_text("raise AssertionError('this code was run')\n")
    with pytest.raises(UserError, match="comes with code of its own, which is not run") as caught:
        load_tokenizer(str(foreign))
    assert repr(str(foreign)) in str(caught.value) and "auto_map" in str(caught.value)


def test_a_tokenizer_without_pad_and_bos(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.bos_token = None
    save_tokenizer(tokenizer, tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token is None and loaded.bos_token is None
    processor = CasaProcessor(loaded, template=dict(FULL_TEMPLATE))
    batch = processor.tokenize_messages(
        [[{"role": "user", "content": words}] for words in ("a", "a longer question")]
    )
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert not batch["attention_mask"].all()
