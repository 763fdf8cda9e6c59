"""What streams cost after so many images, model below model."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from casa_train.bench._streams import TURN_ROWS, Turn
from casa_train.errors import UserError
from casa_train.io.numbers import MISSING, count
from casa_train.io.tables import aligned

MARKS = (1, 16, 64, 256)
MEDIAN_OF = 8  # turns up to a mark, and at most a quarter of them
PEAK, HELD = "peak of the turn", "weights, KV cache and streaming state"

METHOD = """\
--marks tells what a stream costs after so many images: times are medians over the up to eight turns
before the mark, at most a quarter of all, and after one image over the first turns of up to eight
streams, spread over the time of the long one; sizes are those of the mark's turn. Memory is the
turn's peak on a GPU; on a CPU it is the sum of weights, KV cache and streaming state.
"""


def marks_up_to(turns: int, asked: Sequence[int] | None) -> list[int]:
    """The marks that a stream of so many turns passes, in order.

    :raises UserError: none, or one below 1.
    """
    marks = sorted({*(asked or MARKS)})
    if marks[0] < 1:
        raise UserError(f"--marks holds {marks[0]}; expected numbers of images, 1 or more.")
    passed = [mark for mark in marks if mark <= turns]
    if asked and not passed:
        raise UserError(
            f"--marks begins at {marks[0]}, but --turns is {turns}; expected more turns."
        )
    return passed


def at_marks(
    turns: Sequence[Turn], openings: Sequence[Turn], marks: Sequence[int], weight_bytes: int
) -> dict[str, dict[str, Any]]:
    """By mark what the stream costs there; a turn is one image.

    :param openings: first turns of other streams of the model.
    :param weight_bytes: of the model, for a device that has no peak.
    """
    found = {}
    for mark in marks:
        near = turns[mark - max(1, min(MEDIAN_OF, mark // 4)) : mark]
        last = near[-1]
        near = [*near, *(openings if mark == 1 else ())]
        held = weight_bytes + last.cache_bytes + last.state_bytes
        found[str(mark)] = {
            "first_token": statistics.median(turn.first_token for turn in near),
            "tokens_per_second": statistics.median(turn.tokens_per_second for turn in near),
            "cache_tokens": last.cache_tokens,
            "cache_bytes": last.cache_bytes,
            "state_bytes": last.state_bytes,
            "memory_bytes": held if last.memory_bytes is None else last.memory_bytes,
            "memory": HELD if last.memory_bytes is None else PEAK,
            "median_of": len(near),
        }
    return found


ROWS = (*TURN_ROWS, ("memory, MiB", "memory_bytes", 2.0**-20, ",.1f"))


def table(streams: Mapping[str, Mapping[str, Any]], marks: Sequence[int]) -> str:
    """For each quantity a row a stream, a column a mark."""
    blocks = []
    for title, name, unit, style in ROWS:
        rows = [[f"{title}, after", *(count(mark, "image") for mark in marks)]]
        for label, stream in streams.items():
            values = [stream["marks"].get(str(mark), {}).get(name) for mark in marks]
            cells = [MISSING if v is None else f"{v * unit:{style}}" for v in values]
            rows.append([label, *cells])
        blocks.append(aligned(rows))
    kinds = sorted({str(stream["marks"][str(marks[0])]["memory"]) for stream in streams.values()})
    return "\n\n".join([*blocks, f"memory: {'; '.join(kinds)}"])
