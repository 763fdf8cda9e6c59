"""Which source gives the next sample, and in which order each source gives its own.

The next source is the one with the largest deficit `rate * drawn_total - drawn`. Inside a source
and epoch the order is a permutation keyed by (seed, source, epoch), so it depends on nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from casa_train.errors import UserError


@dataclass(frozen=True)
class SourceSize:
    """What the mixture needs to know of a source.

    :param samples: samples in one pass.
    :param weight: relative rate; None: proportional to samples x repeats.
    :param repeats: passes that count as one epoch (over-sampling).
    :param shards: (samples,) shard of every sample, for orders that keep shards together.
    """

    samples: int
    weight: float | None = None
    repeats: int = 1
    shards: np.ndarray | None = None


class Mixture:
    """An endless, deterministic sequence of (source, row).

    :param sources: by name; rates follow from weights or sizes.
    :param locality: 0 permutes all samples of a source; n permutes its shards and then the samples
        of every n shards in turn, so that few shards are read at a time.
    :raises UserError: weights for some sources only, or rates that are not positive.
    """

    def __init__(self, sources: Mapping[str, SourceSize], seed: int, locality: int = 0) -> None:
        self.names = sorted(sources)  # so that it does not matter which of them is named first
        self.sources = dict(sources)
        self.seed = seed
        self.locality = locality
        weights = {name: s.weight for name, s in sources.items()}
        if any(w is not None for w in weights.values()) and any(
            w is None for w in weights.values()
        ):
            without = [name for name, w in weights.items() if w is None]
            raise UserError(
                f"data.sources: {without} have no weight but other sources do; give every source a "
                "weight, or none (rates then follow samples x repeats)"
            )
        shares = {
            name: s.samples * s.repeats if s.weight is None else s.weight
            for name, s in sources.items()
        }
        for name, share in shares.items():
            if not share > 0:
                raise UserError(
                    f"data.sources.{name} has the rate {share}; expected more than zero. Raise its "
                    "weight or repeats, or leave the source out."
                )
        total = sum(shares.values())
        self.rates = {name: share / total for name, share in shares.items()}
        self._rates = np.array([self.rates[name] for name in self.names])
        self._drawn = np.zeros(len(self.names), np.int64)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    @property
    def drawn(self) -> dict[str, int]:
        """Samples drawn so far, by source."""
        return dict(zip(self.names, self._drawn.tolist(), strict=True))

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws the next samples: two (count,) arrays, index into `names` and row."""
        sources = self._next_sources(count)
        rows = np.empty(count, np.int64)
        for index in np.unique(sources):
            places = np.flatnonzero(sources == index)
            rows[places] = self._rows(self.names[index], int(self._drawn[index]), len(places))
            self._drawn[index] += len(places)
        return sources, rows

    def put_back(self, sources: np.ndarray) -> dict[str, int]:
        """`drawn` as it was before the last draws, whose sources are given."""
        fewer = self._drawn - np.bincount(sources, minlength=len(self.names))
        return dict(zip(self.names, fewer.tolist(), strict=True))

    def load_drawn(self, drawn: Mapping[str, Any]) -> None:
        """Continues after so many draws of each source."""
        self._drawn = np.array([int(drawn[name]) for name in self.names], np.int64)

    def _next_sources(self, count: int) -> np.ndarray:
        picked = np.zeros(count, np.int64)
        if len(self.names) == 1:
            return picked
        drawn = self._drawn.astype(np.float64)
        total = float(self._drawn.sum())
        deficit = np.empty_like(drawn)
        for i in range(count):
            total += 1.0
            np.multiply(self._rates, total, out=deficit)
            np.subtract(deficit, drawn, out=deficit)
            source = deficit.argmax()
            picked[i] = source
            drawn[source] += 1.0
        return picked

    def _rows(self, name: str, start: int, count: int) -> np.ndarray:
        """Rows of draws start .. start + count - 1 of one source."""
        pieces = []
        while count:
            epoch, position = divmod(start, self.sources[name].samples)
            piece = self._order(name, epoch)[position : position + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def _order(self, name: str, epoch: int) -> np.ndarray:
        cached = self._orders.get(name)
        if cached is None or cached[0] != epoch:
            generator = philox(f"{self.seed}/{name}/{epoch}")
            cached = self._orders[name] = (epoch, self._permutation(name, generator))
        return cached[1]

    def _permutation(self, name: str, generator: np.random.Generator) -> np.ndarray:
        source = self.sources[name]
        rows = np.arange(source.samples, dtype=np.uint32)
        if not self.locality or source.shards is None:
            return generator.permutation(rows)
        shards = generator.permutation(np.unique(source.shards))
        groups = [shards[i : i + self.locality] for i in range(0, len(shards), self.locality)]
        return np.concatenate(
            [generator.permutation(rows[np.isin(source.shards, group)]) for group in groups]
        )


def philox(key: str) -> np.random.Generator:
    """A generator that depends on the key alone."""
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big")))
