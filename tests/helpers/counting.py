"""Lengths of samples for tests that write shards: fake ones, and those that training finds."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from casa_train.data.prepared.shard_writer import ShardWriter
from casa_train.data.sample import Part, Sample
from casa_train.data.tokens import TurnCounter, TurnTokens
from casa_train.modeling.processing_casa import CasaProcessor

FINGERPRINTS = {"tokenizer_fingerprint": "t", "turns_fingerprint": "u"}


def texts_by(count: Callable[[str], int]) -> Callable[[Sample], TurnTokens]:
    """Counts the texts of a turn one by one, without a chat template."""

    def length(parts: tuple[Part, ...]) -> int:
        return sum(count(part) for part in parts if isinstance(part, str))

    def turn_tokens(sample: Sample) -> TurnTokens:
        user = [length(turn.user) for turn in sample.turns]
        return TurnTokens(user, [length(turn.answer) for turn in sample.turns], special=False)

    return turn_tokens


def talk(number: int) -> dict[str, Any]:
    """A row of LLaVA-OneVision with messages of one side in a row and system prompts anywhere."""
    draw = random.Random(number)
    messages: list[dict[str, str]] = []

    def log(role: str, text: str) -> None:
        messages.append({"role": role, "content": f"{text} {number} " + "so " * draw.randint(0, 9)})

    for turn in range(draw.randint(1, 4)):
        if draw.random() < 0.4:
            log("system", "Be brief.")
        for _ in range(draw.randint(0, 2)):
            log("user", "well")
        log("user", "<image>what is this?" if turn == 0 else "and now?")
        for _ in range(draw.randint(1, 3)):
            log("assistant", "a red square")
    return {"conversations": messages, "data_source": "talk"}


def write_talks(directory: Path, processor: CasaProcessor, samples: int = 20) -> Path:
    """A split of such rows, with an image each."""
    writer = writer_for(processor, directory, "llava_onevision", per_shard=7)
    for i in range(samples):
        buffer = io.BytesIO()
        Image.new("RGB", (30 + 9 * i, 60), "teal").save(buffer, "PNG")
        assert writer.write(f"k-{i}", talk(i), [buffer.getvalue()])
    writer.close()
    return directory


def writer_for(
    processor: CasaProcessor, directory: Path, schema: str = "finevision", per_shard: int = 2000
) -> ShardWriter:
    """Writes a split that this processor may train on."""
    counter = TurnCounter(processor)
    return ShardWriter(directory, schema, counter, counter.fingerprints, per_shard)
