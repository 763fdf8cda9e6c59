"""How far a model in training turns to images, by layer and by the kind of token that reads.

What is listened to is what an evaluation of an export listens to (`attention_to_images.py`): the
share of attention on image keys, or the gates of a mechanism that has some. Each sample is a pack
of its own. Packs are dealt to the ranks, and packs of nothing but the dummy sample fill up the last
round, so that every rank makes the same forward passes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from casa_train.data.prepared.plan import Item, Pack
from casa_train.data.sample import Sample
from casa_train.data.schemas.rows import BadRow
from casa_train.data.transfer import to_device
from casa_train.distributed.ranks import Ranks
from casa_train.evaluate.held_out import Forward, HeldOut
from casa_train.evaluate.shares import spread
from casa_train.modeling.image_attention import IMAGE_SHARE, ImageAttention
from casa_train.modeling.processing_casa import CasaProcessor

CLASSES = ("question", "answer", "gist")
UNIFORM = "uniform"

ByClass = dict[str, float | None]
"""The mean over the tokens of each class; None where no token of it reads anything."""


@dataclass(frozen=True)
class Watched:
    """A sample, alone in its pack.

    :param rows: by class, which of its text tokens it has; none at all of one that this rank could
        not read. It stays, so that all ranks go through the same ones.
    """

    source: str
    pack: Pack
    rows: Mapping[str, Sequence[int]]


class WatchedSamples:
    """`evaluation.attention_while_training` held-out samples of each source, always the same ones.

    They are spread evenly over those that the losses are of.

    :ivar samples: in the order of sources and rows.
    :ivar skipped: samples that cannot be read, by reason.
    """

    def __init__(self, held_out: HeldOut, count: int) -> None:
        self.held_out = held_out
        self.skipped: Counter[str] = Counter()
        items: dict[str, list[Item]] = {}
        for item in sorted(item for pack in held_out.packs for item in pack.items):
            name, row = item[:2]
            source = held_out.labels[name, held_out.splits[name].source(row)]
            items.setdefault(source, []).append(item)
        self.samples = [
            self._watched(source, own[place])
            for source, own in sorted(items.items())
            for place in spread({source: range(len(own))}, count)[source]
        ]

    @torch.no_grad()
    def measure(
        self, forward: Forward, ranks: Ranks, heartbeat: Callable[[], None] = lambda: None
    ) -> dict[str, Any] | None:
        """What the tokens of each class read now; every rank calls it and gets the same.

        :param forward: the model's, in eval mode.
        :param heartbeat: called after each pass.
        :return: by quantity (`image share` and the like) the `layers` that have it; `uniform`, what
            equal attention to all keys would give the answers, None of gates; and by name under
            `sources` the `samples` that could be read, `classes` (question, answer, gist: means by
            layer, over samples each of which is the mean over its tokens; None where there is no
            such token) and `uniform` by class. None of a mechanism that reads images alone.
        """
        local: list[tuple[int, dict[str, dict[int, ByClass]]]] = []
        empty = Pack(len(self.samples), (), 0, 0)
        for start in range(0, len(self.samples), ranks.world):
            place = start + ranks.rank
            watched = self.samples[place] if place < len(self.samples) else None
            found = self._listen(
                empty if watched is None else watched.pack, watched, forward, ranks
            )
            if found is not None:
                local.append((place, found))
            heartbeat()
        told = sorted((one for theirs in ranks.gather(local) for one in theirs), key=lambda o: o[0])
        return _summary([(self.samples[place].source, values) for place, values in told])

    def _listen(
        self, pack: Pack, watched: Watched | None, forward: Forward, ranks: Ranks
    ) -> dict[str, dict[int, ByClass]] | None:
        """By quantity and layer; `UNIFORM` under layer -1. None: there is no sample to listen to.

        :raises RankError: the data is gone.
        """
        batch = self.held_out.batch(pack, ranks)
        rows = {} if watched is None or not batch.places else watched.rows
        asked = [row for name in CLASSES for row in rows.get(name, ())]
        listener = ImageAttention(torch.tensor(asked, dtype=torch.int64))
        # One row of logits, which nobody reads.
        inputs = replace(batch.inputs, logits_index=torch.tensor([0]), image_attention=listener)
        inputs, _ = to_device(inputs, batch.targets, ranks.device)
        forward(packed=inputs)
        if not rows:
            return None
        sizes = [len(rows[name]) for name in CLASSES]
        found = {
            name: {layer: _means(values, sizes) for layer, values in sorted(layers.items())}
            for name, layers in listener.values.items()
        }
        if listener.uniform is not None:
            found[UNIFORM] = {-1: _means(listener.uniform, sizes)}
        return found

    def _watched(self, source: str, item: Item) -> Watched:
        name, row, text, images = item
        rows: dict[str, list[int]] = {}
        try:
            sample = self.held_out.splits[name].read(row)
            fit = self.held_out.materializer.fits.get(name)
            sample = sample if fit is None else fit.apply(row, sample)[0]
            rows = rows_by_class(sample, self.held_out.materializer.processor)
        except BadRow as error:
            self.skipped[error.reason] += 1
        return Watched(source, Pack(0, (item,), text, images), rows)


def rows_by_class(sample: Sample, processor: CasaProcessor) -> dict[str, list[int]]:
    """Which text tokens of a sample stand for what.

    :return: `question`: the tokens of the last turn before its answer, the template's own among
        them; `answer`: those that predict a token of that answer; `gist`: those that the template
        puts around the images of the whole sample, which alone read each image closely. A token
        that predicts an answer is no question, but may be a gist token, too.
    """
    messages = sample.messages()
    encoded = processor.encode(messages, continue_final=sample.open)
    if len(sample.turns) > 1:
        start = encoded.turn_ends[len(sample.turns) - 2]
    elif messages[0]["role"] == "system":
        start = len(processor.encode(messages[:1]).ids)
    else:
        start = processor.opening_tokens()
    before, after = len(processor.pre_image_tokens), len(processor.post_image_tokens)
    gist = sorted({p for at in encoded.points for p in range(at - before, at + after)})
    learned = [p for p in range(max(start, 1), len(encoded.ids)) if encoded.answer[p]]
    answer = [p - 1 for p in learned]
    apart = {*gist, *answer}
    end = learned[0] if learned else len(encoded.ids)
    question = [p for p in range(start, end) if p not in apart]
    return {"question": question, "answer": answer, "gist": gist}


def _means(values: Tensor, sizes: Sequence[int]) -> ByClass:
    """:param values: (R,), one class after another; :param sizes: of the classes."""
    means = [float(part.double().nanmean()) for part in values.cpu().split(list(sizes))]
    return {
        name: mean if math.isfinite(mean) else None
        for name, mean in zip(CLASSES, means, strict=True)
    }


def _summary(
    told: Sequence[tuple[str, Mapping[str, Mapping[int, ByClass]]]],
) -> dict[str, Any] | None:
    """:param told: of each sample its source, and means by quantity and layer."""
    names = sorted({name for _, values in told for name in values} - {UNIFORM})
    sources = sorted({source for source, _ in told})
    uniform = [(source, values[UNIFORM][-1]) for source, values in told if UNIFORM in values]
    summary: dict[str, Any] = {}
    for name in names:
        layers = sorted({layer for _, values in told for layer in values[name]})
        shares = uniform if name == IMAGE_SHARE else []
        summary[name] = {
            "layers": layers,
            "uniform": _mean(by_class["answer"] for _, by_class in shares),
            "sources": {
                source: {
                    "samples": sum(one == source for one, _ in told),
                    "classes": {
                        kind: _known(
                            [
                                _mean(v[name][layer][kind] for one, v in told if one == source)
                                for layer in layers
                            ]
                        )
                        for kind in CLASSES
                    },
                    "uniform": {
                        kind: _mean(by[kind] for one, by in shares if one == source)
                        for kind in CLASSES
                    },
                }
                for source in sources
            },
        }
    return summary or None


def _known(means: list[float | None]) -> list[float | None] | None:
    return None if all(mean is None for mean in means) else means


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
