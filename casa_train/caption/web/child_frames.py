"""The parent's side of `frame_child.py`: frames of a video that another process decodes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from PIL import Image

import casa_train
from casa_train.caption.web.frame_child import FRAME, MESSAGE, MOST_TEXT
from casa_train.caption.web.limits import Limits
from casa_train.errors import UserError

# What a decoder needs to know of this process: where its libraries are, and nothing secret.
INHERITED = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")


class ChildFrames:
    """A video file, decoded in a child process that has limits and inherits nothing.

    The child waits in its pipe while nobody asks for the next frame, so a video of any length takes
    the memory of a few frames.

    :param path: of the file; :param shown: what messages call it.
    :param url: where a browser finds it.
    """

    def __init__(self, path: Path, shown: str, url: str, fps: float, limits: Limits) -> None:
        self.path, self.shown, self.fps, self.limits = path, shown, fps, limits
        self.url: str | None = url
        self.duration: float | None = None
        self.ended_early = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._reader = asyncio.StreamReader()

    async def open(self) -> None:
        """Starts the child and reads what it says of the video.

        :raises UserError: it cannot be decoded.
        """
        package = str(Path(casa_train.__file__).parent.parent)
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        # One thread of linear algebra: each reserves memory, and there is none to do.
        environment |= {"PYTHONPATH": package, "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "casa_train.caption.web.frame_child"),
                *(
                    str(self.path.absolute()),
                    self.shown,
                    str(self.fps),
                    str(self.limits.frame_pixels),
                ),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the child
        )
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._reader), self._process.stdout
        )
        kind, content = await self._message()
        if kind != b"I":
            raise self._broken("it says nothing of itself")
        with contextlib.suppress(ValueError, AttributeError, TypeError):
            seconds = json.loads(content).get("duration")
            self.duration = seconds if seconds and 0 < seconds < math.inf else None

    async def frames(self) -> AsyncIterator[tuple[float, Image.Image]]:
        """(seconds of the video, RGB picture) until its end.

        :raises UserError: it cannot be decoded any further.
        """
        while True:
            kind, content = await self._message()
            if kind == b"D":
                self.ended_early = content.decode("utf-8", "replace")
                return
            if kind != b"F" or len(content) < FRAME.size:
                raise self._broken("its decoder broke off")
            time, width, height = FRAME.unpack_from(content)
            picture = memoryview(content)[FRAME.size :]
            if not math.isfinite(time) or len(picture) != 3 * width * height or not len(picture):
                raise self._broken("its decoder sent no picture")
            yield time, Image.frombytes("RGB", (width, height), picture)

    async def close(self) -> None:
        """Ends the child, whatever it does."""
        if (process := self._process) is None:
            return
        self._process = None
        process.kill()
        if self._pipe is not None:
            self._pipe.close()
        await asyncio.get_running_loop().run_in_executor(None, process.wait)

    async def _message(self) -> tuple[bytes, bytes]:
        try:
            kind, content = await asyncio.wait_for(self._read(), self.limits.frame_seconds)
        except asyncio.IncompleteReadError:
            raise self._broken(
                "decoding it took more memory or time than is allowed, or broke off"
            ) from None
        except asyncio.TimeoutError:
            seconds = f"{self.limits.frame_seconds:g}"
            raise self._broken(f"no picture came out of it for {seconds} s") from None
        if kind == b"E":
            raise UserError(content.decode("utf-8", "replace"))
        return kind, content

    async def _read(self) -> tuple[bytes, bytes]:
        reader = self._reader
        kind, length = MESSAGE.unpack(await reader.readexactly(MESSAGE.size))
        if length > (FRAME.size + 3 * self.limits.frame_pixels if kind == b"F" else MOST_TEXT):
            raise self._broken("its decoder sent too much")
        return kind, await reader.readexactly(length)

    def _broken(self, what: str) -> UserError:
        return UserError(f"video {self.shown}: {what}; expected a film that plays.")
