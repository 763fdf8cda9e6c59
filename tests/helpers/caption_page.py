"""The page of live captions for tests: a captioner that needs no model, a server in a thread, small
videos, and a viewer that reads events.

python -m tests.helpers.caption_page VIDEOS PORT serves it, to look at.
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import httpx
import numpy as np
from PIL import Image, ImageDraw

from casa_train.caption.captioner import FrameCaption
from casa_train.caption.options import CaptionOptions
from casa_train.caption.web.address import bind
from casa_train.caption.web.hub import Hub
from casa_train.caption.web.limits import Limits
from casa_train.caption.web.running import make_server

OWN = {"X-Casa-Caption": "1"}
WORDS = "a red ball rolls to the left . now it stops . nothing moves for a while".split()


@dataclass
class StandIn:
    """A captioner that says the next word of `words` to each frame, in two pieces.

    :param seconds: that it thinks for each piece.
    :ivar asked: (second, number of the stream) of every frame; :ivar opened: what each was asked.
    :ivar live: its streams that are still there.
    """

    options: CaptionOptions = field(default_factory=CaptionOptions)
    words: Sequence[str] = tuple(WORDS)
    seconds: float = 0.0
    asked: list[tuple[float, int]] = field(default_factory=list)
    opened: list[CaptionOptions] = field(default_factory=list)
    live: weakref.WeakSet[StandInStream] = field(default_factory=weakref.WeakSet)
    processor: Any = field(default_factory=lambda: SimpleNamespace(max_pixels=84 * 84))

    def asking(self, **values: Any) -> StandIn:
        options = self.options.changed(**values)
        options.check()
        return replace(self, options=options)  # lists are shared

    def open(self) -> StandInStream:
        self.opened.append(self.options)
        stream = StandInStream(self, len(self.opened) - 1)
        self.live.add(stream)
        return stream


class StandInStream:
    def __init__(self, model: StandIn, number: int) -> None:
        self.model, self.number, self.frames = model, number, 0

    def caption(
        self,
        frames: Sequence[Image.Image],
        heard: Callable[[int, str], None] | None = None,
        deadline: float | None = None,
    ) -> list[FrameCaption]:
        assert len(frames) == 1 and frames[0].mode == "RGB"
        if self.model.options.prompt == "break":
            raise RuntimeError("out of luck")
        self.model.asked.append((time.monotonic(), self.number))
        word = self.model.words[self.frames % len(self.model.words)]
        self.frames += 1
        said = ""
        for piece in (word[:2], word[2:] + " "):
            time.sleep(self.model.seconds)
            said += piece
            if heard is not None:
                heard(0, piece)
            if deadline is not None and time.monotonic() >= deadline:
                break
        cut = said != word + " "
        return [FrameCaption(said, 2, 0.01, 50.0, 3 * self.frames, 5 << 20, cut)]


@dataclass
class Page:
    """A server that runs."""

    url: str
    hub: Hub
    client: httpx.Client
    token: str | None

    def start(self, source: dict[str, Any], realtime: bool = False, **options: Any) -> str:
        """Starts a stream; returns its id."""
        wanted = {"source": source, "options": options, "realtime": realtime}
        answer = self.client.post("/streams", json=wanted)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def upload(self, content: bytes, name: str = "clip.mp4") -> httpx.Response:
        return self.client.post("/uploads", content=content, headers={"X-File-Name": name})

    def watch(self, stream: str, until: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """Events up to one that fits, or to the end of the stream."""
        found: list[dict[str, Any]] = []
        with self.client.stream("GET", f"/streams/{stream}/events") as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    found.append(json.loads(line[6:]))
                    if until(found[-1]):
                        break
        return found

    def to_the_end(self, stream: str) -> list[dict[str, Any]]:
        return self.watch(stream, lambda event: False)


@contextlib.contextmanager
def serving(
    captioner: Any, limits: Limits | None = None, videos: Path | None = None, **where: Any
) -> Iterator[Page]:
    """A server on a free port, in a thread of this process.

    :param where: host, port and token.
    """
    address = bind(**{"host": "127.0.0.1", "port": 0, **where})
    server = make_server(captioner, "tiny", address, 2.0, limits or Limits(), videos)
    thread = threading.Thread(target=server.run, args=([address.listening],))
    thread.start()
    url = f"http://127.0.0.1:{address.listening.getsockname()[1]}"
    client = httpx.Client(base_url=url, headers=OWN, timeout=60)
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        yield Page(url, server.hub, client, address.token)
    finally:
        client.close()
        server.should_exit = True
        server.hub.end_soon()
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def write_video(
    path: Path, seconds: float = 2.0, codec: str = "libx264", size: tuple[int, int] = (160, 90)
) -> Path:
    """Ten pictures a second of a ball that rolls."""
    width, height = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(round(seconds * 10)):
            image = Image.new("RGB", size, (30, 60, 90 + number % 100))
            x = number * width // 40 % width
            ImageDraw.Draw(image).ellipse((x, height // 3, x + height // 3, 2 * height // 3), "red")
            frame = av.VideoFrame.from_ndarray(np.asarray(image), "rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def main() -> None:
    with serving(StandIn(seconds=0.05), None, Path(sys.argv[1]), port=int(sys.argv[2])) as page:
        print(page.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
