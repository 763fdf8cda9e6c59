"""Requests of lmms-eval as conversations, in the words of an export's processor.

A task asks a chat model with messages, and a simple one with a text and what to show before it.
Documents, and with them pictures, are read when their batch comes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lmms_eval.protocol import ChatMessages
from PIL import Image

from casa_train.errors import UserError
from casa_train.evaluate.lmms.asking import Conversation

AUDIO = (".wav", ".mp3", ".m4a", ".aac", ".flac", ".ogg", ".opus")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class Round(NamedTuple):
    """What a task asks after an answer.

    :param messages: None: nothing, the last answer was.
    :param outputs: the answers so far, as the task wants them kept.
    :param info: handed back to the task with the next answer.
    """

    messages: Any
    outputs: list[Any]
    info: Any


@dataclass(frozen=True)
class Request:
    """One request for an answer.

    :param name: of the task and the document, for messages.
    :param context: the text of the request; what it costs, more or less.
    :param options: the task's generation keywords.
    :param opening: the messages of the first round.
    :param following: those of a later one, from its number, the answers so far and the task's own.
    """

    name: str
    context: str
    options: Mapping[str, Any]
    opening: Callable[[], Any]
    following: Callable[[int, list[Any], Any], Round]


def chat_request(args: Sequence[Any], docs: Mapping[str, Any]) -> Request:
    """From (context, doc_to_messages, generation keywords, document, task, split).

    :param docs: by task the splits of its data set.
    """
    context, to_messages, options, doc_id, task, split = args

    def following(number: int, outputs: list[Any], info: Any) -> Round:
        payload = to_messages(
            docs[task][split][doc_id],
            round_idx=number,
            previous_output=list(outputs),
            previous_round_info=info,
        )
        if not isinstance(payload, tuple) or len(payload) != 4:  # a task of one round
            return Round(None, outputs, info)
        messages, ended, kept, info = payload
        return Round(None if ended else messages, _kept(kept, outputs), info)

    def opening() -> Any:
        return to_messages(docs[task][split][doc_id])

    return Request(_name(task, doc_id), context, options or {}, opening, following)


def simple_request(args: Sequence[Any], docs: Mapping[str, Any]) -> Request:
    """From (context, generation keywords, doc_to_visual, [doc_to_text,] document, task, split).

    :param docs: by task the splits of its data set.
    """
    context, options, to_visuals, *rounds, doc_id, task, split = args

    def following(number: int, outputs: list[Any], info: Any) -> Round:
        if not rounds:
            return Round(None, outputs, info)
        payload = rounds[0](
            docs[task][split][doc_id],
            round_idx=number,
            previous_output=list(outputs),
            previous_round_info=info,
        )
        if not isinstance(payload, tuple) or len(payload) != 5:
            return Round(None, outputs, info)
        visuals, text, ended, kept, info = payload
        return Round(None if ended else user_turn(visuals, text), _kept(kept, outputs), info)

    def opening() -> Any:
        return user_turn(to_visuals(docs[task][split][doc_id]), context)

    return Request(_name(task, doc_id), context, options or {}, opening, following)


@dataclass(frozen=True)
class Scored:
    """One request for a log-likelihood.

    :param opening: the messages before the continuation.
    :param continuation: what an answer is to begin with.
    :param choice: whether it is one of several, of a task that wants the likeliest.
    """

    name: str
    context: str
    opening: Callable[[], Any]
    continuation: Callable[[], str]
    choice: bool = False


def scored_request(args: Sequence[Any], docs: Mapping[str, Any]) -> Scored:
    """From (context, continuation), or those and (doc_to_visual, document, task, split).

    :param docs: by task the splits of its data set.
    """
    if len(args) == 2:
        context, text = args
        return Scored("a request", context, lambda: user_turn([], context), lambda: _begun(text))
    context, target, to_visuals, doc_id, task, split = args

    def opening() -> Any:
        visuals = to_visuals(docs[task][split][doc_id]) if to_visuals is not None else []
        return user_turn(visuals, context)

    def continuation() -> str:
        return _begun(target(docs[task][split][doc_id]) if callable(target) else target)

    # Tasks of one continuation hand out doc_to_target, those of several the choices themselves.
    choice = not callable(target)
    return Scored(_name(task, doc_id), context, opening, continuation, choice)


def _begun(continuation: Any) -> str:
    """The space that lmms-eval puts between a text and what goes on with it is not an answer's: a
    chat template has what belongs there.
    """
    return str(continuation).lstrip()


def _kept(kept: Any, outputs: list[Any]) -> list[Any]:
    return outputs if kept is None else list(kept)


def _name(task: Any, doc_id: Any) -> str:
    return f"task {task}, document {doc_id}"


def user_turn(visuals: Sequence[Any] | None, text: str) -> Conversation:
    """What a simple request shows, and then its text."""
    content = [*map(_shown, visuals or []), {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def _shown(visual: Any) -> dict[str, Any]:
    kind = "image" if isinstance(visual, Image.Image) else "video"
    if isinstance(visual, dict):
        kind = visual.get("type", "video")
        if not {"video_start", "video_end"} & set(visual):
            visual = visual.get("url") or visual.get("path") or visual
    elif isinstance(visual, str) and visual.lower().endswith(PICTURES):
        kind = "image"
    elif isinstance(visual, str) and visual.lower().endswith(AUDIO):
        kind = "audio"
    return {"type": kind, "url": visual}


def conversation(messages: Any, frames: int) -> Conversation:
    """A task's messages as the processor takes them, in their order.

    :param frames: of a video file, at most.
    :raises UserError: audio, a part of a video, a picture that is missing, a file that cannot be
        decoded.
    :raises ValueError: no messages as lmms-eval has them.
    """
    return [
        {"role": message.role, "content": [_part(part, frames) for part in message.content]}
        for message in ChatMessages(messages=messages).messages
    ]


def _part(part: Any, frames: int) -> dict[str, Any]:
    if part.type == "text":
        return {"type": "text", "text": part.text}
    if part.type == "audio":
        raise UserError(
            f"audio ({part.url!r:.80}): the model sees pictures and reads text; expected text, "
            "images and videos. Leave the task out."
        )
    if part.url is None:
        raise UserError(
            f"an {part.type} is None; expected a picture. Look at the task's data set, and at "
            "doc_to_visual or doc_to_messages."
        )
    if part.type == "image":
        return {"type": "image", "image": part.url}
    return {"type": "video", "video": _frames_of(part, frames)}


def _frames_of(part: Any, frames: int) -> Any:
    """The frames of a video: as they are given, or at most `frames` of a file's."""
    video = part.url
    times = {"start_time": part.start_time, "end_time": part.end_time}
    if isinstance(video, dict):
        times |= {name: video.get(name) for name in ("video_start", "video_end")}
    if cut := {name: value for name, value in times.items() if value is not None}:
        raise UserError(
            f"a part of a video ({cut}): videos are read whole here. Cut the files, or hand out "
            "frames: a list of images."
        )
    if not isinstance(video, (str, Path)):
        return video
    try:
        from lmms_eval.models.model_utils.load_video import read_video  # needs PyAV

        shown = read_video(str(video), num_frm=frames)
    except Exception as error:  # the decoder's own, and of many kinds
        raise UserError(
            f"video {video}: {type(error).__name__}: {error}; expected a file that PyAV decodes "
            "(pip install av)"
        ) from error
    # Of some formats the reader takes every frame.
    spread = np.linspace(0, len(shown) - 1, min(frames, len(shown)), dtype=int)
    return shown[np.unique(spread)]
