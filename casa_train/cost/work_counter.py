"""The floating-point work of a real pack, counted by the process that loads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from casa_train.cost.work import TextSizes, VisionSizes, count_operations
from casa_train.modeling.windows import SampleShape


@dataclass(frozen=True)
class WorkCounter:
    """Floating-point operations of a pack, forward and backward; travels to loader workers.

    A pack of 20,480 image tokens takes it about a millisecond, none of it the trainer's.

    :param fusion: mechanism and options, with their defaults.
    """

    text: TextSizes
    vision: VisionSizes
    fusion: Mapping[str, Any]

    def __call__(self, pack: Sequence[SampleShape], answers: int) -> int:
        """:param pack: every sample that runs, a dummy too; :param answers: rows with logits."""
        work = count_operations(self.text, self.vision, self.fusion, pack, answers)
        return sum(part.total for part in work.values())
