"""Messages of a conversation, in the forms that transformers' users write them.

A message is `{"role": ..., "content": ...}`; its content is a string or a list of parts such as
`{"type": "text", "text": ...}`, `{"type": "image", "image": ...}` and
`{"type": "video", "video": [frame, ...]}`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

Message = dict[str, Any]


def as_batch(messages: Any) -> tuple[list[Any], bool]:
    """Conversations, and whether only one was given."""
    conversations = list(messages)
    if not conversations:
        raise ValueError("no conversation was given")
    single = isinstance(conversations[0], dict)
    return ([conversations] if single else conversations), single


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
        if kind in ("image", "image_url", "video"):
            if text:
                yield "text", text
            text = ""
            yield kind, frames_of(part.get("video")) if kind == "video" else [_image_of(part)]
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError(
                f"message {i} holds the part {part!r}; expected {{'type': 'text', 'text': ...}}, "
                "or for user and assistant {'type': 'image', 'image': ...} or "
                "{'type': 'video', 'video': [frame, ...]}"
            )
    if text:
        yield "text", text


def text_of(parts: list[dict[str, Any]], i: int) -> str:
    for part in parts:
        if part.get("type") != "text":
            raise ValueError(
                f"message {i} holds the part {part!r}; images and videos belong into messages of "
                "user and assistant, others hold {'type': 'text', 'text': ...} only"
            )
    return "".join(text for _, text in runs(parts, i))


def slots_of(messages: Sequence[Message], kind: str) -> list[Any]:
    """The images of a conversation, or its videos (lists of frames), in order."""
    found = [run for i, m in enumerate(messages) for run in runs(parts_of(m, i), i)]
    if kind == "video":
        return [frames for name, frames in found if name == "video"]
    return [images[0] for name, images in found if name in ("image", "image_url")]


def _image_of(part: dict[str, Any]) -> Any:
    """What stands in an image slot, under any of the names that transformers' messages use."""
    if part.get("type") == "image_url":
        value = part.get("image_url")
        return value.get("url") if isinstance(value, dict) else value
    for name in ("image", "url", "path"):
        if part.get(name) is not None:
            return part[name]
    encoded = part.get("base64")
    if isinstance(encoded, str) and not encoded.startswith("data:"):
        return f"data:;base64,{encoded}"
    return encoded


def frames_of(video: Any) -> list[Any]:
    if not isinstance(video, (list, tuple, Tensor)) or len(video) == 0:
        raise ValueError(
            f"a video is {type(video).__name__}; expected a list of frames (paths or PIL images) "
            "or a uint8 tensor (F, 3, H, W): video files are not decoded here"
        )
    return list(video)
