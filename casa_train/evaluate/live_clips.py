"""Held-out clips with live captions: an export sees their frames one by one and says its words.

*Blind* shows the frames of another clip: what still matches was not seen. Many clips play side by
side in one batch, as `python -m casa_train.caption` plays one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_train.caption.captioner import Captioner
from casa_train.caption.options import CaptionOptions
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot, Sample
from casa_train.data.schemas.rows import BadRow
from casa_train.data.schemas.video_rows import FRAME_END, LIVE
from casa_train.evaluate.exact_match import question_text
from casa_train.evaluate.live_scores import ClipCaptions, LiveScore
from casa_train.evaluate.shares import spread
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError


@dataclass(frozen=True)
class LiveClip:
    """A clip as it is shown.

    :param frames: bytes of image files; :param times: seconds of the video that they show.
    :param due: the words of each frame.
    """

    id: str
    source: str
    prompt: str
    frames: tuple[bytes, ...]
    times: tuple[float, ...]
    due: tuple[str, ...]


def first_clips(
    splits: Mapping[str, Split],
    limits: Mapping[str, int | None],
    limit: int,
    skipped: Counter[str],
) -> list[LiveClip]:
    """Clips with live captions, at most `limit`, in even shares of the splits and evenly over each.

    Clips that cannot be read are counted in `skipped` by reason.

    :param limits: by split, how many of its samples are used; None: all.
    """
    live = {name: split for name, split in splits.items() if split.meta["schema"] == LIVE}
    rows = {name: np.arange(len(split))[: limits[name]] for name, split in live.items()}
    clips = []
    for name, chosen in spread(rows, limit).items():
        for row in chosen:
            try:
                clips.append(clip_of(name, live[name].read(row)))
            except (BadRow, ImageError) as error:
                skipped[error.reason] += 1
    return clips


def clip_of(split: str, sample: Sample) -> LiveClip:
    """A sample's frames, with the words of each.

    :raises ImageError: a frame that cannot be used.
    """
    turn = sample.turns[0]
    due = [""] * len(sample.images)
    shown = 0
    for part in turn.live:
        if isinstance(part, ImageSlot):
            shown = part.index
        elif isinstance(part, str):
            due[shown] += part
    for frame in sample.images:
        CasaImageProcessor().load(frame)
    words = tuple(text.removesuffix(FRAME_END).strip() for text in due)
    prompt = question_text(turn)
    return LiveClip(
        f"{split}/{sample.key}", sample.source, prompt, sample.images, sample.times, words
    )


def evaluate_clips(
    clips: Sequence[LiveClip], model: Any, processor: Any, batch_size: int
) -> dict[str, Any]:
    """Scores of an export, overall under the names of `LiveScore.record`, blind and by source; and
    the words of every clip.

    Of a single clip there is no blind score: nothing else could be shown in its place.

    :param batch_size: clips that play side by side.
    """
    captioner = Captioner(model, processor, CaptionOptions())
    seen = say(captioner, clips, [clip.frames for clip in clips], batch_size)
    others = other_frames(clips) if len(clips) > 1 else []
    blind = say(captioner, clips, others, batch_size) if others else [None]
    scores = {"all": LiveScore(), "blind": LiveScore()}
    sources: dict[str, tuple[LiveScore, LiveScore]] = {}
    records = []
    for clip, words, guessed in zip(clips, seen, blind, strict=True):
        own = sources.setdefault(clip.source, (LiveScore(), LiveScore()))
        for which, said, score in zip(scores, (words, guessed), own, strict=True):
            if said is not None:
                captions = ClipCaptions(clip.times, clip.due, tuple(said))
                scores[which].add(captions)
                score.add(captions)
        records.append(
            {
                "id": clip.id,
                "source": clip.source,
                "times": list(clip.times),
                "due": list(clip.due),
                "said": words,
                "blind": guessed,
            }
        )
    return {
        **scores["all"].record(),
        "blind_match": scores["blind"].record()["match"],
        "sources": {
            name: {**score.record(), "blind_match": blind_score.record()["match"]}
            for name, (score, blind_score) in sources.items()
        },
        "captions": records,
    }


def say(
    captioner: Captioner,
    clips: Sequence[LiveClip],
    frames: Sequence[Sequence[bytes]],
    batch_size: int,
) -> list[list[str]]:
    """What is said at each frame of each clip.

    :param frames: as many for each clip as it has times.
    """
    said: list[list[str]] = [[] for _ in clips]
    # Clips of like length end together.
    order = sorted(range(len(clips)), key=lambda i: len(frames[i]))
    for start in range(0, len(order), batch_size):
        playing = order[start : start + batch_size]
        streams = captioner.open(prompts=[clips[i].prompt for i in playing])
        while playing:
            shown = [frames[i][len(said[i])] for i in playing]
            for i, caption in zip(playing, streams.caption(shown), strict=True):
                said[i].append(caption.text)
            left = [row for row, i in enumerate(playing) if len(said[i]) < len(frames[i])]
            streams.keep(left)
            playing = [playing[row] for row in left]
    return said


def other_frames(clips: Sequence[LiveClip]) -> list[list[bytes]]:
    """For each clip the frames of the next one, cut or begun again to fit."""
    others = []
    for i, clip in enumerate(clips):
        stand_in = clips[(i + 1) % len(clips)].frames
        repeats = -(-len(clip.frames) // len(stand_in))
        others.append(list((stand_in * repeats)[: len(clip.frames)]))
    return others
