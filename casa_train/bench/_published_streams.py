"""Sessions of streams in the layout of the published ones, and those beside them.

The published sessions were taken with the inference code that CASA's authors (arXiv 2512.19535)
publish, on models of the published sizes: 22 tokens before the first frame, 2 text tokens and 16
new ones a turn, frames of 896x896 pixels.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from casa_train.bench._streams import Turn
from casa_train.io.numbers import GIB, MISSING
from casa_train.io.tables import aligned


@dataclass(frozen=True)
class Session:
    """One stream, from the first tenth of its turns to the last.

    :param machine: where it was measured; sessions of different machines do not compare.
    :param image_size: side of a frame in pixels; :param new_tokens: taken in a turn.
    :param first_token: seconds until a turn's first new token, in both tenths.
    :param tokens_per_second: of the new tokens after it, in both tenths.
    :param cache_tokens: in the KV cache at the end.
    :param memory_bytes: at the peak of the last turn; None on the CPU.
    """

    model: str
    machine: str
    turns: int
    image_size: int
    new_tokens: int
    first_token: tuple[float, float]
    tokens_per_second: tuple[float, float]
    cache_tokens: int
    memory_bytes: float | None

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


# model | turns | time to first token, ms | decode, tok/s | KV tokens | GiB
SESSIONS = """
Helium insertion    | 256 |  80 459 | 89.5 20.1 | 266773 | 34.2
Helium CASA         | 256 |  64  64 | 59.2 58.9 |   4629 |  6.4
Helium CASA, shared | 256 |  65  65 | 59.0 59.1 |   4629 |  5.7
Qwen CASA           | 256 |  74  73 | 40.7 40.6 |   4653 |  8.1
Helium insertion    | 512 | 111 917 | 81.1 10.9 | 533525 | 63.2
Helium CASA         | 512 |  63  66 | 59.5 59.6 |   9237 |  6.8
"""
MACHINE = "published, one H100"
SIDE, NEW_TOKENS = 896, 16


def _published(line: str) -> Session:
    model, turns, first_token, speed, tokens, gib = (cell.strip() for cell in line.split("|"))
    begin, end = (int(x) / 1e3 for x in first_token.split())
    fast, slow = map(float, speed.split())
    return Session(
        model=model,
        machine=MACHINE,
        turns=int(turns),
        image_size=SIDE,
        new_tokens=NEW_TOKENS,
        first_token=(begin, end),
        tokens_per_second=(fast, slow),
        cache_tokens=int(tokens),
        memory_bytes=float(gib) * GIB,
    )


PUBLISHED = tuple(map(_published, SESSIONS.strip().splitlines()))
NOTE = (
    "From one row to another only those of one machine, frame size and number of tokens compare; "
    "first -> last does within every row."
)


def session(
    model: str, machine: Mapping[str, Any], turns: Sequence[Turn], image_size: int, new_tokens: int
) -> Session:
    """A session of our own.

    :param machine: facts of `_benchmark.machine`.
    :param turns: all turns of one stream; tenths are rounded up, and stand for their medians.
    """
    tenth = -(-len(turns) // 10)
    first, last = turns[:tenth], turns[-tenth:]

    def both(name: str) -> tuple[float, float]:
        begin, end = (statistics.median(getattr(x, name) for x in part) for part in (first, last))
        return begin, end

    return Session(
        model=model,
        machine=f"here, {machine['device']}, {machine['dtype']}",
        turns=len(turns),
        image_size=image_size,
        new_tokens=new_tokens,
        first_token=both("first_token"),
        tokens_per_second=both("tokens_per_second"),
        cache_tokens=turns[-1].cache_tokens,
        memory_bytes=turns[-1].memory_bytes,
    )


def table(sessions: Iterable[Session]) -> str:
    """A row a session."""
    rows = [
        ["model", "measured", "turns", "frame", "new tokens"]
        + ["first token, ms", "decoding, tok/s", "KV tokens", "GiB"]
    ]
    for one in sessions:
        gib = MISSING if one.memory_bytes is None else f"{one.memory_bytes / GIB:.1f}"
        rows.append(
            [one.model, one.machine, str(one.turns), str(one.image_size), str(one.new_tokens)]
            + [" -> ".join(f"{1e3 * x:.0f}" for x in one.first_token)]
            + [" -> ".join(f"{x:.1f}" for x in one.tokens_per_second)]
            + [f"{one.cache_tokens:,}", gib]
        )
    return aligned(rows, left=2)
