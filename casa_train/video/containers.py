"""The pictures of one video inside a container, with the times at which they begin.

Containers are read through Python's file objects alone: a playlist that names other files or
addresses opens none of them.
"""

from __future__ import annotations

import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import av

FAULTS = (av.FFmpegError, IndexError, OSError, ValueError, MemoryError)
"""What reading a container raises where it is damaged or no video."""

GAP = 10.0
"""Seconds by which the clock of a broadcast may run ahead from one packet to the next."""
BACK = 0.1
"""Seconds by which it may run back. Beyond these it was set anew (ffmpeg's limits, too)."""
NEAR = 1.0
"""Seconds of silence, or of a still picture, that may lie between the parts of one."""

USUAL_RATE = 25.0  # pictures a second where a stream says neither times nor a rate


class NoVideo(ValueError):
    """A container without a moving picture; the text says what it holds instead."""


class NoDecoder(ValueError):
    """A video of a codec that this installation of PyAV cannot decode."""


class Input:
    """A file as PyAV reads it, which ends where it is told to.

    :param file: what is read; only `read` is used where it cannot seek.
    :param name: tells apart formats that begin alike.
    """

    def __init__(self, file: BinaryIO, name: str, ended: threading.Event) -> None:
        self.file = file
        self.name = name
        self.ended = ended
        self.interrupt: BaseException | None = None
        if file.seekable():
            self.seek = file.seek
            self.tell = file.tell

    def read(self, size: int) -> bytes:
        try:
            return b"" if self.ended.is_set() else self.file.read(size)
        except (KeyboardInterrupt, SystemExit) as error:
            self.interrupt = error
            self.ended.set()
            return b""

    def check(self) -> None:
        """Raises what interrupted a read: PyAV, which calls it, prints such and reads on."""
        if self.interrupt is not None:
            raise self.interrupt


class Jumps:
    """Takes the jumps out of a broadcast's clock: what follows one is shown right behind it.

    A programme that was joined to another, or a sender that began anew, goes on with another time,
    for which no viewer waits.
    """

    def __init__(self) -> None:
        self.found = False
        """Whether there was one."""
        # By stream: a file's last pictures may come behind the first sound of the next one.
        self._ahead: dict[int, float] = {}  # seconds by which its clock is ahead of what passed
        self._last: dict[int, tuple[float, float]] = {}  # when its last packet began and ended

    def mend(self, packet: Any) -> None:
        """Puts a packet that was read at its place; all packets have to come by, in order."""
        if packet.dts is None:
            return
        step, stream = packet.time_base, packet.stream.index
        clock = float(packet.dts * step)
        ahead = self._ahead.setdefault(stream, 0.0)
        last, due = self._last.get(stream, (-math.inf, clock - ahead))
        if clock - ahead - due > GAP or last - (clock - ahead) > BACK:
            self.found = True
            # With the stream that jumped before it, so that sound and picture stay together.
            others = (a for a in self._ahead.values() if last < clock - a <= due + NEAR)
            ahead = self._ahead[stream] = next(others, clock - due)
        time = clock - ahead
        self._last[stream] = time, time + float((packet.duration or 0) * step)
        ticks = round(ahead / step)
        packet.dts -= ticks
        if packet.pts is not None:
            packet.pts -= ticks


def _opens_no_other(url: str, flags: int, options: dict[str, str]) -> Any:
    raise PermissionError(f"it names another file ({url}), which is not opened")


class Video:
    """The first moving picture of a container; close it, or use it as a context manager.

    :raises NoVideo, NoDecoder: it holds no video, or one of an unknown codec.
    :raises FAULTS: it cannot be read.
    """

    def __init__(
        self,
        video: BinaryIO | bytes,
        name: str = "",
        ended: threading.Event | None = None,
        threads: int = 0,
    ) -> None:
        """:param threads: that decode whole pictures beside each other; 0: as PyAV has it."""
        file = io.BytesIO(video) if isinstance(video, bytes) else video
        self.container: Any
        self._input = Input(file, name, ended or threading.Event())
        try:
            self.container = av.open(self._input, io_open=_opens_no_other)
        except av.FFmpegError:
            self._input.check()
            raise
        try:
            self.stream = _moving(self.container)
        except ValueError:
            self.container.close()
            raise
        if threads:
            self.stream.codec_context.thread_count = threads
            self.stream.codec_context.thread_type = "AUTO"
        self.origin: float | None = None
        """Second of the container's clock at which the first picture begins; None: not known."""
        if self.stream.start_time is not None:
            self.origin = float(self.stream.start_time * self.stream.time_base)
        self.begins = float((self.container.start_time or 0) / av.time_base)
        """Second of the container's clock at which the first of its sound and picture begins."""
        self.jumped = False
        """Whether its clock was set anew."""
        self.reached = 0.0
        """Seconds to the end of what was read so far, of sound as well."""
        self.damaged = 0
        """Pieces of the video that could not be decoded."""
        self.fault: str | None = None
        """Why reading broke off; None where it did not."""

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self.container.close()

    @property
    def rate(self) -> float:
        """Pictures a second, as the header says or as is usual."""
        for rate in (self.stream.average_rate, self.stream.guessed_rate, self.stream.base_rate):
            if rate and 0 < rate <= 1000:
                return float(rate)
        return USUAL_RATE

    @property
    def announced(self) -> float | None:
        """Seconds that the header says this video lasts; None where it says nothing."""
        if self.stream.duration:
            return float(self.stream.duration * self.stream.time_base)
        return self.container.duration / av.time_base if self.container.duration else None

    def length(self) -> float:
        """Seconds of the video by its packets, all of which it reads."""
        first, last = math.inf, -math.inf
        for packet in self.container.demux(self.stream):
            if packet.pts is not None:
                first = min(first, packet.pts)
                last = max(last, packet.pts + (packet.duration or 0))
        return float((last - first) * self.stream.time_base) if last > first else 0.0

    def seek(self, second: float) -> None:
        """Goes to the last key picture that begins by `second`, or to where the file can go."""
        self.origin = self.origin or 0.0  # where it goes is no beginning
        self.container.seek(int((self.origin + second) * av.time_base))

    def pictures(
        self, through_damage: bool, sound: Callable[[Any], None] | None = None
    ) -> Iterator[tuple[float, Any]]:
        """(second at which it begins, av.VideoFrame) of each picture; then (end of the last, None).

        A picture without a time of its own follows the one before it at the video's rate.

        :param through_damage: leave out what cannot be decoded, and jumps of a broadcast's clock;
            else the first damage ends the video, and its clock stays as it is.
        :param sound: is given each packet of sound where it stands between the pictures.
        """
        last: Any = None
        begins = -1 / self.rate
        for frame, clock in self._decoded(through_damage, sound):
            if clock is None:
                begins += 1 / self.rate
            else:
                self.origin = clock if self.origin is None else self.origin
                begins = clock - self.origin
            last = frame
            yield begins, frame
        if last is not None:
            yield begins + _lasts(last, 1 / self.rate), None

    def _decoded(
        self, through_damage: bool, sound: Callable[[Any], None] | None
    ) -> Iterator[tuple[Any, float | None]]:
        """(av.VideoFrame, second of the container's clock at which it begins) in order."""
        # AVI has places in a row and no times: pictures that are stored in another order than they
        # are shown take the places in order. The times that PyAV makes up go back and forth.
        places: deque[float] | None = deque() if self.container.format.name == "avi" else None
        jumps = Jumps() if through_damage and _may_jump(self.container) else None
        packets = self.container.demux(self.stream, *self.container.streams.audio)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError as error:
                self._input.check()
                self.fault = str(error)
                return
            self._input.check()
            if packet is None:
                return
            if jumps is not None:
                jumps.mend(packet)
                self.jumped = jumps.found
            if packet.pts is not None:
                end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self.reached = max(self.reached, end - (self.origin or 0.0))
            if packet.stream is not self.stream:
                if sound is not None:
                    sound(packet)
                continue
            if places is not None and packet.dts is not None:
                places.append(float(packet.dts * packet.time_base))
            try:
                frames = packet.decode()
            except av.FFmpegError:
                self.damaged += 1
                if places:
                    places.popleft()
                if not through_damage:
                    return
                continue
            for frame in frames:
                yield frame, places.popleft() if places else frame.time


def _may_jump(container: Any) -> bool:
    """Whether its format is one of broadcasts, such as MPEG-TS."""
    return bool(container.format.flags & av.format.Flags.ts_discont.value)


def _lasts(frame: Any, usual: float) -> float:
    """Seconds for which the last picture stays; `usual` where it does not say."""
    duration = getattr(frame, "duration", 0)
    return float(duration * frame.time_base) if duration and frame.time_base else usual


def _moving(container: Any) -> Any:
    """The first video of a container that is no cover picture of a piece of music."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        kinds = sorted({s.type for s in container.streams if s.type != "video"})
        raise NoVideo(f"no moving picture, only {' and '.join(kinds) or 'an empty container'}")
    if streams[0].codec_context is None:
        raise NoDecoder("a video of a codec that PyAV cannot decode")
    return streams[0]


def short(error: BaseException) -> str:
    """The reason alone, without PyAV's number of it and the file's name again."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
