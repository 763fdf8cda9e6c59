"""Counting and fingerprinting tokens, so that an index and a training run agree on lengths."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from casa_train.data.sample import Sample
from casa_train.data.schemas.conversation import BadRow
from casa_train.errors import UserError
from casa_train.io.caches import unwritable_cache
from casa_train.io.files import EXPORT_MARKER
from casa_train.modeling.processing_casa import (
    CasaProcessor,
    ChatTemplate,
    portable_tokenizer_config,
)

PROBE = "The quick brown fox, 3.14 + 27 = ?\n  Ärger über Öl; 東京 <b>x</b>"


def load_tokenizer(name: str, plain: bool = False) -> Any:
    """A fast Hugging Face tokenizer from a directory or a hub id.

    :param plain: whether code that config.json names for a model is none of the tokenizer's.
    :raises UserError: when nothing loadable is found there.
    """
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise UserError(
            f"tokenizer {name!r} is neither a directory nor a hub id (owner/name). Prepare the "
            "data first (the synthetic recipe writes DIR/tokenizer) or set model.tokenizer."
        )
    # Left unsaid, transformers would ask whether to run code, and wait, on every rank. An export's
    # tokenizer is a plain one: its config.json only names the model's code, which every rank would
    # copy into the same cache and import for nothing.
    plain = plain or (Path(name) / EXPORT_MARKER).is_file()
    known = {"config": PretrainedConfig()} if plain else {}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **known)
    except Exception as error:  # OSError, ValueError or a network error, by transformers version
        if "trust_remote_code" in str(error):
            raise UserError(
                f"tokenizer {name!r} comes with code of its own, which is not run; expected a "
                "tokenizer that needs none. Copy its tokenizer.json and tokenizer_config.json, "
                "without entries auto_map, into a directory and name that."
            ) from error
        if cache := unwritable_cache(error):
            raise UserError(f"tokenizer {name!r} cannot be loaded: {cache}") from error
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if not Path(name).exists():  # a relative path looks like owner/name
            first_line = (
                f"there is no such directory in {Path.cwd()}, and as a hub id: {first_line} "
                "Prepare the data first (the synthetic recipe writes DIR/tokenizer) or set "
                "model.tokenizer."
            )
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


def turns_fingerprint(processor: CasaProcessor) -> str:
    """sha256 over the ids of probe turns: the same where every turn has the same number of tokens.

    What opens a conversation is left out, since it is counted when a run starts; but by how much a
    system turn of its own makes a conversation longer is part of it.
    """
    digest = hashlib.sha256()
    image: dict[str, Any] = {"type": "image", "image": None}
    for words in ("probe", " \n" + PROBE + " \n"):
        text = {"type": "text", "text": words}
        for asked in ([text], [image, text], [text, image, image, text]):
            turn: list[dict[str, Any]] = [
                {"role": "system", "content": words},
                {"role": "user", "content": asked},
                {"role": "assistant", "content": words},
            ]
            for messages in (turn, turn[1:]):
                encoded = processor.encode(messages * 2)
                ids = encoded.ids[slice(*encoded.turn_ends)]
                digest.update(repr((ids, sum(encoded.answer))).encode())
            own, default = (processor.encode(m).turn_ends[0] for m in (turn, turn[1:]))
            digest.update(repr(own - default).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class TurnTokens:
    """The length of a conversation.

    :param user: for each turn what it has beside its answer and what stands around images: text,
        and the template's share; :param assistant: its answer and the end token.
    :param special: whether a text spells a special token.
    :param captions: of a live sample for each frame the text tokens behind it, up to the next one
        or the end of the turn; empty of every other sample.
    """

    user: list[int]
    assistant: list[int]
    special: bool
    captions: list[int] = field(default_factory=list)


class TurnCounter:
    """Counts the tokens of samples as training encodes them.

    :ivar fingerprints: what identifies the counts, for the meta file of a split; the template's
        fields are there for readers.
    """

    def __init__(self, processor: CasaProcessor) -> None:
        self.processor = processor
        self.fingerprints = {
            "tokenizer_fingerprint": tokenizer_fingerprint(processor.tokenizer),
            "turns_fingerprint": turns_fingerprint(processor),
            "template": json.dumps(ChatTemplate(**processor.template).given()),
        }

    @classmethod
    def open(cls, tokenizer: str, template: Mapping[str, Any]) -> TurnCounter:
        """:param template: the fields of a `ChatTemplate`."""
        return cls(CasaProcessor(load_tokenizer(tokenizer), template=dict(template)))

    def __call__(self, sample: Sample) -> TurnTokens:
        """:raises BadRow: a text that the tokenizer refuses."""
        try:
            turns = self.processor.turn_tokens(sample.messages())
            captions = self._captions(sample) if sample.is_live else []
        except (UnicodeError, TypeError) as error:  # half of a surrogate pair, by tokenizer
            detail = f"sample {sample.key} cannot be tokenized: {error}"
            raise BadRow("bad_text", detail) from error
        texts = (p for t in sample.turns for p in (*t.user, *t.answer) if isinstance(p, str))
        return TurnTokens(
            [read for read, _ in turns],
            [learned for _, learned in turns],
            any(self.processor.holds_special(text) for text in texts),
            captions,
        )

    def _captions(self, sample: Sample) -> list[int]:
        """Text tokens behind each frame. A frame's text begins at a token boundary, so they do not
        depend on what follows: a cut behind a frame leaves the tokens before it as they are.
        """
        encoded = self.processor.encode(sample.messages())
        before, after = len(self.processor.pre_image_tokens), len(self.processor.post_image_tokens)
        starts = [point + after for point in encoded.points]
        ends = [*(point - before for point in encoded.points[1:]), encoded.turn_ends[-1]]
        return [end - start for start, end in zip(starts, ends, strict=True)]
