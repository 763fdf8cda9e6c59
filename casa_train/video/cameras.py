"""Frames of a camera: always its newest picture, however slow the reader is."""

from __future__ import annotations

import errno
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av

from casa_train.errors import UserError
from casa_train.video.containers import FAULTS
from casa_train.video.frames import Frame, FrameSource
from casa_train.video.showing import upright

PATIENCE = 10.0
"""Seconds without a picture after which a camera counts as gone."""

NAME = re.compile(r"camera:(\d+|/dev/\S+)|(/dev/video\d+)")


def camera_device(name: str) -> str | None:
    """`camera:0`, `camera:/dev/video0` or `/dev/video0` -> /dev/video0; None: no camera's name."""
    found = NAME.fullmatch(name)
    if not found:
        if name.startswith("camera:"):
            raise UserError(f"{name}: expected a camera's number, such as camera:0")
        return None
    device = found[1] or found[2]
    return f"/dev/video{device}" if device.isdigit() else device


class Live(FrameSource):
    """Frames of pictures that come in their own time.

    A thread decodes and keeps the newest picture. At every 1/fps of a second the reader gets it;
    ticks that passed while the reader was busy are counted as skipped.

    :param pictures: opens the device and gives each av.VideoFrame as it comes.
    :param patience: seconds without a picture after which it ends.
    :raises UserError: no first picture.
    """

    def __init__(
        self,
        name: str,
        fps: float,
        pictures: Callable[[], Iterator[Any]],
        max_pixels: int,
        patience: float = PATIENCE,
    ) -> None:
        super().__init__(name, fps)
        self.live = True
        self._max_pixels = max_pixels
        self._patience = patience
        self._newest: tuple[Any, float] | None = None  # the picture and when it came
        self._failed: BaseException | None = None
        self._over = False
        self._changed = threading.Condition()
        # A device may keep a read for ever; such a thread does not keep the process.
        self._thread = threading.Thread(target=self._follow, args=(pictures,), daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._newest or self._over, timeout=patience)
        if self._newest is None:
            self.close()
            if isinstance(self._failed, UserError):
                raise self._failed
            why = f"{self._failed}" if self._failed else f"none in {patience:.0f} s"
            raise UserError(
                f"{name}: no picture came ({why}); expected a camera that sends some; is it "
                "covered by a switch, or used by another program?"
            )
        frame = self._newest[0]
        self.size = (frame.width, frame.height)

    def _follow(self, pictures: Callable[[], Iterator[Any]]) -> None:
        try:
            for frame in pictures():
                with self._changed:
                    self._newest = (frame, time.monotonic())
                    self._changed.notify_all()
                if self.closed:
                    return
        except (UserError, *FAULTS) as error:
            self._failed = error
        finally:
            with self._changed:
                self._over = True
                self._changed.notify_all()

    def __iter__(self) -> Iterator[Frame]:
        tick = 0
        while not self.closed:
            moment = tick / self.fps
            tick += 1
            if not self._due(moment):
                continue
            picture = None if self.closed else self._picture()
            if picture is None:
                return
            yield Frame(moment, upright(picture, self._max_pixels))

    def _picture(self) -> Any:
        """The newest one; None, with the reason in `ended_early`, where no more will come."""
        with self._changed:
            over, newest = self._over, self._newest
        still = time.monotonic() - newest[1] if newest else 0.0
        if over:
            self.ended_early = f"sends nothing more ({self._failed or 'it ended'})"
        elif still > self._patience:
            self.ended_early = f"has sent no picture for {still:.0f} s"
        return newest[0] if newest and self.ended_early is None else None

    def close(self) -> None:
        super().close()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1.0)  # the device is free for the next one by then


class Camera(Live):
    """A camera of this machine.

    :param device: /dev/video0.
    :raises UserError: no such camera, or one that is in use, not allowed, or sends nothing.
    """

    def __init__(self, device: str, name: str, fps: float, max_pixels: int) -> None:
        if not sys.platform.startswith("linux"):
            raise UserError(
                f"{name}: cameras are read on Linux; expected a file or standard input; send the "
                "camera with: ffmpeg -f avfoundation -i 0 -f mpegts - | ..."
            )
        if not Path(device).exists():
            there = sorted(str(path) for path in Path("/dev").glob("video*"))
            raise UserError(
                f"{name}: no camera {device}; found {', '.join(there) or 'no camera'}; expected "
                "one that is connected"
            )
        super().__init__(name, fps, lambda: self._pictures(device), max_pixels)

    def _pictures(self, device: str) -> Iterator[Any]:
        try:
            container = av.open(device, format="v4l2")
        except FAULTS as error:
            raise UserError(_refused(self.name, device, error)) from error
        with container:
            yield from container.decode(video=0)


def _refused(name: str, device: str, error: BaseException) -> str:
    number = getattr(error, "errno", None)
    if number == errno.EBUSY:
        return f"{name}: {device} is used by another program; close that one"
    if number in (errno.EACCES, errno.EPERM):
        return f"{name}: {device} may not be opened; expected a user of the group video; join it"
    if number in (errno.ENOTTY, errno.EINVAL, errno.ENODEV):
        return f"{name}: {device} sends no pictures; expected a camera; try the next number"
    return f"{name}: {device} cannot be opened ({error}); expected a camera that is connected"
