"""From what was said, with literal placeholders for images, to turns with image slots."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from casa_train.data.sample import RATINGS, Begin, ImageSlot, Part, Turn

PLACEHOLDER = "<image>"
USER_ROLES = ("user", "human")
ASSISTANT_ROLES = ("assistant", "gpt")


class BadRow(ValueError):
    """A row that holds no usable sample; `reason` is a short name that statistics count by."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class Said(NamedTuple):
    """A message before an answer; `role` is "system" or "user"."""

    role: str
    text: str


class Exchange(NamedTuple):
    """An answer, what was said before it, and its ratings, as a source has them.

    :param said: nothing where an answer follows the one before.
    """

    said: tuple[Said, ...]
    assistant: str
    ratings: tuple[int, ...] = (0,) * len(RATINGS)

    def count(self, placeholder: str) -> int:
        """How often users wrote a placeholder."""
        return sum(one.text.count(placeholder) for one in self.said if one.role == "user")

    def replace(self, old: str, new: str) -> Exchange:
        """The exchange with other words in what was said."""
        said = tuple(Said(one.role, one.text.replace(old, new)) for one in self.said)
        return self._replace(said=said)


def asked(user: str, assistant: str, ratings: tuple[int, ...] = (0,) * len(RATINGS)) -> Exchange:
    """A question and its answer."""
    return Exchange((Said("user", user),), assistant, ratings)


def build_turns(
    key: str, exchanges: Sequence[Exchange], images: int, repaired: set[str]
) -> tuple[Turn, ...]:
    """Turns that show each of `images` images exactly once.

    The images belong to the sample as a whole and stand before the first question. Where the
    questions hold exactly one literal `<image>` for each image, the images stand at those places
    instead; any other number of placeholders is noise and is removed, as are those in answers.
    Turns without question or answer are dropped.

    :param repaired: receives the names of what was put right.
    :raises BadRow: without a single non-empty turn.
    """
    placeholders = sum(exchange.count(PLACEHOLDER) for exchange in exchanges)
    literal = 0 < images == placeholders
    elsewhere = [e.assistant for e in exchanges]
    elsewhere += [said.text for e in exchanges for said in e.said if said.role != "user"]
    if (placeholders and not literal) or any(PLACEHOLDER in text for text in elsewhere):
        repaired.add("placeholder_removed")
    turns, left = _turns(exchanges, images, literal)
    if left and turns:  # they stood in an empty last turn
        turns, _ = _turns(exchanges, images, literal=False)
    if not turns:
        raise BadRow("no_turns", f"sample {key} has no turn with both a question and an answer")
    if len(turns) < len(exchanges):
        repaired.add("empty_turn_dropped")
    return tuple(turns)


def _turns(
    exchanges: Iterable[Exchange], images: int, literal: bool
) -> tuple[list[Turn], list[ImageSlot]]:
    """The non-empty turns, and the image slots that none of them shows."""
    remaining = iter(range(images))
    carried = [] if literal else [ImageSlot(i) for i in remaining]
    system: list[tuple[str, list[Part]]] = []  # of turns that were dropped
    turns: list[Turn] = []
    answered = False  # whether the answer before this one was kept
    for said, assistant, ratings in exchanges:
        messages = [
            *system,
            *((role, _parts(role, text, remaining, literal)) for role, text in said),
        ]
        users = [parts for role, parts in messages if role == "user"]
        asks = any(isinstance(part, str) for parts in users for part in parts)
        answer = assistant.replace(PLACEHOLDER, "").strip()
        answered = bool(answer) and (asks if users else answered)
        if not answered:
            # The turn goes, but its images do not shift: the next question shows them.
            carried += [p for parts in users for p in parts if isinstance(p, ImageSlot)]
            system = [message for message in messages if message[0] == "system"]
            continue
        if users:  # where somebody asks something, if there are several messages
            first = next((p for p in users if any(isinstance(x, str) for x in p)), users[0])
            first[:0] = carried
            carried = []
        turns.append(Turn(_joined(messages), answer, ratings))
        system = []
    return turns, carried


def _parts(role: str, text: str, images: Iterator[int], literal: bool) -> list[Part]:
    """A message's text, and in a user's the images that its placeholders stand for."""
    parts: list[Part] = []
    shows = literal and role == "user"
    for i, piece in enumerate(
        text.split(PLACEHOLDER) if shows else [text.replace(PLACEHOLDER, "")]
    ):
        if i > 0:
            parts.append(ImageSlot(next(images)))
        if piece.strip():
            parts.append(piece.strip())
    return parts


def _joined(messages: Sequence[tuple[str, list[Part]]]) -> tuple[Part, ...]:
    """Messages as the parts of one turn; empty ones are left out."""
    out: list[Part] = []
    for role, parts in messages:
        if parts and (out or role != "user"):
            out.append(Begin(role))
        out += parts
    return tuple(out)


def exchanges_of(key: str, conversations: Any, repaired: set[str]) -> list[Exchange]:
    """Exchanges of a list of messages: {role, content}, {from, value}, or both with nulls.

    Every message stays one of its own, also several of one side in a row.

    :param repaired: receives the names of what was put right.
    :raises BadRow: no list of messages, or an unknown role.
    """
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        found = type(conversations).__name__
        raise BadRow("no_turns", f"'conversations' of sample {key} is {found}, expected a list")
    exchanges: list[Exchange] = []
    said: list[Said] = []
    closed = False  # whether an empty answer followed what was said
    for message in conversations:
        if not isinstance(message, Mapping):
            repaired.add("empty_turn_dropped")
            continue
        role, text = _message(message)
        text = text.strip()
        asks = role in USER_ROLES
        if not (asks or role in ("system", "") or role in ASSISTANT_ROLES) or (text and not role):
            raise BadRow("unknown_role", f"sample {key} has a message from {role!r}")
        if not text:
            repaired.add("empty_turn_dropped")
            closed = closed or (role in ASSISTANT_ROLES and bool(said))
        elif asks or role == "system":
            if closed and asks:
                exchanges.append(Exchange(tuple(said), ""))
                said, closed = [], False
            said.append(Said("user" if asks else "system", text))
        elif exchanges or any(one.role == "user" for one in said):
            exchanges.append(Exchange(tuple(said), text))
            said, closed = [], False
        else:
            repaired.add("empty_turn_dropped")  # an answer to nothing
    if any(one.role == "user" for one in said):
        exchanges.append(Exchange(tuple(said), ""))
    return exchanges


def _message(message: Mapping[str, Any]) -> tuple[str, str]:
    """(role, text) of a message in either form; the form whose fields are filled counts."""
    for role_field, text_field in (("role", "content"), ("from", "value")):
        role, text = message.get(role_field), message.get(text_field)
        if isinstance(role, str) and isinstance(text, str):
            return role.strip().lower(), text
    role = message.get("role") or message.get("from")
    return (role.strip().lower() if isinstance(role, str) else ""), ""


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
