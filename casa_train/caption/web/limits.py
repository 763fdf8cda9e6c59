"""What a visitor may cost: bytes, pixels, seconds and streams."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """
    :param upload_bytes: of one uploaded file.
    :param kept_uploads: files that are kept beside those that a stream reads; the oldest goes.
    :param streams: streams at once, each with a cache of its own.
    :param request_bytes: of a request that is neither a file nor a picture.
    :param picture_bytes, picture_pixels: of one frame of a browser's camera.
    :param frame_pixels: of one frame of a file; larger ones are scaled down where they are decoded.
    :param silence: seconds within which more of an upload has to come, and all of another request.
    :param camera_silence: seconds without a frame after which a camera is gone.
    :param nobody: seconds without a viewer after which a stream ends.
    :param frame_seconds: of waiting for a decoded frame.
    """

    upload_bytes: int = 200 * MIB
    kept_uploads: int = 4
    streams: int = 8
    request_bytes: int = 64 << 10
    picture_bytes: int = 2 * MIB
    picture_pixels: int = 4 << 20
    frame_pixels: int = 952 * 952
    silence: float = 30.0
    camera_silence: float = 20.0
    nobody: float = 8.0
    frame_seconds: float = 60.0
