"""Tokenizers as users bring them: in exports, without pad or bos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import AutoProcessor, AutoTokenizer

from casa_train.data.templates import resolve
from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes.synthetic import build_tokenizer
from tests.helpers.stranger import ask
from tests.helpers.tiny_export import FULL_TEMPLATE, write_tiny_export


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


def load(path: Path, **options: Any) -> Any:
    return AutoProcessor.from_pretrained(str(path), trust_remote_code=True, **options)


def ids_of(processor: Any, words: str) -> list[Any]:
    """The ids of words in a message, with and without the template as text, and of text."""
    messages = [*ask(words), {"role": "assistant", "content": words}]
    rendered = processor.apply_chat_template(messages)
    return [
        processor.apply_chat_template(messages, tokenize=True),
        processor.tokenize_messages(messages)["input_ids"].tolist()[0],
        processor(text=rendered)["input_ids"][0],
        processor(text=words)["input_ids"][0],
    ]


ADDITIONS = {
    "plain": lambda tokenizer: tokenizer.add_tokens(["<loc1>", "redcat"]),
    "special": lambda tokenizer: tokenizer.add_tokens(["<loc1>"], special_tokens=True),
    "eats space": lambda tokenizer: tokenizer.add_tokens(
        [AddedToken("<loc1>", lstrip=True, rstrip=True, normalized=False)]
    ),
    "additional": lambda tokenizer: tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<loc1>"]}
    ),
    "pad": lambda tokenizer: tokenizer.add_special_tokens({"pad_token": "<loc1>"}),
    "a word of the vocabulary": lambda tokenizer: tokenizer.add_tokens(["red"]),
}
WORDS = "a <loc1> redcat<loc1> <|end|> red b"


@pytest.mark.parametrize("name", ADDITIONS)
def test_added_tokens_have_their_ids_before_saving_too(
    export: Path, tmp_path: Path, name: str
) -> None:
    processor = load(export)
    ids_of(processor, WORDS)  # whatever it remembers of them
    ADDITIONS[name](processor.tokenizer)
    now = ids_of(processor, WORDS)
    processor.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert ids_of(reloaded, WORDS) == now
    assert now[0] == now[1] == now[2]
    added = processor.tokenizer.convert_tokens_to_ids("<loc1>")
    acts = {"plain": True, "eats space": True, "a word of the vocabulary": False}
    if name in acts:
        assert (added in now[0]) == (added in now[3]) == acts[name]
    else:  # typed special tokens are text; in text as rendered they act
        assert added not in now[0] and added in now[3]


def test_saving_knows_tokens_that_were_added_just_before(export: Path, tmp_path: Path) -> None:
    processor = load(export)
    processor.tokenizer.add_tokens(["<loc1>"], special_tokens=True)
    processor.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved")
    assert processor.chat_template == reloaded.chat_template == reloaded.tokenizer.chat_template
    assert ids_of(processor, WORDS) == ids_of(reloaded, WORDS)


def test_special_tokens_of_the_loader_stay_text_in_messages(export: Path) -> None:
    """The template as saved does not know them."""
    processor = load(export)
    processor.tokenizer.add_tokens(["<loc1>"], special_tokens=True)
    tokenizer = AutoTokenizer.from_pretrained(str(export))
    tokenizer.add_tokens(["<loc1>"], special_tokens=True)
    for other in (
        load(export, additional_special_tokens=["<loc1>"]),
        load(export, tokenizer=tokenizer),
    ):
        assert ids_of(other, WORDS) == ids_of(processor, WORDS)


def test_a_template_of_the_callers_own_outlives_added_tokens(export: Path) -> None:
    processor = load(export, chat_template="{{ messages[0].role }}")
    processor.tokenizer.add_tokens(["<loc1>"])
    assert processor.apply_chat_template(ask("a")) == "user"
    assert processor.tokenizer.chat_template == processor.chat_template
