"""Two-budget best-fit: samples into packs that respect a text and an image budget at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from casa_train.data.budget import Budget


@dataclass(slots=True)
class Bin:
    """An open pack; `born` is the number of samples seen when it was opened."""

    born: int
    text: int = 0
    images: int = 0
    items: list[Any] = field(default_factory=list)


class BestFitPacker:
    """Keeps a few packs open and puts each sample where it leaves the least room.

    A sample goes to the pack that fits it and is fullest afterwards, by the fuller of its two
    budgets. Where none fits, the fullest pack is finished and a new one opened. A pack older than
    `max_age` samples is finished too, so that no sample waits long.

    :param budget: what the samples of a pack may fill.
    """

    def __init__(self, budget: Budget, open_packs: int = 24, max_age: int = 4096) -> None:
        self.budget = budget
        self.open_packs = open_packs
        self.max_age = max_age
        self.bins: list[Bin] = []  # oldest first
        self.seen = 0

    def keep_open(self, packs: int) -> None:
        """Holds so many packs open from the next sample on."""
        self.open_packs = packs

    def add(self, item: Any, text: int, images: int) -> list[Bin]:
        """Places one sample that fits; returns the packs this finishes, mostly none or one."""
        self.seen += 1
        finished: list[Bin] = []
        if self.bins and self.seen - self.bins[0].born > self.max_age:
            finished.append(self.bins.pop(0))
        most_text, most_images = self.budget.text, self.budget.images
        best, best_fill = None, -1
        # Planning spends its time here, so the loop calls nothing. Fills are compared as whole
        # numbers: text / text budget against images / image budget, times both budgets.
        for candidate in self.bins:
            new_text = candidate.text + text
            if new_text > most_text:
                continue
            new_images = candidate.images + images
            if new_images > most_images:
                continue
            fill, other = new_text * most_images, new_images * most_text
            if other > fill:
                fill = other
            if fill > best_fill:
                best, best_fill = candidate, fill
        if best is None:
            while len(self.bins) >= self.open_packs:  # more than once where it has been lowered
                fullest = max(self.bins, key=self._fill)
                self.bins.remove(fullest)
                finished.append(fullest)
            best = Bin(born=self.seen)
            self.bins.append(best)
        best.text += text
        best.images += images
        best.items.append(item)
        return finished

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "bins": [
                {"born": b.born, "text": b.text, "images": b.images, "items": list(b.items)}
                for b in self.bins
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = int(state["seen"])
        self.bins = [
            Bin(b["born"], b["text"], b["images"], [tuple(item) for item in b["items"]])
            for b in state["bins"]
        ]

    def _fill(self, pack: Bin) -> int:
        return max(pack.text * self.budget.images, pack.images * self.budget.text)
