"""Words of frames -> the lines of subtitles: they roll up, as in live television."""

from __future__ import annotations

from casa_train.video.burning import Cue

WIDTH = 42  # characters of a line, as broadcasters have them
LINES = 2
HOLD = 4.0  # seconds for which the last words stay
PAUSE = 3.0  # seconds of silence, after which a line begins anew

SPACED = {code: " " for code in (*range(0x20), *range(0x7F, 0xA0))}
"""For `str.translate`: what would steer a terminal or a player becomes space."""


class RollUp:
    """Makes cues as words come.

    Every frame with words begins a cue, which shows them behind the words before; it ends when the
    next one begins, or after `HOLD` seconds.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._open: tuple[float, str] | None = None
        self._last = 0.0  # when words came last

    def add(self, time: float, words: str) -> list[Cue]:
        """Takes the words of a frame, or none; returns the cues that are complete with it."""
        words = " ".join(words.translate(SPACED).split())
        done = []
        if self._open is not None and (words or time - self._open[0] >= HOLD):
            done = self.close(time)
        if not words:
            return done
        if time - self._last >= PAUSE:
            self._lines = []
        self._last = time
        for word in words.split(" "):
            line = f"{self._lines[-1]} {word}" if self._lines else word
            if self._lines and len(line) <= WIDTH:
                self._lines[-1] = line
            else:
                self._lines = [*self._lines[1 - LINES :], word]
        self._open = time, "\n".join(self._lines)
        return done

    def close(self, end: float) -> list[Cue]:
        """Completes the open cue. :param end: of what was seen."""
        if self._open is None:
            return []
        start, text = self._open
        self._open = None
        return [Cue(start, max(start + 0.001, min(end, start + HOLD)), text)]
