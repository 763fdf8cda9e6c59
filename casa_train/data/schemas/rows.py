"""Rows of published datasets -> Sample. One function a schema; a row that cannot be used raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from casa_train.data.sample import RATINGS, Sample
from casa_train.data.schemas.conversation import (
    PLACEHOLDER,
    BadRow,
    asked,
    build_turns,
    exchanges_of,
)
from casa_train.data.schemas.video_rows import live_whisperx, llava_video

__all__ = ["MODALITIES", "PLACEHOLDER", "SCHEMAS", "BadRow", "finevision", "llava_onevision"]


def finevision(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> Sample:
    """FineVision (`HuggingFaceM4/FineVision`): columns `images`, `texts` [{user, assistant}],
    `source`, and for each of `RATINGS` `{name}_ratings` (a number from 1 to 5 for each turn).

    Ratings that do not match the turns in number cannot be told apart and count as unrated.

    :raises BadRow: without a source, or without a single non-empty turn.
    """
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise BadRow("no_source", f"column 'source' of sample {key} is {source!r}, expected a name")
    texts = row.get("texts")
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        found = type(texts).__name__
        raise BadRow("no_texts", f"column 'texts' of sample {key} is {found}, expected a list")
    repaired: set[str] = set()
    ratings = [_ratings(row.get(f"{name}_ratings"), len(texts), repaired) for name in RATINGS]
    exchanges = [
        asked(_text(turn, "user"), _text(turn, "assistant"), tuple(rated))
        for turn, *rated in zip(texts, *ratings, strict=True)
    ]
    turns = build_turns(key, exchanges, len(images), repaired)
    return Sample(key, source, turns, tuple(images), repaired=tuple(sorted(repaired)))


def llava_onevision(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> Sample:
    """LLaVA-OneVision-1.5-Instruct: `id`, `image` (one, or null), `conversations` and
    `data_source`, which sometimes stands in a turn; a recipe adds `subset`, the fallback.

    :raises BadRow: no usable turn, no source, or a question about an image that is not there.
    """
    repaired: set[str] = set()
    conversations = row.get("conversations")
    exchanges = exchanges_of(key, conversations, repaired)
    if not images and any(exchange.count(PLACEHOLDER) for exchange in exchanges):
        raise BadRow("missing_image", f"sample {key} asks about an image, column 'image' is empty")
    source = row.get("data_source")
    if not isinstance(source, str) or not source:
        inner = [m.get("data_source") for m in conversations or () if isinstance(m, Mapping)]
        source = next((s for s in [*inner, row.get("subset")] if isinstance(s, str) and s), None)
        if source is None:
            raise BadRow("no_source", f"sample {key} has no 'data_source', in no turn either")
        repaired.add("source_from_elsewhere")
    turns = build_turns(key, exchanges, len(images), repaired)
    return Sample(key, source, turns, tuple(images), repaired=tuple(sorted(repaired)))


def _text(turn: Any, field: str) -> str:
    value = turn.get(field) if isinstance(turn, Mapping) else None
    return value if isinstance(value, str) else ""


def _ratings(values: Any, turns: int, repaired: set[str]) -> list[int]:
    """A rating for each turn, 0 where there is none."""
    if values is None:
        return [0] * turns
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != turns:
        repaired.add("ratings_ignored")
        return [0] * turns
    rated = [v if isinstance(v, int) and 1 <= v <= 5 else 0 for v in values]
    if any(v is not None and not r for v, r in zip(values, rated, strict=True)):
        repaired.add("ratings_ignored")
    return rated


SCHEMAS: dict[str, Callable[[str, Mapping[str, Any], Sequence[bytes]], Sample]] = {
    "finevision": finevision,
    "llava_onevision": llava_onevision,
    "llava_video": llava_video,
    "live_whisperx": live_whisperx,
}
MODALITIES = {
    "finevision": "image",
    "llava_onevision": "image",
    "llava_video": "video",
    "live_whisperx": "video",
}
"""Whether the images of a sample are images, or the frames of one video."""
