"""Frames of a video file, of an uploaded one, or of a container that comes through a pipe."""

from __future__ import annotations

import math
import os
import select
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO

from PIL import Image

from casa_train.errors import UserError
from casa_train.video.containers import FAULTS, NoDecoder, NoVideo, Video, short
from casa_train.video.frames import Frame, FrameSource
from casa_train.video.showing import EXACT, moments, shown_at, upright

LONGEST_LAST = 60.0
"""Most seconds for which the last picture stays: what a container says of it may be any number."""

CUT = 0.5
"""Seconds by which a whole video may end before its header says."""

THREADS = 4  # more hold more decoded pictures, and 4K decodes in time with these

KINDS = "expected a video such as MP4, Matroska, WebM, AVI or MPEG-TS"


class Pipe:
    """A file descriptor that is read until its writer closes it, or until it is told to end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ended, self._end = os.pipe()
        self._open = True
        self._lock = threading.Lock()

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        ready, _, _ = select.select([self._descriptor, self._ended], [], [])
        return b"" if self._ended in ready else os.read(self._descriptor, size)

    def end(self) -> None:
        """Wakes a read that waits; it gives nothing more. From any thread."""
        with self._lock:
            if self._open:
                os.write(self._end, b".")

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = False
                os.close(self._ended)
                os.close(self._end)


class VideoFile(FrameSource):
    """Frames of one container, decoded in the thread that iterates, in constant memory.

    What is damaged is left out, as a player does. A file that is cut plays as far as it goes, and
    `ended_early` says so.

    :param file: is closed with the source.
    :param start: first moment, and :param end: the one before which it ends, in seconds of the
        video; None: its end.
    :param max_pixels: of a frame.
    :param realtime: give each frame when its moment comes, and pass over moments that went by.
    :raises UserError: no video, or none that can be decoded.
    """

    def __init__(
        self,
        file: BinaryIO | Pipe,
        name: str,
        fps: float,
        *,
        start: float,
        end: float | None,
        max_pixels: int,
        realtime: bool,
    ) -> None:
        super().__init__(name, fps)
        self.live = realtime
        self.start, self.end = start, math.inf if end is None else end
        self._max_pixels = max_pixels
        self._file = file
        self._in_use = threading.Lock()  # held by who may touch the container
        self._iterated = False
        self._played = 0.0  # seconds that were decoded
        self._video: Video | None = None
        try:
            self._video = self._open()
            self._pictures = self._from_start(self._video)
        except BaseException:
            self.close()
            raise

    def _open(self) -> Video:
        file: Any = self._file
        try:
            return Video(file, self.name, self._closed, THREADS)
        except NoVideo as error:
            raise UserError(f"{self.name}: found {error}; {KINDS}") from error
        except NoDecoder as error:
            raise _undecodable(self.name, str(error)) from error
        except FAULTS as error:
            raise self._unreadable(short(error)) from error

    def _unreadable(self, why: str) -> UserError:
        how = "is it whole?"
        if isinstance(self._file, Pipe):
            how = "a piped one is read in order: send MPEG-TS, Matroska or fragmented MP4"
        return UserError(f"{self.name}: cannot be read as a video ({why}); {KINDS}; {how}")

    def _from_start(self, video: Video) -> Iterator[tuple[float, Any]]:
        """The video's pictures, the first of them decoded, from the one shown at the start on."""
        self.duration = video.announced
        if 0 < self.start and self.duration and self.start >= self.duration:
            raise UserError(
                f"start: {self.start} s, and {self.name} lasts {self.duration:.1f} s; expected a "
                "moment before its end"
            )
        if self.start > 0 and not isinstance(self._file, Pipe) and self._file.seekable():
            found = self._sought(video)
            if found is not None:
                return found
            # It went too far, or nowhere: some containers have no list of their key pictures.
            video.close()
            self._file.seek(0)
            video = self._video = self._open()
        pictures = video.pictures(through_damage=True)
        first = next(pictures, None)
        if first is None:
            codec = video.stream.codec_context.name
            if isinstance(self._file, Pipe):
                raise self._unreadable(f"no picture of its {codec} came")
            raise _undecodable(self.name, f"a {codec} video, no picture of which can be decoded")
        self._measure(video, first[1])
        return chain([first], pictures)

    def _sought(self, video: Video) -> Iterator[tuple[float, Any]] | None:
        """The pictures from the one shown at the start on; None where seeking misses it."""
        try:
            video.seek(self.start)
        except FAULTS:
            return None
        pictures = video.pictures(through_damage=True)
        first = next(pictures, None)
        if first is None or first[0] > self.start + EXACT:
            return None
        self._measure(video, first[1])
        return chain([first], pictures)

    def _measure(self, video: Video, frame: Any) -> None:
        self.offset = max(0.0, (video.origin or 0.0) - video.begins)
        sideways = getattr(frame, "rotation", 0) % 180 == 90
        self.size = (frame.height, frame.width) if sideways else (frame.width, frame.height)

    def __iter__(self) -> Iterator[Frame]:
        if self._iterated:
            raise RuntimeError("a source of frames is read once")
        self._iterated = True
        with self._in_use:
            try:
                yield from self._frames()
            finally:
                self._closed.set()
                self._release()

    def _frames(self) -> Iterator[Frame]:
        before, image = None, Image.new("RGB", (1, 1))
        for moment, frame in shown_at(self._until_end(), moments(self.start, self.fps, self.end)):
            if self.live and not self._due(moment, self.start):
                continue
            if self.closed:
                return
            if frame is not before:
                before, image = frame, upright(frame, self._max_pixels)
            yield Frame(moment, image)

    def _until_end(self) -> Iterator[tuple[float, Any]]:
        last = 0.0
        for begins, frame in self._pictures:
            if self.closed:
                return
            self._played = begins
            yield (begins, frame) if frame is not None else (min(begins, last + LONGEST_LAST), None)
            last = begins
        if not self.closed:
            self._look_whether_cut()

    def _look_whether_cut(self) -> None:
        if self._video is None or self._played >= self.end - EXACT:
            return
        reached = max(self._played, self._video.reached)
        if self._video.fault:
            self.ended_early = f"cannot be read beyond {reached:.1f} s ({self._video.fault})"
        elif self._video.jumped:
            return  # what a header says of a clock that jumps is no length
        elif self.duration and self.duration - reached > CUT:
            self.ended_early = (
                f"ends after {reached:.1f} s, and its header announces {self.duration:.1f} s"
            )

    def close(self) -> None:
        super().close()
        if isinstance(self._file, Pipe):
            self._file.end()
        # Who iterates closes the container: another thread may not while it decodes.
        if self._in_use.acquire(blocking=False):
            try:
                self._release()
            finally:
                self._in_use.release()

    def _release(self) -> None:
        if self._video is not None:
            self._video.close()
        self._file.close()


def _undecodable(name: str, found: str) -> UserError:
    return UserError(
        f"{name}: found {found}; expected one that this installation of PyAV decodes, such as "
        "H.264; convert it with: ffmpeg -i VIDEO -c:v libx264 OUT.mp4"
    )
