"""All streams of a server, and the one thread on which the model works."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from casa_train.caption.web.camera_frames import CameraFrames
from casa_train.caption.web.child_frames import ChildFrames
from casa_train.caption.web.clock import Clock
from casa_train.caption.web.limits import Limits
from casa_train.caption.web.live_stream import Captions, Frames, LiveStream
from casa_train.caption.web.uploads import Uploads, Video, video_in, videos_in
from casa_train.errors import UserError

SWEEP_SECONDS = 1.0


class Hub:
    """Streams by their names, on one model.

    The model's thread takes one frame at a time in the order of asking, and a stream asks for its
    next frame when it has the answer to the last: so streams take turns.

    :param begin: opens the model's stream with a visitor's options; raises UserError on wrong ones
        when it is called with them, and returns what opens it on the model's thread.
    :param videos: the folder of videos that anybody may choose.
    """

    def __init__(
        self,
        begin: Callable[[Mapping[str, Any]], Callable[[], Captions]],
        fps: float,
        limits: Limits,
        videos: Path | None = None,
    ) -> None:
        self.begin, self.fps, self.limits, self.folder = begin, fps, limits, videos
        self.streams: dict[str, LiveStream] = {}
        self.uploads = Uploads(limits)
        self._model = ThreadPoolExecutor(1, "model")
        self._sweeper: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = False

    def open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.create_task(self._sweep())

    def end_soon(self) -> None:
        """Ends all streams from wherever this is called, such as a signal."""
        self._ending = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.stop_all)

    async def close(self) -> None:
        """Ends all streams and their children, and removes the uploads."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.stop_all()
        await asyncio.gather(*(s.task for s in self.streams.values()), return_exceptions=True)
        self._model.shutdown(wait=False, cancel_futures=True)
        self.uploads.close()

    def stop_all(self) -> None:
        for stream in self.streams.values():
            stream.stop()

    def videos(self) -> dict[str, Video]:
        return videos_in(self.folder)

    def video(self, source: Mapping[str, Any]) -> Video:
        """The video that a visitor chose.

        :raises UserError: there is none.
        """
        name = source.get("video", source.get("upload"))
        found = None
        if isinstance(name, str):
            upload = "video" not in source
            found = self.uploads.videos.get(name) if upload else video_in(self.folder, name)
        if found is None:
            raise UserError(f"video {str(name)[:100]!r} is not among those here; choose another.")
        return found

    def start(
        self, source: Mapping[str, Any], options: Mapping[str, Any], realtime: bool
    ) -> LiveStream:
        """Starts a stream of {"video": name}, {"upload": id} or {"camera": true}.

        :raises UserError: source or options are none, or there are enough streams.
        """
        if self._ending:
            raise UserError("the server ends.")
        running = [stream for stream in self.streams.values() if not stream.over]
        if len(running) >= self.limits.streams:
            raise UserError(
                f"{len(running)} streams are running; at most {self.limits.streams} are taken "
                "(--max-streams). Stop one, or watch one of them."
            )
        begin = self.begin(options)
        clock = Clock()
        frames: Frames
        video = None
        if source.get("camera") is True:
            frames = CameraFrames(clock, self.limits)
        else:
            video = self.video(source)
            frames = ChildFrames(video.path, video.name, video.url, self.fps, self.limits)
        identity = secrets.token_hex(8)
        stream = LiveStream(identity, clock, frames, begin, self._on_model, self.fps, realtime)
        self.streams[identity] = stream
        if video is not None:
            video.readers += 1
            chosen = video
            stream.task.add_done_callback(lambda _: self._released(chosen))
        return stream

    def find(self, identity: str) -> LiveStream:
        """
        :raises UserError: there is no such stream (any more).
        """
        if identity not in self.streams:
            raise UserError("this stream is no longer there; start another.")
        return self.streams[identity]

    def _released(self, video: Video) -> None:
        video.readers -= 1

    def _on_model(self, work: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._model, work)

    async def _sweep(self) -> None:
        """Ends streams that nobody watches, and forgets those that are over."""
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self.limits.nobody / 4))
            for identity, stream in list(self.streams.items()):
                if stream.viewers:
                    continue
                if time.monotonic() - stream.watched > self.limits.nobody:
                    stream.stop()
                    if stream.task.done():
                        del self.streams[identity]
