"""Videos -> frames as JPEG, so that training never decodes a video.

2 frames a second; 20 frames, evenly, where that would be fewer. A frame is what a player shows at
that moment. Frames keep their aspect and are at most 504 * 504 pixels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

FPS = 2.0
SHORT = 10.0  # seconds, below which a clip gives SHORT_FRAMES frames, evenly
SHORT_FRAMES = 20
MAX_PIXELS = 504 * 504
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
    import av

    from casa_train.data.schemas.rows import BadRow

    try:
        with av.open(io.BytesIO(video) if isinstance(video, bytes) else video) as container:
            stream = container.streams.video[0]
            origin = float((stream.start_time or 0) * stream.time_base)
            length = _length(container, stream, whole=end is None)
            stop = length if end is None else min(end, length)
            if stop <= start:
                raise BadRow("clip_outside_video", f"{start} s to {end} s of {length:.1f} s")
            if stop - start > longest:
                raise BadRow("video_too_long", f"{stop - start:.0f} s, expected at most {longest}")
            container.seek(int((origin + start) * av.time_base))  # the key frame before it
            times = _times(start, stop, whole=end is None)
            found = list(_at(container.decode(stream), times, origin))
    except (av.FFmpegError, IndexError, OSError, ValueError, MemoryError) as error:
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


def _length(container: Any, stream: Any, whole: bool) -> float:
    """Seconds that a video lasts.

    :param whole: go through its packets, since what a header says is not always true; for a clip of
        a long video the header has to do.
    """
    if not whole and container.duration:
        return float(container.duration) / 1e6
    first, last = math.inf, -math.inf
    for packet in container.demux(stream):
        if packet.pts is not None:
            first = min(first, packet.pts)
            last = max(last, packet.pts + (packet.duration or 0))
    return float((last - first) * stream.time_base) if last > first else 0.0


def _at(frames: Iterator[Any], times: list[float], origin: float) -> Iterator[bytes]:
    """For each time the last frame that was shown by then, as JPEG; ends where decoding does.

    :param origin: seconds of the container's clock at which the video begins.
    """
    import av

    shown: Any = None
    wanted = 0
    for _ in range(MAX_DECODED):
        try:
            frame = next(frames, None)
        except av.FFmpegError:
            frame = None
        if frame is None:
            break
        if frame.time is None:
            continue
        encoded: bytes | None = None
        while wanted < len(times) and shown and times[wanted] < frame.time - origin - 1e-4:
            encoded = encoded or _jpeg(shown)
            yield encoded
            wanted += 1
        if wanted == len(times):
            return
        shown = frame
    if shown is not None and wanted < len(times):
        # The last frame is shown for as long as it lasts, half a second at most.
        last = shown.time - origin + 1 / FPS
        encoded = _jpeg(shown)
        yield from (encoded for time in times[wanted:] if time <= last)


def _jpeg(frame: Any) -> bytes:
    width, height = frame.width, frame.height
    if width < 1 or height < 1:
        raise ValueError(f"a frame of {width}x{height} pixels")
    scale = min(1.0, math.sqrt(MAX_PIXELS / (width * height)))
    size = max(1, math.floor(width * scale)), max(1, math.floor(height * scale))
    image = frame.to_image(width=size[0], height=size[1], interpolation="BICUBIC")
    if rotation := getattr(frame, "rotation", 0):
        image = image.rotate(rotation, expand=True)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
