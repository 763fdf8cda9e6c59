"""How many streams one process holds at so many frames a second."""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm import tqdm

from casa_train.bench._streams import Script, Stream
from casa_train.bench._timing import synchronise
from casa_train.bench._turn_forms import TurnForm
from casa_train.io.numbers import MISSING
from casa_train.io.tables import aligned

METHOD = """\
--fps X asks how many streams of X frames a second one process holds. A round gives each of N
streams its next frame and text and takes the new tokens, either as one batch or one stream after
the other; N is held where the 95th percentile of --rounds rounds, and so their median, is within
1/X seconds. N is found by doubling and bisection, and once more for the median alone, which moves
less with what else the machine does. Rounds follow each other without a pause, after two that do
not count; where more than half of them are late the rest is left out. The past of a stream is
played once and copied for every N: one turn, then --turns. Decoding of videos is not in it. The
searches run one after the other, so that a busy machine is not alike for all.
"""

BATCHED, SINGLY = "batched", "one by one"
WAYS = (BATCHED, SINGLY)
YOUNG = 1  # turns that the streams of `first` have behind them
WARM_UP_ROUNDS = 2
SHARE = 0.95  # of the rounds that must be in time


@dataclass(frozen=True)
class Rounds:
    """Rounds of so many streams.

    :param seconds: of each round; empty where memory did not suffice.
    :param stream_bytes: of all caches and states after the last round.
    :param memory_bytes: weights, caches, states and temporaries at the peak; None on the CPU.
    """

    streams: int
    seconds: tuple[float, ...]
    stream_bytes: int
    memory_bytes: int | None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.inf

    @property
    def slow(self) -> float:
        """The 95th percentile, by nearest rank."""
        if not self.seconds:
            return math.inf
        return sorted(self.seconds)[math.ceil(SHARE * len(self.seconds)) - 1]

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity: None."""
        values = {"median": self.median, "percentile_95": self.slow}
        finite = {name: x if math.isfinite(x) else None for name, x in values.items()}
        return {**asdict(self), **finite}


def most_held(holds: Callable[[int], bool], most: int) -> int:
    """The largest number from 0 to `most` that holds, if every smaller one does, too.

    Asks by doubling from 1 and then by bisection; the answer and the next number have been asked.
    """
    low, high = 0, 1
    while high <= most and holds(high):
        low, high = high, 2 * high
        if low < most < high:
            high = most
    while high - low > 1 and low < most:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def held_streams(
    models: Mapping[str, Any],
    forms: Mapping[str, TurnForm],
    script: Script,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """For each model and way the streams that it holds, young and after `arguments.turns` turns.

    :return: by model, way, and `first` or `last`: `behind` (turns before the rounds), `streams`,
        `by_median` and, by number of streams, `tries`. A number that is `arguments.most` may be
        more.
    """
    found: dict[str, Any] = {label: {way: {} for way in WAYS} for label in models}
    bar = tqdm(total=4 * len(models), desc="searches", disable=None)
    for label, model in models.items():
        past, played = Stream(model, form=forms.get(label)), 0
        for age, behind in (("first", YOUNG), ("last", arguments.turns)):
            for index in range(played, behind):
                past.generate(*script.given(past, index))
            played = behind
            for way in WAYS:
                found[label][way][age] = _search(past, script, behind, way, arguments)
                bar.update()
    bar.close()
    return found


def _search(
    past: Stream, script: Script, behind: int, way: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    tries: dict[int, Rounds] = {}
    budget = 1 / arguments.fps

    def rounds(streams: int) -> Rounds:
        if streams not in tries:
            tries[streams] = play_rounds(
                past, script, behind, streams, way, arguments.rounds, budget
            )
            past.model.streaming_cache = None  # it would keep the last copy
        return tries[streams]

    return {
        "behind": behind,
        "streams": most_held(lambda n: rounds(n).slow <= budget, arguments.most),
        "by_median": most_held(lambda n: rounds(n).median <= budget, arguments.most),
        "tries": {str(n): tries[n].record() for n in sorted(tries)},
    }


def play_rounds(
    past: Stream, script: Script, behind: int, streams: int, way: str, rounds: int, budget: float
) -> Rounds:
    """Rounds of copies of a stream; fewer than `rounds` where they are too late already.

    :param behind: turns that `past` has behind it.
    """
    device = past.device
    cuda = device.type == "cuda"
    synchronise(device)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        allocated = torch.cuda.memory_allocated(device)
    seconds: list[float] = []
    try:
        if way == BATCHED:
            live = [Stream(past.model, _copies(past, streams), past.form)]
        else:
            live = [Stream(past.model, _copies(past, 1), past.form) for _ in range(streams)]
        for index in range(WARM_UP_ROUNDS + rounds):
            began = time.perf_counter()
            for stream in live:
                stream.generate(*script.given(stream, behind + index))
            if index >= WARM_UP_ROUNDS:
                seconds.append(time.perf_counter() - began)
            if sum(taken > budget for taken in seconds) > rounds // 2:
                break  # whatever follows, the median is late
        held = sum(stream.cache_bytes() + stream.state_bytes() for stream in live)
    except torch.OutOfMemoryError:
        return Rounds(streams, (), 0, None)
    memory = None
    if cuda:
        used = torch.cuda.max_memory_allocated(device) - allocated
        memory = past.weight_bytes + used
    return Rounds(streams, tuple(seconds), held, memory)


def _copies(past: Stream, batch: int) -> Any:
    """The cache of a batch of streams that all have this one behind them."""
    cache = copy.deepcopy(past.cache)
    if batch > 1:
        cache.batch_select_indices(torch.zeros(batch, dtype=torch.long))
    return cache


def table(found: Mapping[str, Any], arguments: argparse.Namespace) -> str:
    """A column for each model, way and age."""
    searches = [
        (label, way, age, search)
        for label, ways in found.items()
        for way, ages in ways.items()
        for age, search in ages.items()
    ]
    head, ways, behind = [""], [""], ["turns behind a stream"]
    rows: list[list[str]] = [[title] for title in ROWS]
    rows[0][0] += f" of {arguments.fps:g} frames/s"
    for label, way, age, search in searches:
        old = age == "last"  # names stand over the last of their columns
        head.append(label if old and way == WAYS[-1] else "")
        ways.append(way if old else "")
        behind.append(str(search["behind"]))
        for row, cell in zip(rows, _cells(search, arguments.most), strict=True):
            row.append(cell)
    if all(row == MISSING for row in rows[-1][1:]):  # on the CPU
        rows.pop()
    return aligned([head, ways, behind, *rows], gap="   ")


ROWS = (
    "streams",
    "by the median alone",
    "a round, median, ms",
    "a round, 95th percentile, ms",
    "with one stream more, median, ms",
    "with one stream more, 95th percentile, ms",
    "caches and states of all, MiB",
    "memory at the peak, GiB",
)


def _cells(search: Mapping[str, Any], most: int) -> list[str]:
    """A column under the turns behind, in the order of ROWS."""
    tries, streams, median = search["tries"], search["streams"], search["by_median"]
    at, beyond = (tries.get(str(n), {}) for n in (streams, streams + 1))
    return [
        f"{streams}+" if streams == most else str(streams),
        f"{median}+" if median == most else str(median),
        _number(at.get("median"), 1e3, ".0f"),
        _number(at.get("percentile_95"), 1e3, ".0f"),
        _number(beyond.get("median"), 1e3, ".0f"),
        _number(beyond.get("percentile_95"), 1e3, ".0f"),
        _number(at.get("stream_bytes"), 2.0**-20, ",.1f"),
        _number(at.get("memory_bytes"), 2.0**-30, ",.2f"),
    ]


def _number(value: float | None, unit: float, style: str) -> str:
    return MISSING if value is None else f"{value * unit:{style}}"
