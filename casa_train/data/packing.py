"""Two-budget best-fit: samples into packs that respect a text and an image budget at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
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
    """

    def __init__(
        self, text_budget: int, image_budget: int, open_packs: int = 24, max_age: int = 4096
    ) -> None:
        self.text_budget = text_budget
        self.image_budget = image_budget
        self.open_packs = open_packs
        self.max_age = max_age
        self.bins: list[Bin] = []
        self.seen = 0

    def fits(self, text: Any, images: Any) -> Any:
        """Whether a sample fits into an empty pack; for arrays of lengths, which of them do."""
        return (text <= self.text_budget) & (images <= self.image_budget)

    def add(self, item: Any, text: int, images: int) -> list[Bin]:
        """Places one sample that fits; returns the packs this finishes (none, one or two)."""
        self.seen += 1
        finished: list[Bin] = []
        if self.bins and self.seen - self.bins[0].born > self.max_age:
            finished.append(self.bins.pop(0))
        best, best_score = None, -1.0
        for candidate in self.bins:
            new_text, new_images = candidate.text + text, candidate.images + images
            if new_text <= self.text_budget and new_images <= self.image_budget:
                score = self._fill(new_text, new_images)
                if score > best_score:
                    best, best_score = candidate, score
        if best is None:
            if len(self.bins) >= self.open_packs:
                fullest = max(self.bins, key=lambda b: self._fill(b.text, b.images))
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

    def _fill(self, text: int, images: int) -> float:
        return max(text / self.text_budget, images / self.image_budget)
