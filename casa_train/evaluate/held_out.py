"""Loss and exact match of a model in training on a fixed set of held-out samples.

The samples are packed and materialised as training packs its own, once and for all. Packs are dealt
to the ranks, and packs of nothing but the dummy sample fill up the last round: every rank runs the
same number of forward passes, which sharded parameters ask for. Sums are taken in the order of the
packs, so the same weights give the same numbers on any number of ranks.

An answer matches exactly when, at each of its positions, the end token included, the most likely
token given the true tokens before it is the true one. That is the case exactly when greedy decoding
after the true history would write it token for token, so nothing needs to be generated. Every turn
of a conversation is an answer; in live captions every caption between two frames is one, where the
template puts tokens around images. `evaluation.ask=last` counts the last answer of a conversation
alone, and all captions of a live one.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.build import build_fits, open_splits
from casa_train.data.fit import Fit
from casa_train.data.materialize import Materializer, PackedBatch
from casa_train.data.packing import BestFitPacker
from casa_train.data.prepared.plan import Item, Pack
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.video_rows import LIVE
from casa_train.data.transfer import to_device
from casa_train.distributed.ranks import Ranks
from casa_train.errors import RankError, UserError
from casa_train.evaluate.last_turns import keep_their_last_turn
from casa_train.evaluate.shares import by_source, source_labels, spread
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.training.loss import answer_losses

Forward = Callable[..., Any]
Marks = dict[str, list[tuple[int, str]]]
"""By source, rows and what became of their answers: "1" exact, "0" not, "-" could not be read."""


@dataclass(frozen=True)
class HeldOut:
    """What is measured at every validation.

    :param splits: the held-out splits by name.
    :param groups: by name of a source, the split it lies in and its rows that fit a pack.
    :param labels: by split and what its rows call their source, the name of that source.
    :param packs: in the order of their numbers, a multiple of the number of ranks.
    :param digest: identifies the samples; losses of different samples do not compare.
    :param end: the token that ends an answer; None where the template has none.
    :param trained: names of splits that are trained, too: what they measure is not held out.
    :param last: whether the last answer of a conversation counts alone.
    :param left_out: with `last`, samples whose last turn does not fit a pack or is rated out.
    """

    splits: Mapping[str, Split]
    groups: Mapping[str, tuple[str, np.ndarray]]
    labels: Mapping[tuple[str, str], str]
    packs: Sequence[Pack]
    materializer: Materializer
    digest: str
    end: int | None
    trained: Sequence[str] = ()
    last: bool = False
    left_out: int = 0

    def batch(self, pack: Pack, ranks: Ranks) -> PackedBatch:
        """A pack, read by this rank alone.

        :raises RankError: the data is gone.
        """
        try:
            return self.materializer[pack]
        except UserError as error:
            raise RankError(f"rank {ranks.rank}: {error}") from error


@dataclass
class SourceScore:
    """Sums over the answers of one source."""

    loss: float = 0.0
    answer_tokens: int = 0
    exact: int = 0
    answers: int = 0


def open_held_out(
    config: Config, processor: CasaProcessor, world: int, trained: Mapping[str, str] | None = None
) -> HeldOut | None:
    """The samples that validations measure; None where there are none to be.

    :param trained: by name, fingerprints of what is trained.

    :raises UserError: splits that cannot be used.
    """
    if not config.evaluation.every or not config.data.validation:
        return None
    sources = config.data.validation
    splits = open_splits(sources, processor, "data.validation")
    fits = build_fits(config, splits, processor)
    lengths: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    fitting: dict[str, np.ndarray] = {}
    last, left_out = config.evaluation.ask == "last", 0
    for name, fit in fits.items():
        limit = sources[name].limit
        text, images, _ = fit.lengths(limit)
        lengths[name] = text, images
        fitting[name] = np.flatnonzero(fit.budget.holds(text, images))
        if last:
            whole = keep_their_last_turn(fit, fitting[name], text)
            left_out += len(fitting[name]) - len(whole)
            fitting[name] = whole
    rows_of = by_source(splits, fitting)
    labels = source_labels(list(rows_of))
    groups = {labels[key]: (key[0], rows) for key, rows in rows_of.items()}
    chosen = spread({n: rows for n, (_, rows) in groups.items()}, config.evaluation.loss_samples)
    items = [
        (split, row, int(lengths[split][0][row]), int(lengths[split][1][row]))
        for source, rows in chosen.items()
        for split in [groups[source][0]]
        for row in rows
    ]
    if not items:
        raise UserError(
            f"no held-out sample of data.validation ({sorted(sources)}) fits a pack of "
            f"{config.data.text_tokens} text and {config.data.image_tokens} image tokens"
            f"{' with its last turn (evaluation.ask=last)' if last else ''}; expected "
            "at least one. Raise the budgets, name other splits, or set evaluation.every=0."
        )
    budget = Budget.of(config.data)
    return HeldOut(
        splits,
        groups,
        labels,
        pack_all(items, fits, budget.for_samples(), world),
        Materializer(splits, processor, budget, fits),
        _digest(items, splits, last),
        processor.answer_end_token,
        [n for n, split in splits.items() if split.fingerprint in (trained or {}).values()],
        last,
        left_out,
    )


def pack_all(
    items: Iterable[Item], fits: Mapping[str, Fit], budget: Budget, world: int
) -> list[Pack]:
    """Packs of every item, of one modality each, the fullest first; filled up with empty packs.

    :param budget: what the samples of a pack may fill.
    """
    by_modality: dict[bool, list[Item]] = {}
    for item in items:
        by_modality.setdefault(fits[item[0]].video, []).append(item)
    bins = []
    for members in by_modality.values():
        packer = BestFitPacker(budget)
        for item in members:
            bins += packer.add(item, item[2], item[3])
        bins += packer.bins
    bins.sort(key=lambda one: (-one.images, -one.text))  # the ranks of a round get about the same
    packs = [Pack(i, tuple(b.items), b.text, b.images) for i, b in enumerate(bins)]
    empty = range(len(packs), -(-len(packs) // world) * world)
    return [*packs, *(Pack(i, (), 0, 0) for i in empty)]


@torch.no_grad()
def score(
    held_out: HeldOut,
    forward: Forward,
    ranks: Ranks,
    heartbeat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Runs the model over the held-out packs; every rank calls it and gets the same.

    :param forward: the model's, in eval mode.
    :param heartbeat: called after each pack.
    :return: `loss` (mean over answer tokens), `exact_match` (share of answers), `answers` and
        `answer_tokens`, None for numbers that are not finite; the same by source under `sources`;
        `bad_samples`, how many could not be read; `hits` by source, a text with a character for
        each answer in the order of rows and turns: "1" exact, "0" not, and "-" for each that was
        due in a sample that could not be read (of live captions one for the sample).
    """
    local = []
    for pack in held_out.packs[ranks.rank :: ranks.world]:
        batch = held_out.batch(pack, ranks)
        rows = batch.inputs.logits_index
        assert rows is not None
        places = rows.tolist()
        inputs, targets = to_device(batch.inputs, batch.targets, ranks.device)
        logits = forward(packed=inputs).logits
        losses = answer_losses(logits, targets).tolist()
        hits = (logits.argmax(-1) == targets).tolist()
        marks = _unread(pack, batch, held_out)
        scores = _by_source(pack, batch, held_out, places, losses, hits, marks)
        local.append((pack.index, scores, len(batch.failures), marks))
        heartbeat()
    packs = sorted(
        (pack for theirs in ranks.gather(local) for pack in theirs), key=lambda pack: int(pack[0])
    )
    total: dict[str, SourceScore] = {}
    marked: Marks = defaultdict(list)
    for _, scores, _, marks in packs:
        for source, add in scores.items():
            _add(total.setdefault(source, SourceScore()), add)
        for source, own in marks.items():
            marked[source] += own
    whole = SourceScore()
    for part in (total[source] for source in sorted(total)):
        _add(whole, part)
    return {
        **_means(whole),
        "sources": {source: _means(total[source]) for source in sorted(total)},
        "bad_samples": sum(bad for _, _, bad, _ in packs),
        "hits": {s: "".join(mark for _, mark in sorted(marked[s])) for s in sorted(marked)},
    }


def answer_spans(places: Sequence[int], targets: Sequence[int], end: int | None) -> list[range]:
    """Positions of each answer among a sample's answer tokens, in order.

    :param places: the row of the text that predicts each token: an answer's follow one another.
    :param targets: those tokens; :param end: the token that an answer ends with.
    """
    starts = [
        i
        for i in range(len(places))
        if i == 0 or places[i] != places[i - 1] + 1 or targets[i - 1] == end
    ]
    return [range(*bounds) for bounds in itertools.pairwise([*starts, len(places)])]


def _by_source(
    pack: Pack,
    batch: PackedBatch,
    held_out: HeldOut,
    places: Sequence[int],
    losses: Sequence[float],
    hits: Sequence[bool],
    marks: Marks,
) -> dict[str, SourceScore]:
    """:param marks: takes those of the samples."""
    scores: dict[str, SourceScore] = {}
    targets = batch.targets.tolist()
    start = 0
    samples = zip(batch.places, batch.answer_sources, batch.sources, strict=True)
    for place, (name, tokens), family in samples:
        own = slice(start, start + tokens)
        spans = answer_spans(places[own], targets[own], held_out.end)
        if held_out.last and held_out.splits[name].meta["schema"] != LIVE:
            spans = spans[-1:]
        right = [all(hits[start + i] for i in span) for span in spans]
        counted = [losses[start + i] for span in spans for i in span]
        add = SourceScore(math.fsum(counted), len(counted), sum(right), len(spans))
        source = held_out.labels[name, family]
        _add(scores.setdefault(source, SourceScore()), add)
        marks[source].append((pack.items[place][1], "".join(str(int(hit)) for hit in right)))
        start += tokens
    return scores


def _unread(pack: Pack, batch: PackedBatch, held_out: HeldOut) -> Marks:
    """The marks of a pack's samples that could not be read."""
    marks: Marks = defaultdict(list)
    read = set(batch.places)
    for name, row in (item[:2] for i, item in enumerate(pack.items) if i not in read):
        split = held_out.splits[name]
        cut = None if held_out.last else held_out.materializer.fits[name].cut(row)
        due = 1 if cut is None else cut.turns
        marks[held_out.labels[name, split.source(row)]].append((row, "-" * due))
    return marks


def _add(total: SourceScore, part: SourceScore) -> None:
    for name, value in vars(part).items():
        setattr(total, name, getattr(total, name) + value)


def _means(score: SourceScore) -> dict[str, Any]:
    loss = score.loss / score.answer_tokens if score.answer_tokens else math.nan
    return {
        "loss": loss if math.isfinite(loss) else None,
        "exact_match": score.exact / score.answers if score.answers else None,
        "answers": score.answers,
        "answer_tokens": score.answer_tokens,
    }


def _digest(items: Sequence[Item], splits: Mapping[str, Split], last: bool) -> str:
    what = [[split.fingerprint for _, split in sorted(splits.items())], items]
    what += [["last"]] if last else []  # what counts of the same samples is another thing then
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
