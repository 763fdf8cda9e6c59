"""Packs of the plan and indexes -> rates asked and drawn, what is left out, lengths and fills.

Everything is counted on the packs themselves: what stands in no pack is not trained.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from casa_train.data.budget import Budget
from casa_train.data.mixture import Mixture
from casa_train.data.prepared.plan import IMAGE, VIDEO, Pack, Planner, slowest_rank
from casa_train.data.prepared.shards import Split
from casa_train.pages.html import SERIES

if TYPE_CHECKING:
    from casa_train.report.drawing import Plot

COLOURS = len(SERIES)  # series of a chart; further sources share the last one
LEFT_OUT = 12  # samples that are named


@dataclass(frozen=True)
class SourceRow:
    """A source of the mixture, as the planned packs show it.

    :param asked, drawn: its share of the samples of its modality.
    :param samples: how many stand in the packs; :param total: how many its index lists.
    :param passes: how often that went through the samples that fit.
    :param epochs: epochs begun: how often the most frequent sample came.
    :param whole_run: passes by the end of the run; None where there is no run.
    :param shares: of all samples, text tokens and image tokens of the packs.
    :param dropped: samples of the index that fit no pack; :param over: of these, over text, images.
    :param skipped: rows that the recipe left out, by reason.
    """

    name: str
    colour: int
    modality: str
    asked: float
    drawn: float
    samples: int
    total: int
    passes: float
    epochs: int
    whole_run: float | None
    shares: tuple[float, float, float]
    dropped: int
    over: tuple[int, int]
    skipped: dict[str, int]
    subsets: list[tuple[str, int]]


@dataclass(frozen=True)
class LeftOut:
    """A sample that fits no pack."""

    id: str
    mixture: str
    reason: str


@dataclass(frozen=True)
class Balance:
    """:param ratio: image tokens of the slowest ranks over those of the mean, summed over
    micro-steps; 1 is perfect.
    """

    world: int
    ratio: float
    chosen: bool


@dataclass(frozen=True)
class PlanView:
    """What the planned packs are.

    :param fills: mean used share of the text and of the image budget.
    """

    packs: int
    samples: int
    fills: tuple[float, float]
    video: float | None
    sources: list[SourceRow]
    left_out: list[LeftOut]
    dropped: int
    balance: list[Balance]
    charts: list[Plot]


def view_plan(
    packs: Sequence[Pack],
    planner: Planner,
    splits: Mapping[str, Split],
    world: int,
    run_packs: int | None = None,
) -> PlanView:
    """Counts everything.

    :param packs: the first packs of the plan.
    :param world: ranks of the run.
    :param run_packs: packs of the whole run, if one is planned.
    """
    names = list(planner.sources)
    rows: dict[str, list[int]] = {name: [] for name in names}
    tokens = {name: np.zeros(2, np.int64) for name in names}
    video = 0
    for pack in packs:
        for name, row, *lengths in pack.items:
            rows[name].append(row)
            tokens[name] += lengths
        video += planner.sources[pack.items[0][0]].modality == VIDEO
    drawn = {name: np.array(values, np.int64) for name, values in rows.items()}
    left_out, dropped = _left_out(planner, splits)
    modalities = {source.modality for source in planner.sources.values()}
    text = np.array([pack.text_tokens for pack in packs])
    images = np.array([pack.image_tokens for pack in packs])
    fills = Budget.of(planner.data).fills(text, images)
    return PlanView(
        packs=len(packs),
        samples=sum(map(len, drawn.values())),
        fills=(float(fills[0].mean()), float(fills[1].mean())),
        video=video / len(packs) if len(modalities) > 1 else None,
        sources=_rows(planner, splits, drawn, tokens, run_packs and run_packs / len(packs)),
        left_out=left_out,
        dropped=dropped,
        balance=_balances(images, planner.data.packs_per_step, world),
        charts=_charts(packs, planner, splits, drawn, fills),
    )


def _balances(images: np.ndarray, packs_per_step: int, world: int) -> list[Balance]:
    """For the run's ranks and every power of two that divides a step."""
    worlds = {2**i for i in range(1, 15) if packs_per_step % 2**i == 0} | {world}
    return [
        Balance(w, slowest_rank(images, w), w == world) for w in sorted(worlds) if w <= len(images)
    ]


def _rows(
    planner: Planner,
    splits: Mapping[str, Split],
    drawn: Mapping[str, np.ndarray],
    tokens: Mapping[str, np.ndarray],
    run: float | None,
) -> list[SourceRow]:
    asked: dict[str, float] = {}
    members: dict[str, int] = {}
    for modality in (IMAGE, VIDEO):
        sizes = {n: s.size for n, s in planner.sources.items() if s.modality == modality}
        if sizes:
            asked |= Mixture(sizes, planner.seed).rates
            members |= dict.fromkeys(sizes, sum(len(drawn[name]) for name in sizes))
    text, images = np.sum(list(tokens.values()), axis=0).tolist()
    samples = sum(map(len, drawn.values()))
    dropped = planner.dropped()
    found = []
    for number, (name, source) in enumerate(planner.sources.items()):
        count, total = len(drawn[name]), len(source.text)
        passes = count / max(1, total - dropped[name][0])
        over = _over(planner, name)
        found.append(
            SourceRow(
                name=name,
                colour=min(number, COLOURS - 1),
                modality=source.modality,
                asked=asked[name],
                drawn=count / max(1, members[name]),
                samples=count,
                total=total,
                passes=passes,
                epochs=int(np.bincount(drawn[name]).max()) if count else 0,
                whole_run=None if run is None else passes * run,
                shares=(
                    count / max(1, samples),
                    int(tokens[name][0]) / max(1, text),
                    int(tokens[name][1]) / max(1, images),
                ),
                dropped=dropped[name][0],
                over=(int(over[0].sum()), int(over[1].sum())),
                skipped=dict(splits[name].meta.get("skipped") or {}),
                subsets=_subsets(splits[name], drawn[name]),
            )
        )
    return found


def _subsets(split: Split, rows: np.ndarray) -> list[tuple[str, int]]:
    """How many of these rows each subset of a source gave."""
    subsets = split.index.column("source").take(rows).value_counts().to_pylist()
    counts = Counter({str(entry["values"]): int(entry["counts"]) for entry in subsets})
    return counts.most_common()


def _over(planner: Planner, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Which samples of a source exceed the text and which the image budget."""
    source, budget = planner.sources[name], planner.budget
    return source.text > budget.text, source.images > budget.images


def _left_out(planner: Planner, splits: Mapping[str, Split]) -> tuple[list[LeftOut], int]:
    """Samples that fit no pack, a few of each source, and how many there are."""
    named: list[LeftOut] = []
    sources = [name for name, (dropped, _) in planner.dropped().items() if dropped]
    for name in sources:
        source, split, over = planner.sources[name], splits[name], _over(planner, name)
        for row in np.flatnonzero(over[0] | over[1])[: max(1, LEFT_OUT // len(sources))].tolist():
            reasons = [
                f"{length:,} {kind} tokens, {most:,} at most"
                for kind, length, most, exceeds in zip(
                    ("text", "image"),
                    (int(source.text[row]), int(source.images[row])),
                    (planner.budget.text, planner.budget.images),
                    over,
                    strict=True,
                )
                if exceeds[row]
            ]
            id = f"{split.source(row)}/{split.key(row)}"
            named.append(LeftOut(id, name, "; ".join(reasons)))
    return named, sum(dropped for dropped, _ in planner.dropped().values())


def _charts(
    packs: Sequence[Pack],
    planner: Planner,
    splits: Mapping[str, Split],
    drawn: Mapping[str, np.ndarray],
    fills: tuple[np.ndarray, np.ndarray],
) -> list[Plot]:
    # Half a second of matplotlib, which pages of streams and of one sample need not wait for.
    from casa_train.report import drawing, histograms

    names = list(planner.sources)
    groups = [names[i : i + 1] for i in range(COLOURS - 1)] + [names[COLOURS - 1 :]]
    lists = {name: _Lists(splits[name], drawn[name]) for name in names}

    def stacked(values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        none = np.zeros(0, np.int64)
        return [np.concatenate([none, *(values[n] for n in group)]) for group in groups if group]

    def by_source(title: str, values: Mapping[str, np.ndarray]) -> Plot | None:
        return histograms.histogram(title, stacked(values))

    sources = planner.sources
    counts = np.array([len(pack.items) for pack in packs])
    widths = np.concatenate([lists[name].values("widths") for name in names])
    heights = np.concatenate([lists[name].values("heights") for name in names])
    plots = [
        by_source("Text tokens", {n: sources[n].text[drawn[n]] for n in names}),
        by_source("Image tokens", {n: sources[n].images[drawn[n]] for n in names}),
        by_source("Images", {n: lists[n].counts("widths") for n in names}),
        by_source("Turns", {n: lists[n].counts("user_tokens") for n in names}),
        histograms.sizes("Image sizes", widths, heights),
        histograms.histogram("Samples in a pack", [counts], [drawing.WEAK]),
        histograms.shares("Text fill of packs", fills[0]),
        histograms.shares("Image fill of packs", fills[1]),
    ]
    return [plot for plot in plots if plot is not None]


class _Lists:
    """List columns of an index at some of its rows."""

    def __init__(self, split: Split, rows: np.ndarray) -> None:
        self.split, self.rows = split, rows

    def counts(self, name: str) -> np.ndarray:
        """(rows,) entries of each list."""
        _, offsets = self.split.list_column(name)
        lengths: np.ndarray = (offsets[self.rows + 1] - offsets[self.rows]).astype(np.int64)
        return lengths

    def values(self, name: str) -> np.ndarray:
        """The entries of all lists, one after another."""
        values, offsets = self.split.list_column(name)
        lengths = self.counts(name)
        # The places of every list's entries: its start, then one further each.
        before = np.cumsum(lengths) - lengths
        places = np.repeat(offsets[self.rows] - before, lengths) + np.arange(lengths.sum())
        taken: np.ndarray = values[places]
        return taken
