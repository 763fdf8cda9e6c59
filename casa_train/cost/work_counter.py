"""The floating-point work of a real pack, counted by the process that loads it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from casa_train.cost.work import VisionSizes, count_operations
from casa_train.modeling.block_work import TextSizes
from casa_train.modeling.fusion import FusionMechanism
from casa_train.modeling.windows import Chunk


@dataclass(frozen=True)
class WorkCounter:
    """Floating-point operations of a pack, forward and backward; travels to loader workers.

    A pack of 20,480 image tokens takes it a few milliseconds, none of it the trainer's.
    """

    text: TextSizes
    vision: VisionSizes
    mechanism: FusionMechanism

    def __call__(self, pack: Sequence[Chunk], answers: int) -> int:
        """:param pack: every sample that runs, a dummy too; :param answers: rows with logits."""
        work = count_operations(self.text, self.vision, self.mechanism, pack, answers)
        return sum(part.total for part in work.values())
