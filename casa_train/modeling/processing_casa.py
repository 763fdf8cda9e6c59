"""CasaProcessor: messages or rendered text -> token ids, insertion points, answer mask and images.

Images never become tokens: an image leaves an *insertion point*, the index of the text token it
stands before. Training, recipes and inference call the same `encode`, so they share template,
tokenizer and pixels. The rest is the interface that transformers' users expect of a processor.

The ids of a conversation are those that the tokenizer gives the whole rendered text, but that

- an answer begins at a token boundary, as generation makes it, and so does what stands around an
  image, what follows one, and an end of an answer that has no special token;
- special tokens that somebody typed are text, and those of the template are always their own.

Learned are an answer and the token that ends it; what follows that token is context.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .chat_template import SLOTS, ChatTemplate, RenderedText, as_jinja, is_jinja_of
from .image_processing_casa import MAX_PIXELS, CasaImageProcessor, square, target_size
from .image_sources import Bounded, ImageError
from .loading_options import split_options
from .messages import (
    Message,
    are_frames,
    as_batch,
    frames_of,
    in_order,
    parts_of,
    runs,
    slots_of,
    text_of,
)
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


class _Draft:
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


class CasaBatch(BatchFeature):
    """What the processor returns; `.to` also moves the lists of images."""

    def to(self, *args: Any, **kwargs: Any) -> CasaBatch:
        for name, value in list(self.items()):
            if isinstance(value, Tensor):
                # A dtype is for pixels: ids and masks stay integers.
                self[name] = _move(value, name == "pixel_values", *args, **kwargs)
            elif isinstance(value, list) and value and isinstance(value[0], Tensor):
                self[name] = [_move(v, name == "pixel_values", *args, **kwargs) for v in value]
        return self


class CasaProcessor(ProcessorMixin):
    """Tokenizer, chat template and image code of one model.

    Tokens may be added to `tokenizer` at any time; ids are the same before and after saving. In a
    message a plain added token is read wherever it is written; one added as special stays text
    there, as every special token does, and acts where text is given as rendered, in `__call__`.

    :param tokenizer: a fast tokenizer.
    :param max_pixels: upper bound on the pixels of an image.
    :param template: `ChatTemplate` as a dict.
    :param image_size: when given, at most image_size * image_size pixels, whatever `max_pixels` is.
    :param chat_template: jinja to render with instead of the template's own.
    :param min_pixels: smaller images are enlarged to so many pixels at least; 0: none.
    :raises ValueError: no fast tokenizer, a template with fields of another type, or bounds that no
        image can meet.
    """

    chat_template: str | None
    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        max_pixels: int = MAX_PIXELS,
        template: dict[str, Any] | None = None,
        image_size: int | None = None,
        chat_template: str | None = None,
        min_pixels: int = 0,
        **kwargs: Any,
    ) -> None:
        if image_size is not None:
            max_pixels = square(image_size, "image_size")
        self._image_processor = CasaImageProcessor(max_pixels, min_pixels)
        self._template = ChatTemplate(**(template or {}))
        self.template = asdict(self._template)
        self._take_in(tokenizer)
        if chat_template is None or is_jinja_of(self._template, chat_template):
            chat_template = self._jinja  # of the tokenizer's tokens as they are now
        super().__init__(tokenizer, chat_template=chat_template, **kwargs)
        # A text-only prompt of the tokenizer's own reads as the processor's.
        tokenizer.chat_template = self.chat_template
        self._start: list[int] | None = None  # what a caller has set in place of the template's
        self._end: list[int] | None = None

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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As the library's, but that every keyword acts, in every version of it, or is refused.

        :param kwargs: this class's own, among them `image_size`, `max_pixels` and `min_pixels` in
            place of what the directory says; a tokenizer's; and where files are.
        :raises ValueError: a keyword that would have no effect.
        """
        own, passed = split_options(kwargs)
        with_unused = passed.pop("return_unused_kwargs", False)  # transformers 5 fails over it
        processor = super().from_pretrained(pretrained_model_name_or_path, **passed)
        if own:
            processor = processor._changed(**own)
        return (processor, {}) if with_unused else processor

    def _changed(self, **own: Any) -> CasaProcessor:
        """The same with other arguments."""
        self._keep_up()
        size = own.pop("image_size", None)
        if size is not None:
            own["max_pixels"] = square(size, "image_size")
        if "max_pixels" in own and "min_pixels" not in own:
            own["min_pixels"] = self._image_processor.at_most(own["max_pixels"]).min_pixels
        same = {"tokenizer": self.tokenizer, "template": self.template}
        same |= {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        if self.chat_template != self._jinja:  # else it follows from the template
            same["chat_template"] = self.chat_template
        return type(self)(**{**same, **own})

    @property
    def max_pixels(self) -> int:
        """Upper bound on the pixels of an image; may be set, here or on the image processor."""
        return self._image_processor.max_pixels

    @max_pixels.setter
    def max_pixels(self, pixels: int) -> None:
        self._image_processor.max_pixels = pixels

    @property
    def min_pixels(self) -> int:
        """Lower bound; see `max_pixels`."""
        return self._image_processor.min_pixels

    @min_pixels.setter
    def min_pixels(self, pixels: int) -> None:
        self._image_processor.min_pixels = pixels

    def to_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the library's: what `save_pretrained` writes, with the bounds in force."""
        bounds = {"max_pixels": self.max_pixels, "min_pixels": self.min_pixels}
        return {**super().to_dict(*args, **kwargs), **bounds}

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

    @property
    def image_processor(self) -> CasaImageProcessor:
        return self._image_processor

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_embeds_insertion_points"]

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
        draft = _Draft()
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

    def tokenize_messages(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        suppress_bos_token: bool = False,
        end_answer: bool = False,
    ) -> CasaBatch:
        """A batch ready for `generate_from_image`.

        :param messages: one conversation, or a list of them.
        :param suppress_bos_token: the messages go on with a stream, whose last answer ended with an
            end token; see `encode`'s `continues` and `end_answer`.
        :return: `input_ids` and `attention_mask` (B, T); `image_embeds_insertion_points`, for each
            sample an int64 tensor of the columns of `input_ids` at which its images stand;
            `pixel_values`, a list of (3, H, W) uint8 tensors over all samples. Slots with image
            None have no pixels.
        """
        conversations, _ = as_batch(messages)
        return self._batch(
            [
                self.encode(
                    c,
                    generation_prompt=c[-1].get("role") != "assistant" if c else False,
                    continues=suppress_bos_token,
                    end_answer=end_answer,
                )
                for c in conversations
            ]
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Any,
    ) -> CasaBatch:
        """A batch from text as the chat template renders it. The text may stand first as well.

        :param images: for the places `<image>` in the text: one image, a list over all texts, or a
            list for each text, which may be None where a text has no place.
        :param text: one text or a list. `<image>` and `<video>` are places, never tokens; written
            `<\\image>` they are words.
        :param videos: for the places `<video>`: one list of frames, or a list of such lists.
        :param options: `return_tensors` ("pt" or None), `padding`, `padding_side`, `max_length`.
        :raises ValueError: another number of places than of images or videos; unknown options.
        """
        self._keep_up()
        images, text = in_order(images, text, self._holds_place)
        texts = [text] if isinstance(text, str) else list(text)
        pieces = [list(self._rendered.read(t)) for t in texts]
        counts = {slot: [sum(kind == slot for kind, _ in p) for p in pieces] for slot in SLOTS}
        given = {
            "image": _distribute("image", _image_lists(images), counts["image"]),
            "video": _distribute("video", _video_lists(videos), counts["video"]),
        }
        encoded = []
        for row in pieces:
            draft = _Draft()
            shown: int | None = None  # images of the answer that is open
            for kind, piece in row:
                if kind == "text":
                    draft.add([piece])
                elif kind == "special":
                    draft.add([self._text_ids.special[piece]])
                elif kind in ("answer", "turn"):
                    shown = 0 if kind == "answer" else None
                    if kind == "answer":
                        draft.cut()
                else:
                    image = next(given[kind])
                    frames = frames_of(image) if kind == "video" else [image]
                    # A bare place has nothing around it but what the text has there.
                    around = kind == "video" or bool(piece)
                    self._place(draft, frames, follows=bool(shown), around=around)
                    shown = None if shown is None else shown + len(frames)
            encoded.append(draft.encode(self._text_ids, start=True))
        return self._batch(encoded, **{"return_tensors": None, **options})

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's: conversations as text, as ids or, with `return_dict`, as a batch.

        With `tokenize`, messages go through `encode`, as in training, so no text of a user is
        taken for an image. A template of the caller's own is rendered and read back.

        :param processor_kwargs: options of `__call__`; given directly, they are taken as well.
        """
        rendered = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        if isinstance(conversation, str):
            as_batch(conversation)  # says what is expected
        self._keep_up()
        own = (chat_template or self.chat_template) == self._jinja
        if not tokenize:
            open_end = own and continue_final_message
            if open_end:
                # The library looks for the last message's words, which may stand quoted here.
                rendered["continue_final_message"] = False
            text = super().apply_chat_template(
                conversation, chat_template=chat_template, tokenize=False, **rendered, **kwargs
            )
            if not open_end:
                return text
            end = self._template.assistant_end
            if isinstance(text, str):
                return text.removesuffix(end)
            return [one.removesuffix(end) for one in text]
        tensors = None if return_tensors == "auto" else return_tensors
        options = {**kwargs, **(processor_kwargs or {}), "return_tensors": tensors}
        conversations, single = as_batch(conversation)
        if own:
            if add_generation_prompt and continue_final_message:
                raise ValueError("choose add_generation_prompt or continue_final_message, not both")
            encoded = [
                self.encode(c, add_generation_prompt, continue_final=continue_final_message)
                for c in conversations
            ]
            batch = self._batch(encoded, **options)
        else:
            text = super().apply_chat_template(
                conversations, chat_template=chat_template, tokenize=False, **rendered
            )
            slots = [[slots_of(c, kind) for kind in SLOTS] for c in conversations]
            images = [found for found, _ in slots]
            videos = [video for _, found in slots for video in found]
            batch = self(images=images, text=text, videos=videos, **options)
        if return_dict:
            return batch
        ids = batch["input_ids"]
        return ids[0] if single and isinstance(ids, list) else ids

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As the library's, in words that both transformers generations read."""
        self._keep_up()
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        # The library keeps the padding side only if it was given when the tokenizer was built.
        portable_tokenizer_config(save_directory, padding_side=self.tokenizer.padding_side)
        return saved

    def _holds_place(self, text: str) -> bool:
        return any(kind in SLOTS for kind, _ in self._rendered.read(text))

    def _batch(
        self,
        encoded: Sequence[Encoded],
        *,
        return_tensors: str | None = "pt",
        padding: bool | str | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
        return_assistant_tokens_mask: bool = False,
        **options: Any,
    ) -> CasaBatch:
        """Encoded samples side by side.

        :param return_tensors: "pt" gives tensors and pads if needed; None lists of ids, padded only
            if `padding` says so.
        :param padding_side: None: the tokenizer's.
        :param options: anything else must be None or False.
        """
        # The template holds the special tokens, and cutting a prompt could cut off its images.
        unknown = {k: v for k, v in options.items() if v is not None and v is not False}
        if unknown or return_tensors not in ("pt", None):
            found = unknown or {"return_tensors": return_tensors}
            raise ValueError(
                f"the processor does not take {found}; it takes return_tensors ('pt' or None), "
                "padding (True, False, 'longest' or 'max_length'), padding_side and max_length"
            )
        lengths = [len(e.ids) for e in encoded]
        width = max(lengths, default=0)
        if padding == "max_length":
            width = max(width, max_length or 0)
        elif padding not in (None, True, False, "longest"):
            raise ValueError(
                f"padding={padding!r}; expected True, False, 'longest' or 'max_length'"
            )
        pad_it = bool(padding) or (padding is None and return_tensors == "pt")
        if return_tensors == "pt" and not pad_it and len(set(lengths)) > 1:
            raise ValueError(
                f"padding=False, but the samples have {lengths} tokens: tensors need padding=True"
            )
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side={side!r}; expected 'left' or 'right'")
        left = side == "left"
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        ids, mask, answers, points = [], [], [], []
        for e, length in zip(encoded, lengths, strict=True):
            before, after = 0, width - length if pad_it else 0
            if left:
                before, after = after, before
            ids.append([pad] * before + e.ids + [pad] * after)
            mask.append([0] * before + [1] * length + [0] * after)
            answers.append([0] * before + [int(a) for a in e.answer] + [0] * after)
            points.append(torch.tensor([before + p for p in e.points], dtype=torch.long))
        rows = {"input_ids": ids, "attention_mask": mask}
        if return_assistant_tokens_mask:
            rows["assistant_masks"] = answers
        batch: dict[str, Any] = dict(rows)
        if return_tensors == "pt":
            batch = {name: torch.tensor(values, dtype=torch.long) for name, values in rows.items()}
        batch["image_embeds_insertion_points"] = points
        if any(f for e in encoded for f in e.follows):
            batch["image_follows"] = [e.follows for e in encoded]
        pictures = [image for e in encoded for image in e.images if image is not None]
        batch["pixel_values"] = [
            # A path or a URL names itself.
            self.image_processor.load(image, None if _names_itself(image) else f"image {i}")
            for i, image in enumerate(pictures)
        ]
        return CasaBatch(batch)

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

    def _end_answer(self, draft: _Draft) -> None:
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

    def _continue(self, draft: _Draft, end_answer: bool) -> None:
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
        draft: _Draft,
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
        draft: _Draft,
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


def _names_itself(image: Any) -> bool:
    return isinstance(image.image if isinstance(image, Bounded) else image, str)


def _move(value: Tensor, cast: bool, *args: Any, **kwargs: Any) -> Tensor:
    if not cast:
        args = tuple(a for a in args if not isinstance(a, torch.dtype))
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
    return value.to(*args, **kwargs) if args or kwargs else value


def portable_tokenizer_config(directory: str | os.PathLike[str], **values: str) -> None:
    """Rewrites what transformers 5 saves of a tokenizer in words that 4.51 knows and 5 reads.

    :param values: further entries.
    """
    path = os.path.join(directory, "tokenizer_config.json")
    with open(path, encoding="utf-8") as file:
        config = {**json.load(file), **values}
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name is new in 5.0
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(config, indent=2) + "\n")


def _image_lists(images: Any) -> list[Any]:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) or are_frames(images) else [images]


def _video_lists(videos: Any) -> list[Any]:
    if videos is None:
        return []
    if not isinstance(videos, (list, tuple)):
        return [videos]
    given = [v for v in videos if v is not None]  # a row without any may be None
    many = all(isinstance(v, (list, tuple)) or are_frames(v) for v in given)
    return given if many else [videos]


def _distribute(kind: str, given: list[Any], counts: list[int]) -> Iterator[Any]:
    """What is given, in the order of the places for it.

    :raises ValueError: another number of places than of things.
    """
    if kind == "image" and any(isinstance(g, (list, tuple)) for g in given):
        given = [[] if g is None else g for g in given]  # a row without any may be None
    elif all(g is None for g in given) and not sum(counts):
        given = []
    nested = kind == "image" and given and all(isinstance(g, (list, tuple)) for g in given)
    held = [len(g) for g in given] if nested else sum(1 for _ in given)
    expected: Any = counts if nested else sum(counts)
    if held != expected:
        raise ValueError(
            f"the text holds {expected} places for {kind}s ('<{kind}>'), given are {held}: write "
            f"one place for each {kind}, or pass messages to apply_chat_template"
        )
    return iter([x for g in given for x in g] if nested else given)


__all__ = [
    "CasaProcessor",
    "ChatTemplate",
    "Encoded",
    "ImageError",
    "portable_tokenizer_config",
    "target_size",
]
