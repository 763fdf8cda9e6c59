"""Videos -> frames as JPEG, so that training never decodes a video.

2 frames a second; 20 frames, evenly, where that would be fewer. A frame is what a player shows at
that moment. Frames keep their aspect and are at most 504 * 504 pixels.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from casa_train.video.containers import FAULTS, Video
from casa_train.video.showing import EXACT, shown_at, upright

FPS = 2.0
SHORT = 10.0  # seconds, below which a clip gives SHORT_FRAMES frames, evenly
SHORT_FRAMES = 20
JPEG_QUALITY = 90
LEAST_DECODED = 0.9  # share of the frames that must be there: its text is about the whole clip
# Decoding a damaged file must end, too: no clip of a recipe needs more.
MAX_DECODED = 1_000_000


@dataclass(frozen=True)
class Frames:
    """Frames of a clip: the second of the video that each shows, and its JPEG."""

    times: list[float]
    images: list[bytes]


def decode_clip(
    video: BinaryIO | bytes, longest: float, start: float = 0.0, end: float | None = None
) -> Frames:
    """Decodes the frames of one clip.

    :param longest: seconds; a longer clip is refused.
    :param start: seconds; :param end: the last moment of interest; None: the end of the video.
    :raises BadRow: a video that cannot be read, is empty or too long, or ends before the clip.
    """
    from casa_train.data.schemas.rows import BadRow

    try:
        with Video(video) as opened:
            length = _length(opened, whole=end is None)
            stop = length if end is None else min(end, length)
            if stop <= start:
                raise BadRow("clip_outside_video", f"{start} s to {end} s of {length:.1f} s")
            if stop - start > longest:
                raise BadRow("video_too_long", f"{stop - start:.0f} s, expected at most {longest}")
            opened.seek(start)
            times = _times(start, stop, whole=end is None)
            found = list(_jpegs(shown_at(_pictures(opened), times)))
    except FAULTS as error:
        if isinstance(error, BadRow):
            raise
        raise BadRow("unreadable_video", str(error)) from error
    if len(found) < LEAST_DECODED * len(times):
        raise BadRow("cut_video", f"{len(found)} of {len(times)} frames could be decoded")
    return Frames(times[: len(found)], found)


def _times(start: float, stop: float, whole: bool) -> list[float]:
    """The moments to show: every half second from `start` on, or `SHORT_FRAMES` evenly.

    :param whole: of a whole video the end itself shows nothing; of a clip it is of interest.
    """
    seconds = stop - start
    if whole and seconds < SHORT:
        return [round(start + i * seconds / SHORT_FRAMES, 3) for i in range(SHORT_FRAMES)]
    frames = math.ceil(seconds * FPS - 1e-6) + (not whole)
    return [round(start + i / FPS, 3) for i in range(frames)]


def _length(video: Video, whole: bool) -> float:
    """Seconds that a video lasts.

    :param whole: go through its packets, since what a header says is not always true; for a clip of
        a long video the header has to do.
    """
    announced = video.container.duration
    return announced / 1e6 if announced and not whole else video.length()


def _pictures(video: Video) -> Iterator[tuple[float, Any]]:
    """The pictures of a video up to its first damage."""
    last = -math.inf
    for begins, frame in itertools.islice(video.pictures(through_damage=False), MAX_DECODED):
        if frame is None:
            # The last picture is shown for as long as it lasts, half a second at most.
            begins = last + 1 / FPS + 2 * EXACT
        last = begins
        yield begins, frame


def _jpegs(shown: Iterator[tuple[float, Any]]) -> Iterator[bytes]:
    """Each moment's picture as JPEG; one that is shown at several moments is encoded once."""
    before, encoded = None, b""
    for _, frame in shown:
        if frame is not before:
            buffer = io.BytesIO()
            upright(frame).save(buffer, "JPEG", quality=JPEG_QUALITY)
            before, encoded = frame, buffer.getvalue()
        yield encoded
