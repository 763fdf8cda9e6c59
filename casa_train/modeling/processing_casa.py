"""CasaProcessor: messages -> token ids, insertion points, answer mask and images.

Images never become tokens: an image leaves an *insertion point*, the index of the text token it
stands before. Training and inference call the same `encode`, so they share template, tokenizer and
pixels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .image_processing_casa import MAX_PIXELS, CasaImageProcessor, ImageError, target_size

Message = dict[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """The literal text around turns and images; each piece may hold special tokens.

    :param system: opens a conversation, after `bos`.
    :param image_start: before every image; `image_end` after it. The insertion point lies between.
    """

    bos: str = ""
    system: str = ""
    user_start: str = ""
    user_end: str = ""
    assistant_start: str = ""
    assistant_end: str = ""
    image_start: str = ""
    image_end: str = ""


@dataclass
class Encoded:
    """One conversation as the model reads it.

    :param ids: (T,) token ids.
    :param points: for each image, the index of the token it stands before (0..T).
    :param answer: for each token, whether it belongs to an assistant's answer (its end included).
    :param images: what stood in the image slots, not loaded yet; None for an empty slot.
    """

    ids: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)

    def extend(self, ids: Sequence[int], answer: bool = False) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)


class CasaBatch(BatchFeature):
    """What `tokenize_messages` returns; `.to` also moves the lists of images."""

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

    :param tokenizer: a fast tokenizer.
    :param max_pixels: upper bound on the pixels of an image.
    :param template: `ChatTemplate` as a dict.
    :param image_size: when given, at most image_size * image_size pixels.
    :raises ValueError: a special token of the template that the tokenizer does not have.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        max_pixels: int = MAX_PIXELS,
        template: dict[str, str] | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.max_pixels = image_size**2 if image_size is not None else max_pixels
        self.template = dict(template or {})
        super().__init__(tokenizer, **kwargs)
        self._image_processor = CasaImageProcessor(self.max_pixels)
        chat = ChatTemplate(**self.template)
        self._check_template(chat)
        self._ids = {name: self._encode(text) for name, text in asdict(chat).items()}
        self.bos_tokens = self._ids["bos"]
        self.pre_image_tokens = self._ids["image_start"]
        self.post_image_tokens = self._ids["image_end"]
        self.asst_start_tokens = self._ids["assistant_start"]
        self.asst_end_tokens = self._ids["assistant_end"]

    @property
    def image_processor(self) -> CasaImageProcessor:
        return self._image_processor

    def encode(
        self, messages: Sequence[Message], generation_prompt: bool = False, bos: bool = True
    ) -> Encoded:
        """One conversation as ids, insertion points and answer mask. Loads no image.

        :param messages: `{"role": "system" | "user" | "assistant", "content": ...}`; content is a
            string or a list of `{"type": "text", "text": ...}` and `{"type": "image", "image":
            ...}`.
        :param generation_prompt: open the assistant's turn if the last message is not its own.
        :raises ValueError: unknown roles or parts.
        """
        out = Encoded()
        if bos:
            out.extend(self.bos_tokens)
        if not messages or messages[0].get("role") != "system":
            out.extend(self._ids["system"])
        for i, message in enumerate(messages):
            role = message.get("role")
            parts = _parts(message, i)
            if role == "system":
                out.extend([t for part in parts for t in self._encode(_text_of(part, i))])
            elif role == "user":
                out.extend(self._ids["user_start"])
                for part in parts:
                    if part.get("type") == "image":
                        out.extend(self.pre_image_tokens)
                        out.points.append(len(out.ids))
                        out.images.append(part.get("image"))
                        out.extend(self.post_image_tokens)
                    else:
                        out.extend(self._encode(_text_of(part, i)))
                out.extend(self._ids["user_end"])
            elif role == "assistant":
                out.extend(self.asst_start_tokens)
                for part in parts:
                    out.extend(self._encode(_text_of(part, i)), answer=True)
                out.extend(self.asst_end_tokens, answer=True)
            else:
                raise ValueError(
                    f"message {i} has role {role!r}; expected 'system', 'user' or 'assistant'"
                )
        if generation_prompt and messages and messages[-1].get("role") != "assistant":
            out.extend(self.asst_start_tokens)
        return out

    def text_tokens(self, user: Sequence[int], assistant: Sequence[int], images: int) -> int:
        """Tokens of a conversation from the token counts of its texts, as `encode` would make
        it.
        """
        ids = self._ids
        turn = ids["user_start"], ids["user_end"], self.asst_start_tokens, self.asst_end_tokens
        fixed = len(self.bos_tokens) + len(ids["system"]) + len(user) * sum(map(len, turn))
        around = images * (len(self.pre_image_tokens) + len(self.post_image_tokens))
        return fixed + around + sum(user) + sum(assistant)

    def tokenize_messages(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        suppress_bos_token: bool = False,
    ) -> CasaBatch:
        """A batch ready for `generate_from_image`.

        :param messages: one conversation, or a list of them.
        :return: `input_ids` and `attention_mask` (B, T); `image_embeds_insertion_points`, for each
            sample the columns of `input_ids` at which its images stand; `pixel_values`, a list of
            (3, H, W) uint8 tensors over all samples. Slots with image None have no pixels.
        """
        conversations: list[Any] = list(messages)
        if conversations and isinstance(conversations[0], dict):
            conversations = [conversations]
        if not conversations:
            raise ValueError("tokenize_messages was given no conversation")
        encoded = [self.encode(c, True, bos=not suppress_bos_token) for c in conversations]
        width = max(len(e.ids) for e in encoded)
        left = self.tokenizer.padding_side == "left"
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = self.tokenizer.eos_token_id or 0
        ids = torch.full((len(encoded), width), pad, dtype=torch.long)
        mask = torch.zeros_like(ids)
        points = []
        for row, e in enumerate(encoded):
            start = width - len(e.ids) if left else 0
            ids[row, start : start + len(e.ids)] = torch.tensor(e.ids, dtype=torch.long)
            mask[row, start : start + len(e.ids)] = 1
            points.append([start + p for p in e.points])
        images = [
            self.image_processor.load(image)
            for e in encoded
            for image in e.images
            if image is not None
        ]
        return CasaBatch(
            {
                "input_ids": ids,
                "attention_mask": mask,
                "image_embeds_insertion_points": points,
                "pixel_values": images,
            }
        )

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _check_template(self, chat: ChatTemplate) -> None:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        for name, text in asdict(chat).items():
            for token in re.findall(r"<\|[^|<>]+\|>|<(?:start|end)_of_turn>|</?s>", text):
                if token not in vocabulary:
                    raise ValueError(
                        f"chat template field {name!r} uses the special token {token!r}, which the "
                        "tokenizer does not have: choose the template of this tokenizer or add it"
                    )


def _move(value: Tensor, cast: bool, *args: Any, **kwargs: Any) -> Tensor:
    if not cast:
        args = tuple(a for a in args if not isinstance(a, torch.dtype))
        kwargs = {k: v for k, v in kwargs.items() if k != "dtype"}
    return value.to(*args, **kwargs) if args or kwargs else value


def _parts(message: Message, i: int) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
        raise ValueError(
            f"message {i} has content of type {type(content).__name__}; expected a string or a "
            "list "
            "of {'type': 'text' | 'image', ...}"
        )
    return content


def _text_of(part: dict[str, Any], i: int) -> str:
    if part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise ValueError(
            f"message {i} holds the part {part!r}; expected {{'type': 'text', 'text': ...}}, or "
            "in a "
            "user's message {'type': 'image', 'image': ...}"
        )
    text: str = part["text"]
    return text


__all__ = ["CasaProcessor", "ChatTemplate", "Encoded", "ImageError", "target_size"]
