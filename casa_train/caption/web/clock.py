"""The time of a stream: it runs while the stream plays and stands while it is paused."""

from __future__ import annotations

import asyncio
import contextlib
import time


class Clock:
    """Seconds of the video that are over, by the machine's clock. Made and used in one loop."""

    def __init__(self) -> None:
        self._passed = 0.0
        self._since: float | None = None
        self._changed = asyncio.Event()

    @property
    def running(self) -> bool:
        return self._since is not None

    def position(self) -> float:
        return self._passed + (0.0 if self._since is None else time.monotonic() - self._since)

    def run(self) -> None:
        if self._since is None:
            self._since = time.monotonic()
            self._changed.set()

    def stand(self) -> None:
        self._passed, self._since = self.position(), None
        self._changed.set()

    async def reach(self, moment: float) -> None:
        """Waits until the clock runs and this moment of the video is over."""
        while not self.running or (left := moment - self.position()) > 0:
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left if self.running else None)
