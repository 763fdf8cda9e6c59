"""Counting and fingerprinting tokens, so that an index and a training run agree on lengths."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from casa_train.errors import UserError
from casa_train.modeling.processing_casa import portable_tokenizer_config

PROBE = "The quick brown fox, 3.14 + 27 = ?\n  Ärger über Öl; 東京 <b>x</b>"


def load_tokenizer(name: str) -> Any:
    """A fast Hugging Face tokenizer from a directory or a hub id.

    :raises UserError: when nothing loadable is found there.
    """
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise UserError(
            f"tokenizer {name!r} is neither a directory nor a hub id (owner/name). Prepare the "
            "data "
            "first (the synthetic recipe writes DIR/tokenizer) or set model.tokenizer."
        )
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # OSError, ValueError or a network error, by transformers version
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(f"tokenizer {name!r} cannot be loaded: {first_line}") from error


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Saves a tokenizer so that transformers 4.51 loads what 5.x wrote, too."""
    tokenizer.save_pretrained(directory)
    portable_tokenizer_config(directory)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary and the ids of a probe text: the same in every library version."""
    digest = hashlib.sha256()
    for token, index in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{index}\n".encode())
    digest.update(repr(tokenizer.encode(PROBE, add_special_tokens=False)).encode())
    return digest.hexdigest()


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of one piece of text, encoded alone and without special tokens."""
    return len(tokenizer.encode(text, add_special_tokens=False))
