"""Packs of a stream -> a page's view of it: what was drawn, and what gave nothing to a pack.

A stream has no index: all that is known beforehand are the rows of its files. The rest is counted
on the packs that are shown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.materialize import Failure
from casa_train.data.stream.stream_loader import Drawn
from casa_train.data.stream.stream_source import StreamSource
from casa_train.inspect.packs import PackView, Planned, view_batches


@dataclass(frozen=True)
class SubsetRow:
    """A subset of the stream.

    :param asked: its share of the rows that are drawn; :param drawn: of the samples of the packs.
    """

    name: str
    asked: float
    drawn: float
    samples: int
    rows: int
    row_groups: int
    repeats: int


@dataclass(frozen=True)
class StreamView:
    """The shown packs of a stream.

    :param fills: mean used share of the text and of the image budget.
    :param failures: bad rows that were met, in packs and on the way to them.
    :param left_out: rows that exceed the budgets.
    """

    packs: int
    samples: int
    lanes: int
    fills: tuple[float, float]
    subsets: list[SubsetRow]
    failures: list[Failure]
    left_out: int


def view_stream(
    drawn: Sequence[Drawn],
    sources: Mapping[str, StreamSource],
    data: DataConfig,
    tokenizer: Any,
) -> tuple[StreamView, list[PackView]]:
    """Counts the packs and looks at them."""
    counts = Counter(name for one in drawn for name, _ in one.batch.answer_sources)
    whole = sum(source.rows * source.repeats for source in sources.values())
    samples = sum(counts.values())
    view = StreamView(
        packs=len(drawn),
        samples=samples,
        lanes=data.stream.lanes,
        fills=(_mean([d.batch.fills[0] for d in drawn]), _mean([d.batch.fills[1] for d in drawn])),
        subsets=[
            SubsetRow(
                name,
                source.rows * source.repeats / whole,
                counts[name] / max(1, samples),
                counts[name],
                source.rows,
                len(source.row_groups),
                source.repeats,
            )
            for name, source in sources.items()
        ],
        failures=[f for d in drawn for f in (*d.lane.failures, *d.batch.failures)],
        left_out=sum(d.lane.left_out for d in drawn),
    )
    planned = [
        Planned(
            d.batch,
            [
                (e.name, f"{e.source}/{e.key}", (e.text_tokens, e.image_tokens))
                for e in d.lane.entries
            ],
        )
        for d in drawn
    ]
    return view, view_batches(planned, tokenizer, Budget.of(data))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
