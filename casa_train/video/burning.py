"""A copy of a video with its subtitles in the picture."""

from __future__ import annotations

import errno
import io
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from casa_train.errors import UserError
from casa_train.io.files import sync_directory, sync_file
from casa_train.video.containers import FAULTS, Video, short
from casa_train.video.frame_sources import open_source
from casa_train.video.showing import EXACT
from casa_train.video.subtitles import Overlay, draw_text, load_font

# By what they are named in PyAV: the better one first.
ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"crf": "20", "preset": "veryfast"}),
    ("mpeg4", {"qscale": "3"}),
)
FINEST = 90_000  # steps a second of a clock of MP4
FINEST_MPEG4 = 60_000  # steps a second: MPEG-4 counts in at most 65,535
BLACK, WHITE, GREY = 16.0, 235.0, 128.0  # of 8-bit video


@dataclass(frozen=True)
class Cue:
    """Text that is shown from `start` until `end`, in seconds since the video's first picture."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Burnt:
    """What was written: its pictures, whether with sound, and what is to be said about it."""

    pictures: int
    sound: bool
    notes: tuple[str, ...]


def burn(video: Path, cues: Sequence[Cue], out: Path, font: Path | None = None) -> Burnt:
    """Writes a copy of `video` as MP4 with `cues` in its picture, upright and of even size.

    Every picture keeps its time. Sound is copied as it is where MP4 can hold it. The file is whole
    or absent; one of its name stays until then.

    :param cues: in any order; what is shown at once stands below each other.
    :param font: a TrueType file; None: DejaVu Sans.
    :raises UserError: the video cannot be read, or `out` not written; a cue without length.
    """
    _check(cues, out, font)
    with open_source(video, 1.0) as source:  # says what is wrong with the video
        size = source.size
    if out.exists() and out.samefile(video):
        raise UserError(f"{out}: is the video itself; expected another name")
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            with video.open("rb") as file, Video(file, str(video)) as opened:
                burnt = _copy(opened, size, cues, temporary, font)
            sync_file(temporary)
            os.replace(temporary, out)
            sync_directory(out.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except FAULTS as error:
        raise UserError(f"{out}: cannot be written ({short(error)}); {_advice(error)}") from error
    return burnt


def _check(cues: Sequence[Cue], out: Path, font: Path | None) -> None:
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: expected a name that ends in .mp4, which is what is written")
    if out.is_dir():
        raise UserError(f"{out}: found a directory; expected the name of a file to write")
    for number, cue in enumerate(cues):
        if not (math.isfinite(cue.start) and math.isfinite(cue.end) and cue.start < cue.end):
            raise UserError(
                f"cue {number}: from {cue.start} s to {cue.end} s; expected an end after its start"
            )
    load_font(font, 20)


def _copy(
    video: Video, size: tuple[int, int], cues: Sequence[Cue], path: Path, font: Path | None
) -> Burnt:
    """:param size: of the pictures as a player shows them."""
    notes = []
    sound = next(iter(video.container.streams.audio), None)
    if sound is not None and not _fits_mp4(sound):
        notes.append(f"its sound ({_codec(sound)}) was left out: MP4 does not hold it")
        sound = None
    begin = video.begins
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        encoder = _encoder(container, video, size)
        copied = None if sound is None else container.add_stream_from_template(sound)
        pictures = 0

        def copy(packet: Any) -> None:
            if packet.stream is not sound or packet.dts is None:
                return
            ahead = round(begin / packet.time_base)
            packet.dts -= ahead
            packet.pts = packet.dts if packet.pts is None else packet.pts - ahead
            packet.stream = copied
            container.mux(packet)

        drawn = _drawn(video.pictures(True, copy), cues, font)
        for picture in _timed(drawn, encoder.codec_context.time_base, video, begin):
            container.mux(encoder.encode(picture))
            pictures += 1
        container.mux(encoder.encode(None))
    if video.fault or video.damaged:
        notes.append(f"{video.damaged} damaged pieces of the video were left out")
    return Burnt(pictures, sound is not None, tuple(notes))


def _timed(
    drawn: Iterator[tuple[float, float, Any]], step: Fraction, video: Video, begin: float
) -> Iterator[Any]:
    """Pictures in steps of the encoder's clock; of two at one time the first."""
    last = -1
    for seconds, lasts, picture in drawn:
        pts = round((seconds + (video.origin or 0.0) - begin) / step)
        if pts <= last:
            continue
        last = pts
        picture.pts, picture.time_base = pts, step
        picture.duration = max(1, round(lasts / step))
        yield picture


def _drawn(
    pictures: Iterator[tuple[float, Any]], cues: Sequence[Cue], font: Path | None
) -> Iterator[tuple[float, float, Any]]:
    """(second, seconds that it lasts, av.VideoFrame of yuv420p) with what is said then."""
    waiting = sorted(cues, key=lambda cue: cue.start)
    shown: list[Cue] = []
    text, overlay = "", None
    coded: tuple[int, int] | None = None  # sizes change where broadcasts were joined
    # A picture's length is the time until the next one.
    for (begins, frame), (ends, _) in itertools.pairwise(pictures):
        while waiting and waiting[0].start <= begins + EXACT:
            shown.append(waiting.pop(0))
        shown = [cue for cue in shown if cue.end > begins + EXACT]
        coded = coded or (frame.width, frame.height)
        planes = _upright_planes(frame, *coded)
        height, width = planes[0].shape
        said = "\n".join(cue.text for cue in shown if cue.text.strip())
        if said != text:
            text, overlay = said, draw_text(said, width, height, font) if said else None
        if overlay is not None:
            _lay(overlay, planes)
        flat = np.concatenate([plane.ravel() for plane in planes])
        whole = av.VideoFrame.from_ndarray(flat.reshape(height * 3 // 2, width), format="yuv420p")
        yield begins, ends - begins, whole


def _upright_planes(frame: Any, width: int, height: int) -> list[Any]:
    """Light (height, width) and two colours (half of each) as uint8, turned and of even size.

    :param width: of the coded picture, to which one of another size is scaled; :param height: too.

    Colours stay as they are coded: a way over RGB would change them.
    """
    coded = frame.reformat(width, height, format="yuv420p")
    planes = []
    for plane in coded.planes:
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[: plane.height, : plane.width])
    # Before it turns: the last colour of an odd side then stays with its own pixels.
    light = np.pad(planes[0], [(0, side % 2) for side in planes[0].shape], mode="edge")
    quarters = round(getattr(frame, "rotation", 0) / 90)
    return [np.rot90(plane, quarters).copy() for plane in (light, *planes[1:])]


def _lay(overlay: Overlay, planes: list[Any]) -> None:
    light, *colours = planes
    top, alpha = overlay.top, overlay.alpha
    text = BLACK + overlay.light * (WHITE - BLACK)
    light[top:] = np.rint(light[top:] * (1 - alpha) + text * alpha)
    rows, columns = alpha.shape
    halved = alpha.reshape(rows // 2, 2, columns // 2, 2).mean((1, 3))
    for colour in colours:
        colour[top // 2 :] = np.rint(colour[top // 2 :] * (1 - halved) + GREY * halved)


def _encoder(container: Any, video: Video, size: tuple[int, int]) -> Any:
    name, options = next(
        (name, options) for name, options in ENCODERS if name in av.codecs_available
    )
    stream = container.add_stream(
        name, rate=Fraction(video.rate).limit_denominator(1001), options=options
    )
    stream.width, stream.height = (side + side % 2 for side in size)
    stream.pix_fmt = "yuv420p"
    finest = FINEST_MPEG4 if name == "mpeg4" else FINEST
    step = Fraction(video.stream.time_base)
    context, coded = stream.codec_context, video.stream.codec_context
    context.time_base = step if step.denominator <= finest else Fraction(1, finest)
    for kept in ("color_primaries", "color_trc", "colorspace"):
        setattr(context, kept, getattr(coded, kept))
    if shape := video.stream.sample_aspect_ratio:
        sideways = size != (coded.width, coded.height)
        context.sample_aspect_ratio = 1 / shape if sideways else shape
    return stream


def _fits_mp4(sound: Any) -> bool:
    """Whether MP4 holds this stream as it is: its muxer is asked."""
    try:
        with av.open(io.BytesIO(), "w", format="mp4") as container:
            container.add_stream_from_template(sound)
            container.start_encoding()
    except FAULTS:
        return False
    return True


def _codec(stream: Any) -> str:
    return stream.codec_context.name if stream.codec_context else "of an unknown codec"


def _advice(error: BaseException) -> str:
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or name a file on another disk"
    return "expected a place where a file can be written; name another one"
