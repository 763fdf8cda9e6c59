"""Lengths of samples for tests that write shards: fake ones, and those that training finds."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from casa_train.data.budget import Budget
from casa_train.data.fit import NEVER, Fit
from casa_train.data.prepared.shard_writer import Count, Shard, finish_split, finished_shard
from casa_train.data.prepared.shards import Split
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


class ShardWriter:
    """Writes the rows of one split, one after the other, as shards; `close` makes the index.

    In a directory where an unfinished writer was ended, it goes on after the last finished shard.

    :ivar consumed: rows given to `write` that the finished shards cover; skip as many.
    :param count: the tokens of a sample; `tokens.TurnCounter`.
    :param fingerprints: of what counts; training refuses others.
    """

    def __init__(
        self,
        directory: Path,
        schema: str,
        count: Count,
        fingerprints: Mapping[str, str],
        samples_per_shard: int = 2000,
    ) -> None:
        self.directory, self.schema = directory, schema
        self.count, self.fingerprints = count, fingerprints
        self.samples_per_shard = samples_per_shard
        self._skipped: Counter[str] = Counter()
        self.consumed = number = 0
        while (shard := finished_shard(directory, number)) is not None:
            self.consumed = int(shard["consumed"]["rows"])
            self._skipped.update(shard["skipped"])
            number += 1
        self._seen = self.consumed
        self._shard = Shard(directory, number, schema, count)

    @property
    def skipped(self) -> Counter[str]:
        """Rows that could not be used, by reason."""
        return self._skipped + self._shard.skipped

    def write(self, key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> bool:
        """Adds one row; see `Shard.write`."""
        self._seen += 1
        written = self._shard.write(key, row, images)
        if len(self._shard) >= self.samples_per_shard:
            self._next_shard()
        return written

    def close(self) -> int:
        """Finishes the last shard, writes index and meta; returns the number of samples."""
        self._next_shard()
        meta = finish_split(self.directory, self._shard.number, self.schema, self.fingerprints)
        return int(meta["samples"])

    def _next_shard(self) -> None:
        self._shard.finish({"rows": self._seen})
        self._skipped.update(self._shard.skipped)
        self._shard = Shard(self.directory, self._shard.number + 1, self.schema, self.count)


def sample_lengths(split: Split, processor: CasaProcessor) -> tuple[np.ndarray, np.ndarray]:
    """Text and image tokens of every whole sample of a split, two (samples,) int32 arrays."""
    text, images, _ = Fit(split, processor, Budget(NEVER, NEVER)).lengths()
    return text, images


def writer_for(
    processor: CasaProcessor, directory: Path, schema: str = "finevision", per_shard: int = 2000
) -> ShardWriter:
    """Writes a split that this processor may train on."""
    counter = TurnCounter(processor)
    return ShardWriter(directory, schema, counter, counter.fingerprints, per_shard)
