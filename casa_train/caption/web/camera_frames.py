"""Frames that a browser's camera sends, one request each."""

from __future__ import annotations

import asyncio
import io
import warnings
from collections.abc import AsyncIterator

from PIL import Image, UnidentifiedImageError

from casa_train.caption.web.clock import Clock
from casa_train.caption.web.limits import Limits
from casa_train.errors import UserError

MOST_SCANS = 16  # of a JPEG: a progressive one has ten, and a camera's one


class CameraFrames:
    """The newest frame that came; one that nobody took before the next came is skipped.

    A frame's time is that of its arrival on the stream's clock.

    :param skipped: how many frames were passed over.
    """

    shown = "camera"
    url: str | None = None
    ended_early = ""
    duration: float | None = None

    def __init__(self, clock: Clock, limits: Limits) -> None:
        self.clock, self.limits = clock, limits
        self.skipped = 0
        self._begun = False
        self._newest: tuple[float, Image.Image] | None = None
        self._arrived = asyncio.Event()

    async def open(self) -> None:
        """There is nothing to open: the browser does."""

    async def close(self) -> None:
        self._newest = None

    def arrive(self, picture: Image.Image) -> None:
        self.skipped += self._newest is not None
        self._begun = True
        self._newest = self.clock.position(), picture
        self._arrived.set()

    async def frames(self) -> AsyncIterator[tuple[float, Image.Image]]:
        """(seconds, RGB picture), until none comes any more.

        :raises UserError: the camera is silent.
        """
        while True:
            self._arrived.clear()
            if self._newest is None:
                await self._wait()
            if self._newest is not None:
                frame, self._newest = self._newest, None
                yield frame

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._arrived.wait(), self.limits.camera_silence)
        except asyncio.TimeoutError:
            # The clock stands while the stream is paused, and before the first frame.
            if self.clock.running or not self._begun:
                seconds = f"{self.limits.camera_silence:g}"
                raise UserError(f"the camera sent no picture for {seconds} s") from None


def read_picture(content: bytes, pixels: int) -> Image.Image:
    """A camera's JPEG as an RGB picture; its size is looked at before it is decoded.

    :raises UserError: it is none, has more than so many pixels, or more scans than a camera makes:
        each costs a pass over the whole picture and takes ten bytes of the file.
    """
    scans = content.count(b"\xff\xda")  # within a scan's data, a zero follows every 0xff
    if scans > MOST_SCANS:
        raise UserError(f"a frame of {scans:,} JPEG scans; at most {MOST_SCANS} are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of bombs that it would still decode
            image = Image.open(io.BytesIO(content), formats=["JPEG"])
            if image.width * image.height > pixels:
                size = f"{image.width} x {image.height}"
                raise UserError(f"a frame of {size} pixels; at most {pixels:,} are taken.")
            return image.convert("RGB")
    except (
        *(UnidentifiedImageError, OSError, SyntaxError, ValueError),
        *(Image.DecompressionBombError, Warning),
    ) as error:
        raise UserError(f"a frame that is no JPEG picture ({error}); expected one.") from None
