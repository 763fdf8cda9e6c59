"""A rank without others: what it gathers of them is made up."""

from __future__ import annotations

from typing import Any

from casa_train.distributed.ranks import Ranks


class Told(Ranks):
    """A rank that notes what it gives, and is told what all gave."""

    def __init__(self, rank: int, world: int, given: list[Any], told: list[Any] | None = None):
        super().__init__(rank, world)
        object.__setattr__(self, "given", given)
        object.__setattr__(self, "told", told)

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)  # type: ignore[attr-defined]
        return self.told or [value]  # type: ignore[attr-defined]
