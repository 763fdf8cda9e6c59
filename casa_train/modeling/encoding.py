"""Conversation -> token ids, insertion points and answer mask, with the pieces of a chat template.

Images never become tokens: an image leaves an *insertion point*, the index of the text token it
stands before. Training, recipes and inference call the same `encode`.

The ids of a conversation are those that the tokenizer gives the whole rendered text, but that

- an answer begins at a token boundary, as generation makes it, and so does what stands around an
  image, what follows one, and an end of an answer that has no special token;
- special tokens that somebody typed are text, and those of the template are always their own.

Learned are an answer and the token that ends it; what follows that token is context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .chat_template import ChatTemplate, RenderedText, as_jinja
from .messages import Message, parts_of, runs, text_of
from .text_ids import Piece, TextIds


@dataclass
class Encoded:
    """One conversation as the model reads it.

    :param ids: (T,) token ids.
    :param points: for each image, the index of the token it stands before (0..T).
    :param answer: for each token, whether it is learned: an assistant's answer and the token that
        ends it.
    :param images: what stood in the image slots, not loaded yet; None for an empty slot.
    :param follows: for each image, whether it is a frame of the same video as the image before it.
    :param turn_ends: for each message of the assistant, the tokens up to its end, what the template
        puts behind it included.
    """

    ids: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    follows: list[bool] = field(default_factory=list)
    turn_ends: list[int] = field(default_factory=list)


class Draft:
    """A conversation on its way to ids: segments of text and special tokens, images between."""

    def __init__(self) -> None:
        self.segments: list[list[Piece]] = [[]]
        self.answer: list[bool] = [False]
        self.only_first: set[int] = set()  # segments of which the first token alone is learned
        self.images: list[tuple[int, Any, bool]] = []  # before which segment, image, follows
        self.turn_ends: list[int] = []  # segments up to there

    def add(self, pieces: Sequence[Piece]) -> None:
        self.segments[-1] += pieces

    def cut(self, answer: bool = False) -> None:
        """Begins a segment. :param answer: whether it is learned."""
        self.segments.append([])
        self.answer.append(answer)

    def first_alone(self) -> None:
        """Of the segment that was begun last, the first token alone is learned."""
        self.only_first.add(len(self.segments) - 1)

    def place(self, image: Any, follows: bool) -> None:
        """Puts an image before the segment that was begun last."""
        self.images.append((len(self.segments) - 1, image, follows))

    def end_turn(self) -> None:
        self.turn_ends.append(len(self.segments))
        self.cut()

    def encode(self, text_ids: TextIds, start: bool) -> Encoded:
        """:param start: whether this begins the whole text."""
        out = Encoded()
        starts = [0]
        segments = text_ids.encode(self.segments, start)
        for number, (ids, answer) in enumerate(zip(segments, self.answer, strict=True)):
            learned = min(len(ids), 1) if number in self.only_first else len(ids)
            out.ids += ids
            out.answer += [answer] * learned + [False] * (len(ids) - learned)
            starts.append(len(out.ids))
        out.points = [starts[segment] for segment, _, _ in self.images]
        out.images = [image for _, image, _ in self.images]
        out.follows = [follows for _, _, follows in self.images]
        out.turn_ends = [starts[segments] for segments in self.turn_ends]
        return out


class ConversationEncoder:
    """A chat template and a tokenizer; `CasaProcessor` is one.

    A subclass sets `tokenizer`, `chat_template` and `_template`, and calls `_take_in`.
    """

    tokenizer: Any
    chat_template: str | None
    _template: ChatTemplate
    # What a caller has set in place of the template's.
    _start: list[int] | None = None
    _end: list[int] | None = None

    def _take_in(self, tokenizer: Any) -> None:
        """Everything that follows from the template and the tokenizer's tokens."""
        pieces = self._template.pieces
        self._text_ids = TextIds(tokenizer, pieces.values())
        self._taken_in = _tokens_of(tokenizer)
        self._jinja = as_jinja(self._template, self._text_ids.special)
        self._rendered = RenderedText(self._template, list(self._text_ids.special))
        self._pieces = {name: self._text_ids.pieces(text) for name, text in pieces.items()}
        self.bos_tokens = self._alone("bos")
        self.pre_image_tokens = self._alone("image_start")
        self.post_image_tokens = self._alone("image_end")
        self._opening_tokens: int | None = None

    def _keep_up(self) -> None:
        """Takes in tokens that were added to the tokenizer since: a reload would know them."""
        if _tokens_of(self.tokenizer) == self._taken_in:
            return
        own = self.chat_template == self._jinja
        shared = self.tokenizer.chat_template == self.chat_template
        self._take_in(self.tokenizer)
        if own:
            self.chat_template = self._jinja
        if shared:
            self.tokenizer.chat_template = self.chat_template

    @property
    def asst_start_tokens(self) -> list[int]:
        """What opens an answer; a caller may set other ids, such as none to go on with one."""
        return self._alone("assistant_start") if self._start is None else self._start

    @asst_start_tokens.setter
    def asst_start_tokens(self, ids: Sequence[int]) -> None:
        self._start = None if list(ids) == self._alone("assistant_start") else list(ids)

    @property
    def asst_end_tokens(self) -> list[int]:
        """What closes an answer; may be set as well. See `answer_end_token`."""
        return self._alone("assistant_end") if self._end is None else self._end

    @asst_end_tokens.setter
    def asst_end_tokens(self, ids: Sequence[int]) -> None:
        self._end = None if list(ids) == self._alone("assistant_end") else list(ids)

    @property
    def answer_end_token(self) -> int | None:
        """The token that ends an answer, learned and generated; None where there is none."""
        _, token, _ = self._end_pieces()
        ids = [piece for piece in token if isinstance(piece, int)] or self.asst_end_tokens
        return next(iter(ids), None)

    def encode(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = False,
        continues: bool = False,
        continue_final: bool = False,
        end_answer: bool = False,
    ) -> Encoded:
        """One conversation as ids, insertion points and answer mask. Loads no image.

        :param messages: `{"role": "system" | "user" | "assistant", "content": ...}`; content is a
            string or a list of `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`
            (also under "url", "path", "base64" or "bytes") and
            `{"type": "video", "video": [frame, ...]}`. Images and videos may have "max_pixels" and
            "min_pixels" in place of the processor's. Texts that touch are one text. Images in an
            answer are frames that arrive meanwhile: all but the first follow the one before.
        :param generation_prompt: open an assistant's turn at the end.
        :param continues: the messages go on with a conversation whose answer ended with its first
            end token: neither bos nor a default system turn, but what the template has behind that
            token.
        :param continue_final: leave the assistant's last message open, so that it goes on.
        :param end_answer: with `continues`, that end token comes first: the answer was cut off.
            `generate_from_image` does not repeat one that is there.
        :raises ValueError: unknown roles, parts or keys of parts.
        """
        self._keep_up()
        draft = Draft()
        if continues:
            self._continue(draft, end_answer)
        else:
            draft.add(self._pieces["bos"])
            opens = not messages or messages[0].get("role") != "system"
            if opens and self._template.opens_with_system:
                for name in ("system_start", "system", "system_end"):
                    draft.add(self._pieces[name])
        for i, message in enumerate(messages):
            role = message.get("role")
            parts = parts_of(message, i)
            if role == "system":
                draft.add(self._pieces["system_start"])
                text = text_of(parts, i)
                draft.add([text.strip() if role in self._template.trim else text])
                draft.add(self._pieces["system_end"])
            elif role == "user":
                draft.add(self._pieces["user_start"])
                self._fill(draft, self._trimmed(role, runs(parts, i)))
                draft.add(self._pieces["user_end"])
            elif role == "assistant":
                draft.add(self._opening())
                draft.cut(answer=True)
                if self._start is None:
                    draft.add(self._pieces["answer_start"])
                # A caller who has taken the opening away goes on with the turn before.
                live = bool(continues and not i and self._start == [])
                self._fill(draft, self._trimmed(role, runs(parts, i)), answer=True, live=live)
                if not (continue_final and i == len(messages) - 1):
                    self._end_answer(draft)
                    draft.end_turn()
            else:
                raise ValueError(
                    f"message {i} has role {role!r}; expected 'system', 'user' or 'assistant'"
                )
        if continue_final and (not messages or messages[-1].get("role") != "assistant"):
            raise ValueError("continue_final_message needs a last message of the assistant")
        if generation_prompt and messages:
            draft.add(self._opening())
        return draft.encode(self._text_ids, start=not continues)

    def opening_tokens(self) -> int:
        """Tokens that a conversation without a system message has beyond its turns, each counted as
        `turn_tokens` counts it.
        """
        if self._opening_tokens is None:
            turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            one, two = self.encode(turn * 2).turn_ends
            self._opening_tokens = one - (two - one)
        return self._opening_tokens

    def turn_tokens(self, messages: Sequence[Message]) -> list[tuple[int, int]]:
        """For each message of the assistant, the tokens since the one before it.

        :return: (read, learned) tokens of each turn, without what stands around images. A first
            turn counts as if it followed another one; see `opening_tokens`.
        """
        encoded = self.encode(messages)
        before, after = len(self.pre_image_tokens), len(self.post_image_tokens)
        turns = []
        start = 0
        for number, end in enumerate(encoded.turn_ends):
            learned = sum(encoded.answer[start:end])
            shown = sum(start <= p - before and p + after <= end for p in encoded.points)
            read = end - start - learned - shown * (before + after)
            turns.append((read - (0 if number else self.opening_tokens()), learned))
            start = end
        return turns

    def holds_special(self, text: str) -> bool:
        """Whether a text spells a special token, which it will not become."""
        self._keep_up()
        return self._text_ids.holds_special(text)

    def _opening(self) -> list[Piece]:
        return self._pieces["assistant_start"] if self._start is None else list(self._start)

    def _end_pieces(self) -> tuple[list[Piece], list[Piece], list[Piece]]:
        """The end of an answer: text before its token, that token, what follows it.

        The token is the first special one; an end without any has its text as the third.
        """
        pieces: list[Piece] = [*(self._pieces["assistant_end"] if self._end is None else self._end)]
        at = next((i for i, piece in enumerate(pieces) if isinstance(piece, int)), None)
        if at is None:
            return [], [], pieces
        return pieces[:at], pieces[at : at + 1], pieces[at + 1 :]

    def _end_answer(self, draft: Draft) -> None:
        """Appends the end of an answer, which is learned as far as its token, inclusive."""
        before, token, rest = self._end_pieces()
        draft.add(before)
        draft.cut(answer=True)
        if token:
            draft.add(token)
            draft.cut()
        else:  # of plain text: its first token
            draft.first_alone()
        draft.add(rest)

    def _continue(self, draft: Draft, end_answer: bool) -> None:
        """Appends what follows the token that ended the answer before."""
        _, token, rest = self._end_pieces()
        if token:
            draft.add([*(token if end_answer else []), *rest])
        else:
            ids = self.asst_end_tokens
            draft.add(ids[0 if end_answer else 1 :])
        draft.cut()

    def _trimmed(self, role: str, parts: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        if role not in self._template.trim:
            return parts
        found = list(parts)
        if found and found[0][0] == "text":
            found[0] = ("text", found[0][1].lstrip())
        if found and found[-1][0] == "text":
            found[-1] = ("text", found[-1][1].rstrip())
        return iter(found)

    def _fill(
        self,
        draft: Draft,
        parts: Iterator[tuple[str, Any]],
        answer: bool = False,
        live: bool = False,
    ) -> None:
        """Appends texts and images; the tokens around an image are never learned.

        :param live: images of an answer follow those of the turns before.
        """
        for kind, value in parts:
            if kind == "text":
                draft.add([value])
            else:
                self._place(draft, value, live, answer=answer)
                live = answer  # frames that arrive during an answer are one video

    def _place(
        self,
        draft: Draft,
        images: Sequence[Any],
        follows: bool,
        answer: bool = False,
        around: bool = True,
    ) -> None:
        """Appends images with the tokens around them; the second and later follow the first.

        :param answer: whether what comes behind them is learned.
        """
        for i, image in enumerate(images):
            draft.cut()
            if around:
                draft.add(self.pre_image_tokens)
                draft.cut()
            draft.place(image, follows or i > 0)
            if around:
                draft.add(self.post_image_tokens)
        draft.cut(answer)

    def _alone(self, name: str) -> list[int]:
        """Ids of a piece of the template by itself."""
        return self._text_ids.encode([self._pieces[name]], start=False)[0]


def _tokens_of(tokenizer: Any) -> tuple[Any, ...]:
    """What tells that tokens were added or renamed; the whole vocabulary would take too long."""
    return tokenizer.added_tokens_decoder, tokenizer.all_special_ids
