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
    """

    samples: int
    weight: float | None = None
    repeats: int = 1


class Mixture:
    """An endless, deterministic sequence of (source, row).

    :param sources: by name; rates follow from weights or sizes.
    """

    def __init__(self, sources: Mapping[str, SourceSize], seed: int) -> None:
        self.names = list(sources)
        self.sizes = {name: s.samples for name, s in sources.items()}
        self.seed = seed
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
        total = sum(shares.values())
        self.rates = {name: share / total for name, share in shares.items()}
        self.drawn = dict.fromkeys(self.names, 0)
        self._orders: dict[str, tuple[int, np.ndarray]] = {}

    def next(self) -> tuple[str, int]:
        """Draws the next sample."""
        total = sum(self.drawn.values()) + 1
        name = max(self.names, key=lambda n: self.rates[n] * total - self.drawn[n])
        epoch, position = divmod(self.drawn[name], self.sizes[name])
        self.drawn[name] += 1
        return name, int(self._order(name, epoch)[position])

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": dict(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.drawn = {name: int(state["drawn"][name]) for name in self.names}

    def _order(self, name: str, epoch: int) -> np.ndarray:
        cached = self._orders.get(name)
        if cached is None or cached[0] != epoch:
            digest = hashlib.sha256(f"{self.seed}/{name}/{epoch}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "big")))
            cached = self._orders[name] = (epoch, generator.permutation(self.sizes[name]))
        return cached[1]
