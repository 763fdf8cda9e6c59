"""CasaProcessor: messages or rendered text -> token ids, insertion points, answer mask and images.

Images never become tokens: an image leaves an *insertion point*, the index of the text token it
stands before. Training and inference call the same `encode`, so they share template, tokenizer and
pixels. The rest is the interface that transformers' users expect of a processor.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from .chat_template import SLOTS, ChatTemplate, as_jinja, cut
from .image_processing_casa import MAX_PIXELS, CasaImageProcessor, ImageError, target_size
from .messages import Message, as_batch, frames_of, parts_of, runs, slots_of, text_of

# What special tokens look like in the templates of published models.
SPECIAL = re.compile(r"<\|[^|<>]+\|>|<｜[^<>]+｜>|</?s>|<(?:bos|eos|pad|unk)>|<[a-z]+(?:_[a-z]+)+>")


@dataclass
class Encoded:
    """One conversation as the model reads it.

    :param ids: (T,) token ids.
    :param points: for each image, the index of the token it stands before (0..T).
    :param answer: for each token, whether it belongs to an assistant's answer (its end included).
    :param images: what stood in the image slots, not loaded yet; None for an empty slot.
    :param follows: for each image, whether it is a frame of the same video as the image before it.
    """

    ids: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    follows: list[bool] = field(default_factory=list)

    def extend(self, ids: Sequence[int], answer: bool = False) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)


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

    :param tokenizer: a fast tokenizer.
    :param max_pixels: upper bound on the pixels of an image.
    :param template: `ChatTemplate` as a dict.
    :param image_size: when given, at most image_size * image_size pixels.
    :param chat_template: jinja to render with instead of the template's own.
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
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.max_pixels = image_size**2 if image_size is not None else max_pixels
        self.template = dict(template or {})
        self._template = ChatTemplate(**self.template)
        self._jinja = as_jinja(self._template)
        super().__init__(tokenizer, chat_template=chat_template or self._jinja, **kwargs)
        self._image_processor = CasaImageProcessor(self.max_pixels)
        self._check_template(self._template)
        # A text-only prompt of the tokenizer's own reads as the processor's.
        tokenizer.chat_template = self.chat_template
        self._ids = {name: self._encode(text) for name, text in asdict(self._template).items()}
        self.bos_tokens = self._ids["bos"]
        self.pre_image_tokens = self._ids["image_start"]
        self.post_image_tokens = self._ids["image_end"]
        self.asst_start_tokens = self._ids["assistant_start"]
        self.asst_end_tokens = self._ids["assistant_end"]

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
        bos: bool = True,
        continue_final: bool = False,
    ) -> Encoded:
        """One conversation as ids, insertion points and answer mask. Loads no image.

        :param messages: `{"role": "system" | "user" | "assistant", "content": ...}`; content is a
            string or a list of `{"type": "text", "text": ...}`, `{"type": "image", "image": ...}`
            (also under "url", "path" or "base64") and `{"type": "video", "video": [frame, ...]}`.
            Texts that touch are one text. Images in an answer are frames that arrive meanwhile.
        :param generation_prompt: open the assistant's turn if the last message is not its own.
        :param continue_final: leave the assistant's last message open, so that it goes on.
        :raises ValueError: unknown roles or parts.
        """
        out = Encoded()
        if bos:
            out.extend(self.bos_tokens)
        if not messages or messages[0].get("role") != "system":
            out.extend(self._default_system())
        for i, message in enumerate(messages):
            role = message.get("role")
            parts = parts_of(message, i)
            if role == "system":
                out.extend(self._ids["system_start"])
                out.extend(self._encode(text_of(parts, i)))
                out.extend(self._ids["system_end"])
            elif role == "user":
                out.extend(self._ids["user_start"])
                self._fill(out, runs(parts, i))
                out.extend(self._ids["user_end"])
            elif role == "assistant":
                out.extend(self.asst_start_tokens)
                self._fill(out, runs(parts, i), answer=True)
                if not (continue_final and i == len(messages) - 1):
                    out.extend(self.asst_end_tokens, answer=True)
            else:
                raise ValueError(
                    f"message {i} has role {role!r}; expected 'system', 'user' or 'assistant'"
                )
        if continue_final and (not messages or messages[-1].get("role") != "assistant"):
            raise ValueError("continue_final_message needs a last message of the assistant")
        if generation_prompt and messages and messages[-1].get("role") != "assistant":
            out.extend(self.asst_start_tokens)
        return out

    def text_tokens(self, user: Sequence[int], assistant: Sequence[int], images: int) -> int:
        """Tokens of a conversation from the token counts of its texts, as `encode` would make
        it.
        """
        ids = self._ids
        turn = ids["user_start"], ids["user_end"], self.asst_start_tokens, self.asst_end_tokens
        opening = len(self.bos_tokens) + len(self._default_system())
        fixed = opening + len(user) * sum(map(len, turn))
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
        conversations, _ = as_batch(messages)
        return self._batch(
            [self.encode(c, True, bos=not suppress_bos_token) for c in conversations]
        )

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        **options: Any,
    ) -> CasaBatch:
        """A batch from text as the chat template renders it.

        :param images: for the places `<image>` in the text: one image, a list over all texts, or a
            list for each text.
        :param text: one text or a list. `<image>` and `<video>` are places, never tokens; written
            `<\\image>` they are words.
        :param videos: for the places `<video>`: one list of frames, or a list of such lists.
        :param options: `return_tensors` ("pt" or None), `padding`, `max_length`.
        :raises ValueError: another number of places than of images or videos; unknown options.
        """
        if text is None:
            raise ValueError(
                "the processor needs text: pass text=..., or messages to apply_chat_template or "
                "tokenize_messages"
            )
        texts = [text] if isinstance(text, str) else list(text)
        pieces = [list(cut(self._template, t)) for t in texts]
        counts = {slot: [sum(kind == slot for kind, _ in p) for p in pieces] for slot in SLOTS}
        given = {
            "image": _distribute("image", _image_lists(images), counts["image"]),
            "video": _distribute("video", _video_lists(videos), counts["video"]),
        }
        encoded = []
        for row in pieces:
            out = Encoded()
            for kind, piece in row:
                if kind == "text":
                    out.extend(self._encode(piece))
                elif kind == "image":  # the text around it holds the pieces image_start, image_end
                    out.points.append(len(out.ids))
                    out.images.append(next(given["image"]))
                    out.follows.append(False)
                else:
                    self._place(out, frames_of(next(given["video"])))
            encoded.append(out)
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
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template=chat_template, tokenize=False, **rendered, **kwargs
            )
        tensors = None if return_tensors == "auto" else return_tensors
        options = {**kwargs, **(processor_kwargs or {}), "return_tensors": tensors}
        conversations, single = as_batch(conversation)
        if (chat_template or self.chat_template) == self._jinja:
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
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        # The library keeps the padding side only if it was given when the tokenizer was built.
        portable_tokenizer_config(save_directory, padding_side=self.tokenizer.padding_side)
        return saved

    def _batch(
        self,
        encoded: Sequence[Encoded],
        *,
        return_tensors: str | None = "pt",
        padding: bool | str | None = None,
        max_length: int | None = None,
        return_assistant_tokens_mask: bool = False,
        **options: Any,
    ) -> CasaBatch:
        """Encoded samples side by side, padded on the tokenizer's side.

        :param return_tensors: "pt" gives tensors and pads if needed; None lists of ids, padded only
            if `padding` says so.
        :param options: anything else must be None or False.
        """
        # The template holds the special tokens, and cutting a prompt could cut off its images.
        unknown = {k: v for k, v in options.items() if v is not None and v is not False}
        if unknown or return_tensors not in ("pt", None):
            found = unknown or {"return_tensors": return_tensors}
            raise ValueError(
                f"the processor does not take {found}; it takes return_tensors ('pt' or None), "
                "padding (True, False, 'longest' or 'max_length') and max_length"
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
        left = self.tokenizer.padding_side == "left"
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
            points.append([before + p for p in e.points])
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
            self.image_processor.load(image, None if isinstance(image, str) else f"image {i}")
            for i, image in enumerate(pictures)
        ]
        return CasaBatch(batch)

    def _fill(self, out: Encoded, parts: Iterator[tuple[str, Any]], answer: bool = False) -> None:
        """Appends texts and images; the tokens around an image are never an answer."""
        for kind, value in parts:
            if kind == "text":
                out.extend(self._encode(value), answer)
            else:
                self._place(out, value)

    def _place(self, out: Encoded, images: Sequence[Any]) -> None:
        """Appends images with the tokens around them; the second and later follow the first."""
        for i, image in enumerate(images):
            out.extend(self.pre_image_tokens)
            out.points.append(len(out.ids))
            out.images.append(image)
            out.follows.append(i > 0)
            out.extend(self.post_image_tokens)

    def _default_system(self) -> list[int]:
        ids = self._ids
        return ids["system_start"] + ids["system"] + ids["system_end"] if ids["system"] else []

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _check_template(self, chat: ChatTemplate) -> None:
        vocabulary = self.tokenizer.get_vocab() if self.tokenizer is not None else {}
        for name, text in asdict(chat).items():
            for token in SPECIAL.findall(text):
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
    many = isinstance(images, (list, tuple)) or (isinstance(images, Tensor) and images.ndim == 4)
    return list(images) if many else [images]


def _video_lists(videos: Any) -> list[Any]:
    if videos is None:
        return []
    many = isinstance(videos, (list, tuple)) and all(
        isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.ndim == 4) for v in videos
    )
    return list(videos) if many else [videos]


def _distribute(kind: str, given: list[Any], counts: list[int]) -> Iterator[Any]:
    """What is given, in the order of the places for it.

    :raises ValueError: another number of places than of things.
    """
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
