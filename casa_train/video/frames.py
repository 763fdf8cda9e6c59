"""What every source of frames is: frames in order of time, until it ends or is closed."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Frame:
    """A picture and when it is shown.

    :param time: seconds of the video since its first picture.
    :param image: RGB, upright; of pixels as they are stored, also where a player stretches them.
    """

    time: float
    image: Image.Image


class FrameSource(ABC):
    """Frames at `fps` moments a second, each what a player shows at that moment.

    Iterate over it once. `close` may be called from any thread, at any time and more than once; it
    ends an iteration that waits. A source is its own context manager.
    """

    def __init__(self, name: str, fps: float) -> None:
        self.name = name
        """What messages call it."""
        self.fps = fps
        """Moments a second."""
        self.duration: float | None = None
        """Seconds that it lasts, as its header says, which is not always true; None: unknown."""
        self.live = False
        """Whether time goes on while the reader works: a camera, or a file played in real time."""
        self.skipped = 0
        """Moments that a live source passed over because its reader lagged."""
        self.began: float | None = None
        """Of a live source that is being read, `time.monotonic()` at its second 0."""
        self.size: tuple[int, int] = (0, 0)
        """Width and height of its upright pictures in stored pixels, before frames are scaled."""
        self.ended_early: str | None = None
        """Why it ended before it should have; None where it did not."""
        self.offset = 0.0
        """Second of a player's clock at which its second 0 is shown: sound may begin before."""
        self._closed = threading.Event()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    @abstractmethod
    def __iter__(self) -> Iterator[Frame]: ...

    def close(self) -> None:
        """Ends the source; an iteration over it ends as if it had no more frames."""
        self._closed.set()

    def __enter__(self) -> FrameSource:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _due(self, moment: float, start: float = 0.0) -> bool:
        """Waits on the clock for a moment of a live source; the first call starts the clock.

        :param moment: seconds of the source; :param start: its first moment.
        :returns: False where the next moment has come already, which counts this one as skipped.
        """
        now = time.monotonic()
        if self.began is None:
            self.began = now - start
        ahead = self.began + moment - now
        if ahead > 0:
            self._closed.wait(ahead)
        elif -ahead >= 1 / self.fps:
            self.skipped += 1
            return False
        return True
