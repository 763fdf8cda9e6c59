"""One stream: frames come, captions go to whoever watches."""

from __future__ import annotations

import asyncio
import io
import sys
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from PIL import Image

from casa_train.caption.captioner import FrameCaption
from casa_train.caption.web.clock import Clock
from casa_train.errors import UserError

WAITING_EVENTS = 2000  # that a viewer may be behind; more, and it is let go
REMEMBERED = 1200  # captions that a viewer who comes later gets: ten minutes at 2 frames a second
PREVIEW = (640, 640)
OVER = ("ended", "stopped", "failed")


class Captions(Protocol):
    """A model's streams; here each holds one."""

    def caption(
        self,
        frames: Sequence[Image.Image],
        heard: Callable[[int, str], None] | None = None,
        deadline: float | None = None,
    ) -> Sequence[FrameCaption]: ...


class Frames(Protocol):
    """Where frames come from: a decoder's process or a camera."""

    @property
    def shown(self) -> str: ...
    @property
    def url(self) -> str | None: ...
    @property
    def duration(self) -> float | None: ...
    @property
    def ended_early(self) -> str: ...
    async def open(self) -> None: ...
    async def close(self) -> None: ...
    def frames(self) -> AsyncIterator[tuple[float, Image.Image]]: ...


class Halted(Exception):
    """Ends an answer in the middle: nobody wants it any more."""


class Viewer:
    """The events that one viewer has not read yet."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(WAITING_EVENTS)
        self.lost = False


class LiveStream:
    """A stream and its viewers. All methods are called in the server's loop.

    Each frame waits for its moment of the stream's clock, so captions are beside the video as it
    plays. Lag is how far the clock is past a frame when its caption is complete.

    :param frames: made with the stream's own clock.
    :param begin: opens the model's stream; called on the model's thread.
    :param on_model: runs a function on the model's thread, in turn with the other streams.
    :param realtime: an answer is cut when 1/fps is spent, and frames whose successor is due are
        passed over; otherwise each frame is captioned in full, and captions may lag ever more.
    """

    def __init__(
        self,
        identity: str,
        clock: Clock,
        frames: Frames,
        begin: Callable[[], Captions],
        on_model: Callable[[Callable[[], Any]], Awaitable[Any]],
        fps: float,
        realtime: bool,
    ) -> None:
        self.identity, self.clock, self.frames, self.begin = identity, clock, frames, begin
        self.on_model, self.fps, self.realtime = on_model, fps, realtime
        self.state, self.message = "opening", ""
        self.skipped = 0
        self.viewers: set[Viewer] = set()
        self.watched = time.monotonic()
        self.captions: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self.picture: Image.Image | None = None
        self._model: Captions | None = None
        self._halted = False
        self._loop = asyncio.get_running_loop()
        self.task = self._loop.create_task(self._run())

    @property
    def over(self) -> bool:
        return self.state in OVER

    def about(self) -> dict[str, Any]:
        """What changes seldom."""
        return {
            "id": self.identity,
            "name": self.frames.shown,
            "url": self.frames.url,
            "state": self.state,
            "message": self.message,
            "position": self.clock.position(),
            "duration": self.frames.duration,
            "fps": self.fps,
            "realtime": self.realtime,
            "viewers": len(self.viewers),
            "skipped": self.passed_over(),
        }

    def passed_over(self) -> int:
        return self.skipped + int(getattr(self.frames, "skipped", 0))

    def pause(self) -> None:
        if self.state == "playing":
            self.clock.stand()
            self._tell("paused")

    def resume(self) -> None:
        if self.state == "paused":
            self.clock.run()
            self._tell("playing")

    def stop(self) -> None:
        """Ends the stream: its child, its answer and its memory."""
        if not self._halted:  # a second time would break off the end of the first
            self._halted = True
            self.task.cancel()

    async def watch(self) -> AsyncIterator[dict[str, Any] | None]:
        """Events for one viewer, from what was so far until the end; None where there was none for
        some seconds.
        """
        viewer = Viewer()
        self.viewers.add(viewer)
        self._count()
        try:
            yield {"event": "hello", **self.about(), "captions": list(self.captions)}
            while not (self.over or viewer.lost) or not viewer.events.empty():
                try:
                    event = await asyncio.wait_for(viewer.events.get(), 5)
                except asyncio.TimeoutError:
                    event = None
                yield event
        finally:
            self.viewers.discard(viewer)
            self.watched = time.monotonic()
            self._count()

    def preview(self) -> bytes | None:
        """The newest frame as a small JPEG picture, for viewers who have no video of their own."""
        if self.picture is None:
            return None
        small = self.picture.copy()
        small.thumbnail(PREVIEW)
        out = io.BytesIO()
        small.save(out, "JPEG", quality=80)
        return out.getvalue()

    async def _run(self) -> None:
        try:
            await self.frames.open()
            self._model = await self.on_model(self.begin)
            async for moment, picture in self.frames.frames():
                if self.state == "opening":
                    self.clock.run()
                    self._tell("playing")
                await self.clock.reach(moment)
                if self.realtime and self.clock.position() >= moment + 1 / self.fps:
                    self.skipped += 1  # the next one is due already
                    continue
                await self._caption(moment, picture)
            if self.frames.duration is not None and not self.frames.ended_early:
                await self.clock.reach(self.frames.duration)
            self._finish("ended", self.frames.ended_early)
        except UserError as error:
            self._finish("failed", str(error))
        except (asyncio.CancelledError, Halted):
            self._finish("stopped")
        except Exception as error:  # one stream's fault ends no other
            traceback.print_exc(file=sys.stderr)
            self._finish("failed", f"{type(error).__name__}: {error}")
        finally:
            self.picture = None
            self._model = None
            await self.frames.close()

    async def _caption(self, moment: float, picture: Image.Image) -> None:
        self.picture = picture
        model = self._model
        self._publish({"event": "frame", "time": moment, "position": self.clock.position()})

        def heard(_: int, text: str) -> None:
            if self._halted:
                raise Halted
            piece = {"event": "piece", "time": moment, "text": text}
            self._loop.call_soon_threadsafe(self._publish, piece)

        def answer() -> FrameCaption:
            if self._halted or model is None:
                raise Halted
            deadline = time.monotonic() + 1 / self.fps if self.realtime else None
            return model.caption([picture], heard, deadline)[0]

        said: FrameCaption = await self.on_model(answer)
        position = self.clock.position()
        caption = {
            "event": "caption",
            "time": moment,
            "position": position,
            "lag": max(position - moment, 0.0),
            **asdict(said),
            "skipped": self.passed_over(),
        }
        self.captions.append(caption)
        self._publish(caption)

    def _count(self) -> None:
        if self.over:
            return  # that it is over is the last event
        self._publish({"event": "viewers", "viewers": len(self.viewers)})

    def _tell(self, state: str, message: str = "") -> None:
        self.state, self.message = state, message
        self._publish({"event": "state", **self.about()})

    def _finish(self, state: str, message: str = "") -> None:
        self.clock.stand()
        self._tell(state, message)

    def _publish(self, event: dict[str, Any]) -> None:
        for viewer in list(self.viewers):
            try:
                viewer.events.put_nowait(event)
            except asyncio.QueueFull:  # it reads too slowly, or is gone without a word
                viewer.lost = True
                self.viewers.discard(viewer)
