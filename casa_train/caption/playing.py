"""Plays videos to streams: frame after frame, as fast as it goes or with the clock.

Several videos play side by side in one batch, and several models beside each other on the same
frames. Of a source that goes with the clock (a camera, or a file in real time), what is not said
when the next frame is due is cut; frames whose time is over it passes over by itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from casa_train.caption.captioner import CaptionStreams, FrameCaption
from casa_train.errors import UserError
from casa_train.video.frame_sources import Frame, FrameSource


@dataclass(frozen=True)
class Spoken:
    """What was said to one frame, and when.

    :param time: of the frame, seconds of the video.
    :param lag: seconds by which the clock is behind the frame's moment once all of it is said, had
        the video played since its first frame; negative: ahead of it.
    :param dropped: frames that were passed over since the one before.
    """

    time: float
    caption: FrameCaption
    lag: float
    dropped: int = 0


class Told(Protocol):
    """Who hears of it. Models and videos go by their numbers."""

    def heard(self, model: int, video: int, time: float, piece: str) -> None:
        """A piece of a frame's words, as its token arrives."""

    def captioned(self, model: int, video: int, spoken: Spoken) -> None:
        """All that a model says to a frame."""

    def ended(self, video: int, reason: str | None) -> None:
        """A video is over. :param reason: why, where that was before its end."""


class Playing:
    """Plays sources to models.

    :param models: streams of each, as many as there are sources.
    """

    def __init__(
        self, models: Sequence[CaptionStreams], sources: Sequence[FrameSource], told: Told
    ) -> None:
        self.models, self.told = list(models), told
        self.sources = list(sources)
        self.numbers = list(range(len(self.sources)))
        self._frames = [iter(source) for source in self.sources]
        self._began: float | None = None
        self._passed = [0] * len(self.sources)  # what each source passed over, as counted so far

    def run(self) -> None:
        """Until every video is over."""
        rounds = 0
        while frames := self._next():
            self._show(frames, rounds)
            rounds += 1

    def _next(self) -> list[Frame]:
        """The next frame of every video that goes on."""
        found: list[Frame | None] = []
        for row in range(len(self.sources)):
            reason = None
            try:
                frame = next(self._frames[row], None)
            except UserError as error:  # the others go on
                frame, reason = None, str(error)
            found.append(frame)
            if frame is None:
                self.told.ended(self.numbers[row], reason or self.sources[row].ended_early)
        if None in found:
            kept = [row for row, frame in enumerate(found) if frame is not None]
            for model in self.models:
                model.keep(kept)
            for name in ("sources", "numbers", "_frames", "_passed"):
                values: list[Any] = getattr(self, name)
                setattr(self, name, [values[row] for row in kept])
        frames = [frame for frame in found if frame is not None]
        if frames and self._began is None:
            # Videos play from their first frames on, so any tells the moment.
            self._began = time.monotonic() - frames[0].time
        return frames

    def _show(self, frames: Sequence[Frame], rounds: int) -> None:
        due = [
            source.began + frame.time + 1 / source.fps
            for source, frame in zip(self.sources, frames, strict=True)
            if source.live and source.began is not None
        ]
        skipped = [
            source.skipped - passed
            for source, passed in zip(self.sources, self._passed, strict=True)
        ]
        self._passed = [source.skipped for source in self.sources]
        order = list(enumerate(self.models))
        # Side by side, each is the first as often as the other: whatever the machine does beside
        # hits all alike.
        for number, model in order[:: -1 if rounds % 2 else 1]:

            def heard(row: int, piece: str, number: int = number) -> None:
                self.told.heard(number, self.numbers[row], frames[row].time, piece)

            shown = [frame.image for frame in frames]
            captions = model.caption(shown, heard, min(due, default=None))
            now = time.monotonic()
            for row, caption in enumerate(captions):
                began = self.sources[row].began if self.sources[row].live else self._began
                lag = now - (began or 0.0) - frames[row].time
                spoken = Spoken(frames[row].time, caption, lag, skipped[row])
                self.told.captioned(number, self.numbers[row], spoken)
