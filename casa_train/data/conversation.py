"""From question and answer pairs with literal placeholders to turns with image slots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from casa_train.data.sample import RATINGS, ImageSlot, Part, Turn

PLACEHOLDER = "<image>"
USER_ROLES = ("user", "human")
ASSISTANT_ROLES = ("assistant", "gpt")


class BadRow(ValueError):
    """A row that holds no usable sample; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Exchange(NamedTuple):
    """A question, its answer and its ratings, as a source has them."""

    user: str
    assistant: str
    ratings: tuple[int, ...] = (0,) * len(RATINGS)


def build_turns(
    key: str, exchanges: Sequence[Exchange], images: int, mended: set[str]
) -> tuple[Turn, ...]:
    """Turns that show each of `images` images exactly once.

    The images belong to the sample as a whole and stand before the first question. Where the
    questions hold exactly one literal `<image>` for each image, the images stand at those places
    instead; any other number of placeholders is noise and is removed, as are those in answers.
    Turns without question or answer are dropped.

    :param mended: receives the names of what was put right.
    :raises BadRow: without a single non-empty turn.
    """
    placeholders = sum(exchange.user.count(PLACEHOLDER) for exchange in exchanges)
    literal = 0 < images == placeholders
    if (placeholders and not literal) or any(PLACEHOLDER in e.assistant for e in exchanges):
        mended.add("placeholder_removed")
    turns, left = _turns(exchanges, images, literal)
    if left and turns:  # they stood in an empty last turn
        turns, _ = _turns(exchanges, images, literal=False)
    if not turns:
        raise BadRow("no_turns", f"sample {key} has no turn with both a question and an answer")
    if len(turns) < len(exchanges):
        mended.add("empty_turn_dropped")
    return tuple(turns)


def _turns(
    exchanges: Iterable[Exchange], images: int, literal: bool
) -> tuple[list[Turn], list[ImageSlot]]:
    """The non-empty turns, and the image slots that none of them shows."""
    remaining = iter(range(images))
    carried = [] if literal else [ImageSlot(i) for i in remaining]
    turns: list[Turn] = []
    for user, assistant, ratings in exchanges:
        parts: list[Part] = []
        pieces = user.split(PLACEHOLDER) if literal else [user.replace(PLACEHOLDER, "")]
        for i, piece in enumerate(pieces):
            if i > 0:
                parts.append(ImageSlot(next(remaining)))
            if piece.strip():
                parts.append(piece.strip())
        answer = assistant.replace(PLACEHOLDER, "").strip()
        if not answer or not any(isinstance(part, str) for part in parts):
            # The turn goes, but its images do not shift: the next kept turn shows them.
            carried += [part for part in parts if isinstance(part, ImageSlot)]
            continue
        turns.append(Turn((*carried, *parts), answer, ratings))
        carried = []
    return turns, carried


def exchanges_of(key: str, conversations: Any, mended: set[str]) -> list[Exchange]:
    """Exchanges of a list of messages: {role, content}, {from, value}, or both with nulls.

    Messages of one side in a row are joined, a system prompt goes in front of the first question.

    :param mended: receives the names of what was put right.
    :raises BadRow: no list of messages, or an unknown role.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        found = type(conversations).__name__
        raise BadRow("no_turns", f"'conversations' of sample {key} is {found}, expected a list")
    exchanges: list[tuple[list[str], list[str]]] = []
    for message in conversations:
        if not isinstance(message, Mapping):
            mended.add("empty_turn_dropped")
            continue
        role, text = _message(message)
        if not role and not text:
            mended.add("empty_turn_dropped")
        elif role == "system" or role in USER_ROLES:
            if not exchanges or exchanges[-1][1]:
                exchanges.append(([], []))
            elif exchanges[-1][0] and role != "system":
                mended.add("messages_joined")
            exchanges[-1][0].append(text)
        elif role in ASSISTANT_ROLES:
            if not exchanges:
                mended.add("empty_turn_dropped")  # an answer to nothing
                continue
            if exchanges[-1][1]:
                mended.add("messages_joined")
            exchanges[-1][1].append(text)
        else:
            raise BadRow("unknown_role", f"sample {key} has a message from {role!r}")
    return [Exchange(_join(user), _join(assistant)) for user, assistant in exchanges]


def _message(message: Mapping[str, Any]) -> tuple[str, str]:
    """(role, text) of a message in either form; the form whose fields are filled counts."""
    for role_field, text_field in (("role", "content"), ("from", "value")):
        role, text = message.get(role_field), message.get(text_field)
        if isinstance(role, str) and isinstance(text, str):
            return role.strip().lower(), text
    role = message.get("role") or message.get("from")
    return (role.strip().lower() if isinstance(role, str) else ""), ""


def _join(texts: list[str]) -> str:
    return "\n".join(text.strip() for text in texts if text.strip())


def safe_path(key: str, value: Any) -> str:
    """A path inside a dataset, normalised.

    :raises BadRow: no text, an absolute path, or one that leaves the dataset.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRow("no_video", f"sample {key} names no video: found {value!r}")
    path = PurePosixPath(value.strip())
    outside = path.is_absolute() or ".." in path.parts or "\\" in value or "\0" in value
    if outside or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value):
        raise BadRow("unsafe_path", f"sample {key} names {value!r}, which is outside the dataset")
    return str(path)
