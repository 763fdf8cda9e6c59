"""Rows about videos -> Sample. The images are frames that a recipe decoded, in order.

A recipe adds two columns to a row: `frame_times`, the second in the video that each frame shows,
and `subset`, the name of the source.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

from casa_train.data.sample import ImageSlot, Part, Sample, Turn
from casa_train.data.schemas.conversation import (
    PLACEHOLDER,
    BadRow,
    build_turns,
    exchanges_of,
    safe_path,
)

LIVE = "live_whisperx"
"""The schema whose answers go on while frames arrive."""

FRAME_END = " ..."
"""Ends the text of a frame while captions go on, so that a model learns when to wait for the next
frame, as in the published LiveCC data code. The last frame ends with the turn itself."""


def llava_video(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> Sample:
    """LLaVA-Video-178K: `id`, `conversations`, `data_source`, `video` (a path inside its tar).

    The frames stand where the first question has its placeholder, or in front of it.

    :raises BadRow: no frames, no usable turn, an unsafe path.
    """
    safe_path(key, row.get("video"))
    repaired: set[str] = set()
    exchanges = exchanges_of(key, row.get("conversations"), repaired)
    # One placeholder stands for the whole video; build_turns is given it for each frame.
    exchanges = [e.replace("<video>", PLACEHOLDER) for e in exchanges]
    times = _check_frames(key, row, images)
    if sum(e.count(PLACEHOLDER) for e in exchanges) == 1:
        exchanges = [e.replace(PLACEHOLDER, PLACEHOLDER * len(images)) for e in exchanges]
    turns = build_turns(key, exchanges, len(images), repaired)
    source = row.get("data_source") or row.get("subset")
    if not isinstance(source, str):
        raise BadRow("no_source", f"sample {key} has no 'data_source'")
    fixed = tuple(sorted(repaired))
    return Sample(key, source, turns, tuple(images), True, fixed, tuple(times))


def live_whisperx(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> Sample:
    """Live-WhisperX-526K: `messages`, a user's {video, video_start, video_end} and {text, title,
    previous}, and an assistant's `text_stream` of (start, end, word), in seconds of the video.

    The answer goes on over the frames: each frame is followed by the words that have ended by its
    time, so nothing is said before it was spoken; later words follow the last frame.

    :raises BadRow: no frames, no words, rows of another shape.
    """
    clip, question, words = live_parts(key, row)
    safe_path(key, clip.get("video"))
    times = _check_frames(key, row, images)
    repaired: set[str] = set()
    captions: list[list[str]] = [[] for _ in images]
    for entry in words:
        word = _word(entry)
        if word is None:
            repaired.add("word_dropped")
            continue
        end, text = word
        captions[min(bisect_left(times, end), len(times) - 1)].append(text)
    if not any(captions):
        raise BadRow("no_words", f"sample {key} has no usable word in its text_stream")
    live: list[Part] = []
    for i, caption in enumerate(captions):
        text = "".join(f" {word}" for word in caption)
        live += [ImageSlot(i), text + (FRAME_END if i < len(captions) - 1 else "")]
    live = [part for part in live if part]
    answer = "".join(part for part in live if isinstance(part, str))
    user = tuple(text for text in [_question(question)] if text)
    subset = row.get("subset")
    return Sample(
        key,
        subset if isinstance(subset, str) and subset else "live_whisperx",
        (Turn(user, answer, live=tuple(live)),),
        tuple(images),
        video=True,
        repaired=tuple(sorted(repaired)),
        times=tuple(times),
    )


def live_parts(
    key: str, row: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any], Sequence[Any]]:
    """The clip, the question and the timed words of a Live-WhisperX row.

    :raises BadRow: a row of another shape.
    """
    messages = row.get("messages")
    contents: dict[str, dict[str, Mapping[str, Any]]] = {"user": {}, "assistant": {}}
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, Mapping) and message.get("role") in ("user", "assistant"):
            content = message.get("content")
            for part in content if isinstance(content, list) else ():
                if isinstance(part, Mapping) and isinstance(part.get("type"), str):
                    contents[message["role"]].setdefault(part["type"], part)
    clip, answer = contents["user"].get("video"), contents["assistant"].get("text_stream")
    words = answer.get("text_stream") if answer else None
    if clip is None or not isinstance(words, list):
        raise BadRow(
            "not_a_live_row",
            f"sample {key} needs a user's 'video' and an assistant's 'text_stream', found "
            f"{sorted(contents['user'])} and {sorted(contents['assistant'])}",
        )
    return clip, contents["user"].get("text", {}), words


def last_word(words: Sequence[Any]) -> float:
    """The second at which the last usable word has ended; -inf without one."""
    found = (_word(entry) for entry in words)
    return max((word[0] for word in found if word is not None), default=-math.inf)


def _question(part: Mapping[str, Any]) -> str:
    """The request with its context: what was said before the clip or, at the start, the title."""
    texts = [part.get("text"), part.get("previous") or part.get("title")]
    return "\n".join(t.strip() for t in texts if isinstance(t, str) and t.strip())


def _word(entry: Any) -> tuple[float, str] | None:
    """(end, word) of an entry (start, end, word); None where one of them is missing or no word."""
    if not isinstance(entry, Sequence) or isinstance(entry, str) or len(entry) != 3:
        return None
    start, end, word = entry
    # A word that is how frames end would teach that they go on behind their end.
    if not isinstance(word, str) or word.strip() in ("", FRAME_END.strip()):
        return None
    # A word that could not be aligned has no times of its own.
    last = end if isinstance(end, int | float) else start
    if not isinstance(last, int | float) or not math.isfinite(last):
        return None
    return float(last), re.sub(r"\s+", " ", word.strip())


def _check_frames(key: str, row: Mapping[str, Any], images: Sequence[bytes]) -> list[float]:
    times = row.get("frame_times")
    if not isinstance(times, list) or not images or len(times) != len(images):
        found = len(times) if isinstance(times, list) else times
        raise BadRow(
            "no_frames", f"sample {key} has {len(images)} frames and {found} 'frame_times'"
        )
    if not all(isinstance(time, int | float) for time in times):
        raise BadRow("no_frames", f"'frame_times' of sample {key} are {times!r:.60}")
    return [float(time) for time in times]
