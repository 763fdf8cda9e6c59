"""Messages of a conversation, in the forms that transformers' users write them.

A message is `{"role": ..., "content": ...}`; its content is a string or a list of parts such as
`{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and
`{"type": "video", "video": [frame, ...]}`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .image_sources import Bounded

# What a part may hold beside its type; a table of parts has a column for each, mostly empty.
IMAGES = ("image", "image_url", "url", "bytes", "path", "base64")
BOUNDS = ("max_pixels", "min_pixels")
KEYS = {
    "text": ("text",),
    "image": (*IMAGES, *BOUNDS),
    "image_url": (*IMAGES, *BOUNDS),
    "video": ("video", *BOUNDS),
}
ROWS = ("index",)  # which image of its row a part of a published data set means: the next one

Message = dict[str, Any]


def as_batch(messages: Any) -> tuple[list[Any], bool]:
    """Conversations, and whether only one was given.

    :raises ValueError: something else, or none.
    """
    if not _is_list(messages):
        raise _no_messages(messages)
    conversations = list(messages)
    if not conversations:
        raise ValueError("no conversation was given")
    single = isinstance(conversations[0], dict)
    conversations = [conversations] if single else conversations
    for conversation in conversations:
        if not _is_list(conversation) or not all(isinstance(m, dict) for m in conversation):
            raise _no_messages(conversation)
    return conversations, single


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, (str, bytes, dict))


def _no_messages(given: Any) -> ValueError:
    return ValueError(
        f"found is {given!r:.80} of type {type(given).__name__}; expected messages: a list of "
        "{'role': ..., 'content': ...}, or a list of such lists"
    )


def unshared(messages: Any) -> Any:
    """The same messages in lists and dicts of their own; what these hold is shared."""
    if isinstance(messages, dict):
        return {name: unshared(value) for name, value in messages.items()}
    if isinstance(messages, (list, tuple)):
        return [unshared(value) for value in messages]
    return messages


def parts_of(message: Message, i: int) -> list[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(p, dict) for p in content):
        raise ValueError(
            f"message {i} has content of type {type(content).__name__}; expected a string or a "
            "list of {'type': 'text' | 'image' | 'video', ...}"
        )
    return content


def runs(parts: list[dict[str, Any]], i: int) -> Iterator[tuple[str, Any]]:
    """("text", text), with texts that touch joined, and ("image" or "video", its images)."""
    text = ""
    for part in parts:
        kind = part.get("type")
        if kind in tuple(KEYS):  # whatever it is
            _check_keys(part, i)
        if kind in ("image", "image_url", "video"):
            if text:
                yield "text", text
            text = ""
            images = frames_of(part.get("video")) if kind == "video" else [_image_of(part)]
            yield kind, _bounded(images, part)
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError(
                f"message {i} holds the part {part!r:.100}; expected {{'type': 'text', 'text': "
                "...}, or for user and assistant {'type': 'image', 'image': ...} or "
                "{'type': 'video', 'video': [frame, ...]}"
            )
    if text:
        yield "text", text


def text_of(parts: list[dict[str, Any]], i: int) -> str:
    for part in parts:
        if part.get("type") != "text":
            raise ValueError(
                f"message {i} holds the part {part!r:.100}; images and videos belong into messages "
                "of user and assistant, others hold {'type': 'text', 'text': ...} only"
            )
    return "".join(text for _, text in runs(parts, i))


def slots_of(messages: Sequence[Message], kind: str) -> list[Any]:
    """The images of a conversation, or its videos (lists of frames), in order."""
    found = [run for i, m in enumerate(messages) for run in runs(parts_of(m, i), i)]
    if kind == "video":
        return [frames for name, frames in found if name == "video"]
    return [images[0] for name, images in found if name in ("image", "image_url")]


def _check_keys(part: dict[str, Any], i: int) -> None:
    """:raises ValueError: a part with something that would have no effect."""
    kind = part["type"]
    unknown = {
        name: value
        for name, value in part.items()
        if name not in ("type", *KEYS[kind], *ROWS) and not _is_empty(value)
    }
    if unknown:
        found = ", ".join(f"{name}={value!r:.40}" for name, value in unknown.items())
        sizes = "" if kind == "text" else "; max_pixels and min_pixels bound its size"
        raise ValueError(
            f"message {i} holds a part of type {kind!r} with {found}, which would have no effect; "
            f"expected {', '.join(KEYS[kind])}{sizes}"
        )


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, list, tuple, dict)) and not value)


def _bounded(images: list[Any], part: dict[str, Any]) -> list[Any]:
    """The images with the bounds that their part sets."""
    bounds = {name: part[name] for name in BOUNDS if part.get(name) is not None}
    if not bounds:
        return images
    return [None if image is None else Bounded(image, **bounds) for image in images]


def _image_of(part: dict[str, Any]) -> Any:
    """What stands in an image slot, under any of the names that transformers' messages use."""
    if part.get("type") == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, dict) else value
    for name in ("image", "url", "bytes", "path"):
        if part.get(name) is not None:
            return part[name]
    encoded = part.get("base64")
    if isinstance(encoded, str) and not encoded.startswith("data:"):
        return f"data:;base64,{encoded}"
    return encoded


def frames_of(video: Any) -> list[Any]:
    if not (isinstance(video, (list, tuple)) or are_frames(video)) or len(video) == 0:
        raise ValueError(
            f"a video is {type(video).__name__}; expected a list of frames (whatever an image may "
            "be) or an array or tensor (F, H, W, 3) or (F, 3, H, W): "
            "video files are not decoded here"
        )
    return list(video)


def are_frames(images: Any) -> bool:
    """Whether this is an array or a tensor of several images."""
    return isinstance(images, np.ndarray | Tensor) and images.ndim == 4


def in_order(images: Any, text: Any, holds_place: Callable[[str], bool]) -> tuple[Any, Any]:
    """Images and text of a call, whichever stood first: users of both orders exist.

    :param holds_place: whether a text has a place for an image or a video.
    :raises ValueError: no text, or one that is none.
    """
    if _is_text(images):
        first, second = (_any_place(given, holds_place) for given in (images, text))
        swapped = not _is_text(text) if text is not None else first
        if swapped or (first and not second):  # of two texts, the one with a place for the other
            images, text = text, images
    if text is None:
        found = f"given is {images!r:.80} as images alone: " if _is_text(images) else ""
        raise ValueError(
            f"the processor needs text: {found}pass text=..., or messages to apply_chat_template "
            "or tokenize_messages"
        )
    if not _is_text(text) and text != []:
        raise ValueError(f"text is {type(text).__name__}; expected a string or a list of strings")
    return images, text


def _is_text(given: Any) -> bool:
    if isinstance(given, (list, tuple)):
        return bool(given) and all(isinstance(one, str) for one in given)
    return isinstance(given, str)


def _any_place(given: Any, holds_place: Callable[[str], bool]) -> bool:
    if not _is_text(given):
        return False
    return any(map(holds_place, [given] if isinstance(given, str) else given))
