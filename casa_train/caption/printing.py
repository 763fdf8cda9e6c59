"""Captions on a terminal, and what a whole video came to."""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from casa_train.caption.cues import SPACED
from casa_train.caption.playing import Spoken
from casa_train.io.log import log
from casa_train.io.numbers import MISSING, memory
from casa_train.io.tables import aligned

REMEMBERED = 4096
"""Frames whose figures a summary's medians are from, so that a camera may run for days."""


@dataclass
class Totals:
    """What a model came to on one video."""

    frames: int = 0
    spoken: int = 0
    dropped: int = 0
    cut: int = 0
    first_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    rates: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    cache: tuple[int, int] = (0, 0)
    most_memory: int = 0
    last: Spoken | None = None

    def add(self, spoken: Spoken) -> None:
        caption = spoken.caption
        self.frames += 1
        self.spoken += bool(caption.text)
        self.dropped += spoken.dropped
        self.cut += caption.cut
        self.first_tokens.append(caption.first_token)
        if caption.tokens_per_second is not None:
            self.rates.append(caption.tokens_per_second)
        first = self.cache[0] if self.last is not None else caption.cache_tokens
        self.cache = first, caption.cache_tokens
        self.most_memory = max(self.most_memory, caption.memory_bytes)
        self.last = spoken

    def row(self) -> tuple[str, ...]:
        first = (
            f"{1e3 * statistics.median(self.first_tokens):.1f}" if self.first_tokens else MISSING
        )
        rate = f"{statistics.median(self.rates):.1f}" if self.rates else MISSING
        lag = MISSING if self.last is None else f"{self.last.lag:+.2f}"
        cache = f"{self.cache[0]:,} -> {self.cache[1]:,}"
        numbers = (self.frames, self.spoken, self.cut, self.dropped)
        return (*map(str, numbers), first, rate, lag, cache, memory(self.most_memory))


HEAD = (
    *("frames", "spoken to", "cut", "dropped", "first token, ms", "tokens/s", "lag, s"),
    *("cache tokens", "memory"),
)


class Printer:
    """Prints captions as they come; of several videos or models each line names its own.

    :param models: their labels; :param videos: their names.
    :param alone: nothing else is left of captions, so that without a reader there is nothing to do.
    :raises BrokenPipeError: nobody reads any more what is said to them `alone`.
    """

    def __init__(self, models: Sequence[str], videos: Sequence[str], alone: bool = False) -> None:
        self.models = list(models)
        self.videos = [name.translate(SPACED) for name in videos]
        self._gone: type[OSError] | tuple[()] = BrokenPipeError if alone else ()
        self.totals: dict[tuple[int, int], Totals] = defaultdict(Totals)
        self._alone = len(models) == len(videos) == 1
        self._width = max(
            len(self._named(m, v)) for m in range(len(models)) for v in range(len(videos))
        )
        self._begun = False

    def heard(self, model: int, video: int, time: float, piece: str) -> None:
        """Only a single stream shows words before a frame's are complete."""
        if not self._alone:
            return
        self._say(piece if self._begun else f"{_clock(time)}  {piece.lstrip()}")
        self._begun = True

    def captioned(self, model: int, video: int, spoken: Spoken) -> None:
        self.totals[model, video].add(spoken)
        caption = spoken.caption
        notes = [f"{spoken.lag:+.2f} s"]
        notes += ["cut"] * caption.cut + [f"{spoken.dropped} dropped"] * (spoken.dropped > 0)
        end = f"  [{', '.join(notes)}]"
        if self._alone and self._begun:
            self._say(end, "\n")
        elif caption.text:
            name = self._named(model, video).ljust(self._width)
            line = f"{name}{'  ' if name else ''}{_clock(spoken.time)}  {caption.text}{end}"
            self._say(line, "\n")
        self._begun = False

    def _say(self, text: str, end: str = "") -> None:
        """As with `log`, a console on a full disk ends nothing."""
        try:
            print(text.translate(SPACED), end=end, flush=True)
        except self._gone:
            raise
        except OSError:
            pass

    def ended(self, video: int, reason: str | None) -> None:
        if reason is not None:
            log(f"{self.videos[video]}: {reason}")

    def summary(self) -> str:
        """A row for every model and video."""
        rows: list[tuple[str, ...]] = [("", *HEAD)]
        for (model, video), totals in sorted(self.totals.items()):
            rows.append((self._named(model, video) or self.videos[video], *totals.row()))
        return aligned(rows) if len(rows) > 1 else "no frame was seen"

    def _named(self, model: int, video: int) -> str:
        names = [self.models[model]] * (len(self.models) > 1)
        return " ".join([*names, *([self.videos[video]] * (len(self.videos) > 1))])


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"
