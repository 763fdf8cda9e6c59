"""Tokenizers as users bring them: in exports, without pad or bos."""

from __future__ import annotations

from pathlib import Path

import pytest

from casa_train.data.templates import resolve
from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.tiny_export import FULL_TEMPLATE, write_tiny_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("tiny") / "export")


def test_an_export_keeps_its_template(export: Path) -> None:
    tokenizer = load_tokenizer(str(export))
    assert len(tokenizer) == len(build_tokenizer())
    # Not taken apart again: it is written down beside the tokenizer, field for field.
    template = resolve({}, tokenizer, str(export), "model.template").template
    assert {n: v for n, v in template.given().items() if n != "trim"} == FULL_TEMPLATE


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
