"""A name -> frames: a file, an uploaded video, a camera, or standard input."""

from __future__ import annotations

import io
import math
import os
import sys
from pathlib import Path
from typing import BinaryIO

from casa_train.errors import UserError
from casa_train.video.cameras import Camera, camera_device
from casa_train.video.frames import Frame, FrameSource
from casa_train.video.showing import MAX_PIXELS
from casa_train.video.video_files import Pipe, VideoFile

__all__ = ["Frame", "FrameSource", "open_source"]

STDIN = "-"


def open_source(
    name: str | Path | bytes | BinaryIO,
    fps: float,
    *,
    start: float = 0.0,
    end: float | None = None,
    max_pixels: int = MAX_PIXELS,
    realtime: bool = False,
    title: str | None = None,
) -> FrameSource:
    """Opens a source and decodes its first picture.

    :param name: a path; `camera:0` or /dev/video0; `-`, a container on standard input; or a video
        as bytes or as an open file, which is closed with the source.
    :param fps: frames for a second of the video.
    :param start: seconds of the video before the first frame, and :param end: the second before
        which the last one is; None: to its end.
    :param max_pixels: larger pictures are scaled down, as the recipes do.
    :param realtime: a video plays in real time, as a camera does; frames that a reader is too slow
        for are passed over and counted.
    :param title: what messages call a video that has no name.
    :raises UserError: it cannot be opened, holds no video, or none that can be decoded; a number
        is out of its range.
    """
    _check(fps, start, end, max_pixels)
    if isinstance(name, str) and (device := camera_device(name)):
        if start or end is not None:
            raise UserError(f"start, end: {name} has no beginning and no end; leave them out")
        return Camera(device, name, fps, max_pixels)
    file, called = _opened(name)
    return VideoFile(
        file,
        title or called,
        fps,
        start=start,
        end=end,
        max_pixels=max_pixels,
        realtime=realtime,
    )


def _check(fps: float, start: float, end: float | None, max_pixels: int) -> None:
    if not 0 < fps <= 1000:
        raise UserError(f"fps: {fps}; expected frames a second, more than 0 and at most 1000")
    if not 0 <= start < math.inf:
        raise UserError(f"start: {start}; expected seconds of the video, 0 or more")
    if end is not None and not start < end < math.inf:
        raise UserError(f"end: {end}; expected a second after the start, {start}")
    if max_pixels < 1:
        raise UserError(f"max_pixels: {max_pixels}; expected 1 or more")


def _opened(video: str | Path | bytes | BinaryIO) -> tuple[BinaryIO | Pipe, str]:
    if isinstance(video, bytes):
        return io.BytesIO(_not_empty(video, "the video")), "the video"
    if video == STDIN:
        return _stdin(), "standard input"
    if not isinstance(video, str | Path):
        return video, str(getattr(video, "name", "the video"))
    path = Path(video)
    try:
        if path.is_dir():
            raise UserError(f"{path}: found a directory; expected a video file; name one inside it")
        file = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file; expected a video file, camera:0, or - for standard input"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({error}); expected a readable file") from error
    if path.is_file() and not os.fstat(file.fileno()).st_size:
        file.close()
        _not_empty(b"", str(path))
    return file, str(path)


def _not_empty(video: bytes, name: str) -> bytes:
    if not video:
        raise UserError(f"{name}: found 0 bytes; expected a video; was it copied to its end?")
    return video


def _stdin() -> Pipe:
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UserError(
            "standard input: nothing is piped into it; expected a video, such as from: "
            "ffmpeg -i VIDEO -f mpegts - | ..."
        )
    return Pipe(sys.stdin.fileno())
