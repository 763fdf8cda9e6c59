"""Rows of published datasets -> Sample. One function a schema; a row that cannot be used raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from casa_train.data.sample import ImageSlot, Sample, Turn

PLACEHOLDER = "<image>"


class BadRow(ValueError):
    """A row that holds no usable sample; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


def finevision(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> Sample:
    """FineVision (`HuggingFaceM4/FineVision`): columns `images`, `texts` [{user, assistant}],
    `source`.

    The images belong to the sample as a whole and stand before the first question. Where the user
    texts hold exactly one literal `<image>` for each image, the images stand at those places
    instead; any other number of placeholders is noise and is removed. Empty turns are dropped.

    :raises BadRow: without a source, or without a single non-empty turn.
    """
    source = row.get("source")
    if not isinstance(source, str) or not source:
        raise BadRow("no_source", f"column 'source' of sample {key} is {source!r}, expected a name")
    texts = row.get("texts")
    if not isinstance(texts, Sequence) or isinstance(texts, str):
        found = type(texts).__name__
        raise BadRow("no_texts", f"column 'texts' of sample {key} is {found}, expected a list")
    pairs = [(_text(t, "user"), _text(t, "assistant")) for t in texts if isinstance(t, Mapping)]
    literal = bool(images) and sum(user.count(PLACEHOLDER) for user, _ in pairs) == len(images)
    remaining = iter(range(len(images)))
    carried: list[ImageSlot] = [] if literal else [ImageSlot(i) for i in remaining]
    turns: list[Turn] = []
    for user, assistant in pairs:
        parts: list[str | ImageSlot] = []
        pieces = user.split(PLACEHOLDER) if literal else [user.replace(PLACEHOLDER, "")]
        for i, piece in enumerate(pieces):
            if i > 0:
                parts.append(ImageSlot(next(remaining)))
            if piece.strip():
                parts.append(piece.strip())
        if not assistant.strip() or not any(isinstance(part, str) for part in parts):
            # The turn goes, but its images do not shift: the next kept turn shows them.
            carried += [part for part in parts if isinstance(part, ImageSlot)]
            continue
        turns.append(Turn((*carried, *parts), assistant.strip()))
        carried = []
    if not turns:
        raise BadRow("no_turns", f"sample {key} has no turn with both a question and an answer")
    return Sample(key=key, source=source, turns=tuple(turns), images=tuple(images))


def _text(turn: Mapping[str, Any], field: str) -> str:
    value = turn.get(field)
    return value if isinstance(value, str) else ""


SCHEMAS: dict[str, Callable[[str, Mapping[str, Any], Sequence[bytes]], Sample]] = {
    "finevision": finevision,
}
