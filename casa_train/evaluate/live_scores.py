"""How live captions compare with the words that were due: by the second, in delay, in silence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

QUIET = 1.0
"""Seconds around a frame, one frame at least, in which nothing is due where it counts as silence:
words that come a frame early or late are a delay, and no false words."""

EXACT = 1e-6  # seconds by which differences of times in decimals are off

LATEST = 5.0
"""Seconds after which words that were due no longer count as said late, but as missed."""


@dataclass(frozen=True)
class ClipCaptions:
    """One clip: what was due at each frame, and what was said.

    :param times: seconds of the frames, ascending.
    :param due: the words of each frame, empty where there are none; :param said: likewise.
    """

    times: tuple[float, ...]
    due: tuple[str, ...]
    said: tuple[str, ...]


@dataclass
class LiveScore:
    """Sums over clips.

    :param seconds: of the videos in which something is due or said; :param matched: those of them
        in which just that is said.
    :param delays: frames between the frame at which words were due and that at which they were
        said, for all that were; negative: too early.
    :param events: frames at which words were due.
    :param silence: seconds of silence, :param false_words: words that were said in them.
    """

    clips: int = 0
    seconds: int = 0
    matched: int = 0
    delays: list[int] = field(default_factory=list)
    events: int = 0
    silence: float = 0.0
    false_words: int = 0

    def add(self, clip: ClipCaptions) -> None:
        """Takes one more clip."""
        due, said = ([plain(text) for text in texts] for texts in (clip.due, clip.said))
        self.clips += 1
        by_second: dict[int, tuple[list[str], list[str]]] = {}
        for time, a, b in zip(clip.times, due, said, strict=True):
            texts = by_second.setdefault(math.floor(time - clip.times[0] + EXACT), ([], []))
            for words, text in zip(texts, (a, b), strict=True):
                words += text.split()
        for expected, found in by_second.values():
            if expected or found:
                self.seconds += 1
                self.matched += expected == found
        self.events += sum(map(bool, due))
        self.delays += _delays(clip.times, due, said)
        step = _step(clip.times)
        quiet = max(QUIET, step) + EXACT
        for i, time in enumerate(clip.times):
            near = (w for t, w in zip(clip.times, due, strict=True) if abs(t - time) <= quiet)
            if not any(near):
                self.silence += step
                self.false_words += len(said[i].split())

    def record(self) -> dict[str, Any]:
        """Shares from 0 to 1, delays in frames; None where nothing can be said."""
        return {
            "clips": self.clips,
            "seconds": self.seconds,
            "match": self.matched / self.seconds if self.seconds else None,
            "events": self.events,
            "median_delay_frames": statistics.median(self.delays) if self.delays else None,
            "found": len(self.delays) / self.events if self.events else None,
            "silent_seconds": self.silence,
            "false_words": self.false_words,
            "false_words_per_minute": 60 * self.false_words / self.silence
            if self.silence
            else None,
        }


def plain(text: str) -> str:
    """Words as they are compared: without regard to case and space."""
    return " ".join(text.casefold().split())


def _step(times: Sequence[float]) -> float:
    """Seconds between two frames."""
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


def _delays(times: Sequence[float], due: Sequence[str], said: Sequence[str]) -> list[int]:
    """For the words of each frame, how many frames later they were said, in the order of speech.

    Words are found once: at the frame nearest to where they were due, none of which lies before
    what was found for words that were due earlier.
    """
    delays = []
    start = 0
    early = max(QUIET, _step(times)) + EXACT
    for i, words in enumerate(due):
        if not words:
            continue
        close = [
            j
            for j in range(start, len(said))
            if said[j] == words and times[i] - early <= times[j] <= times[i] + LATEST + EXACT
        ]
        if close:
            nearest = min(close, key=lambda j: (abs(j - i), j))
            delays.append(nearest - i)
            start = nearest + 1
    return delays
