"""What the batches of a step hold, over all ranks, from one gathering."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from casa_train.distributed.ranks import Ranks
from casa_train.metrics.sinks.base import Record

DIGEST_BYTES = 6  # of a pack's samples; as a number it is exact in float64


class Batch(Protocol):
    """A micro-step's data; see `data.materialize.PackedBatch`."""

    inputs: Any
    targets: Tensor
    answer_sources: list[tuple[str, int]]
    sample_ids: list[str]
    text_tokens: int
    image_tokens: int
    fills: tuple[float, float]
    pairs: int
    failures: list[Any]
    left_out: int
    operations: int


@dataclass(frozen=True)
class StepCounts:
    """Counts of a step.

    :param totals: over all ranks and micro-steps.
    :param packs: micro-steps of all ranks.
    :param operations: floating-point operations of each rank.
    :param digest: identifies the samples in global order, whatever the number of ranks.
    """

    totals: dict[str, float]
    packs: int
    operations: list[float]
    digest: str

    def record(self) -> Record:
        """The fields of a step's record that are about its samples."""
        whole = ("answer_tokens", "text_tokens", "image_tokens", "samples")
        means = ("fill_text", "fill_image", "pack_efficiency")
        return {
            **{name: int(self.totals[name]) for name in whole},
            "samples_digest": self.digest,
            **{name: self.totals[name] / self.packs for name in means},
        }


def count_step(batches: Sequence[Batch], ranks: Ranks) -> StepCounts:
    """Counts a step; collective, every rank calls it with as many batches."""
    local = {
        "answer_tokens": float(sum(len(b.targets) for b in batches)),
        "text_tokens": float(sum(b.text_tokens for b in batches)),
        "image_tokens": float(sum(b.image_tokens for b in batches)),
        "samples": float(sum(len(b.sample_ids) for b in batches)),
        "bad_samples": float(sum(len(b.failures) for b in batches)),
        "left_out": float(sum(b.left_out for b in batches)),
        "pairs": float(sum(b.pairs for b in batches)),
        "fill_text": sum(b.fills[0] for b in batches),
        "fill_image": sum(b.fills[1] for b in batches),
        "pack_efficiency": sum(max(b.fills) for b in batches),
    }
    operations = float(sum(b.operations for b in batches))
    digests = [_digest(b.sample_ids) for b in batches]
    rows = ranks.gather_rows([*local.values(), operations, *digests])
    first = len(local) + 1
    # Pack m of rank r is pack m * world + r of the step.
    in_order = [int(row[first + m]) for m in range(len(batches)) for row in rows]
    return StepCounts(
        totals={name: sum(row[i] for row in rows) for i, name in enumerate(local)},
        packs=len(in_order),
        operations=[row[len(local)] for row in rows],
        digest=hashlib.sha256(json.dumps(in_order).encode()).hexdigest()[:16],
    )


def _digest(ids: Sequence[str]) -> float:
    digest = hashlib.sha256(json.dumps(ids).encode()).digest()
    return float(int.from_bytes(digest[:DIGEST_BYTES], "big"))
