"""The least time that each part of a step could take on a device, by its work or by its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from casa_train.config.schema import Config
from casa_train.cost.peak import device_rates
from casa_train.cost.sizes import work_counter
from casa_train.cost.work import count_operations
from casa_train.distributed.ranks import Ranks
from casa_train.io.numbers import with_unit
from casa_train.io.precision import DTYPES, FP32
from casa_train.metrics.timeline import (
    COPY,
    DECODER,
    FUSION,
    LOSS,
    UPDATE,
    VISION_FROZEN,
    VISION_TRAINED,
    backward_of,
)

# Names of `cost/work.py` by how they begin; fusion, resamplers and updates of image tokens have
# others, and a user's own mechanism may have any.
PARTS = {"LLM": DECODER, "logits": LOSS}


@dataclass(frozen=True)
class PackSizes:
    """What of a pack its cost follows from.

    :param answers: rows with logits; :param size: bytes of its images and ids.
    """

    chunks: Sequence[Any]
    answers: int
    size: int

    @classmethod
    def of(cls, packed: Any) -> PackSizes:
        """:param packed: a PackedInputs; its tensors are not kept."""
        rows = packed.logits_index
        tensors: list[Tensor] = [
            packed.input_ids,
            *packed.images,
            *([] if rows is None else [rows]),
        ]
        answers = len(packed.input_ids) if rows is None else len(rows)
        return cls(list(packed.chunks), answers, sum(t.numel() * t.itemsize for t in tensors))


class Roofline:
    """Floors of the parts of a step on one rank.

    Products count as `cost/work.py` counts them: what activation checkpointing repeats is no work.
    The update reads and writes each of the rank's values once; bytes over links between ranks are
    not in it, since what joins them is not known.

    :param model: a CasaForConditionalGeneration, sharded or not.
    """

    def __init__(self, config: Config, model: Any, ranks: Ranks) -> None:
        self.work = work_counter(config, model)
        precision = config.parallel.precision
        self.fp8 = config.parallel.frozen_precision == "fp8"
        self.rates = device_rates(ranks.device, precision, config.metrics.peak_tflops)
        trained = sum(
            getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad
        )
        # AdamW reads weight, gradient and two moments and writes all but the gradient, which the
        # norm for clipping has read before; in bf16 the model's own copy is written, too.
        copied = 0 if precision == "fp32" else DTYPES[precision].itemsize
        self.update_bytes = (8 * FP32 + copied) * trained / ranks.world

    def floors(self, packs: Sequence[PackSizes]) -> dict[str, float]:
        """Milliseconds by part of a step with these micro-steps; absent where nothing is known."""
        seconds: dict[str, float] = {}

        def add(part: str, amount: float, rate: float) -> None:
            if amount:
                seconds[part] = seconds.get(part, 0.0) + amount / rate

        for pack in packs:
            counter = self.work
            work = count_operations(
                counter.text, counter.vision, counter.mechanism, pack.chunks, pack.answers
            )
            for name, operations in work.items():
                part = part_of_work(name, operations.backward > 0)
                # Products of frozen blocks in fp8 run at twice the rate of bf16 at most.
                rate = 2 if self.fp8 and part == VISION_FROZEN and "linears" in name else 1
                add(part, operations.forward, rate * self.rates.flops)
                add(backward_of(part), operations.backward, self.rates.flops)
            if self.rates.link is not None:
                add(COPY, pack.size, self.rates.link)
        add(UPDATE, self.update_bytes, self.rates.memory)
        return {part: 1e3 * value for part, value in seconds.items()}

    def words(self) -> str:
        """What the floors come from."""
        rates = self.rates
        link = "" if rates.link is None else f", {with_unit(rates.link, 'B/s')} to the device"
        return (
            f"floor: {with_unit(rates.flops, 'FLOP/s')}, {with_unit(rates.memory, 'B/s')} of memory"
            f"{link} ({rates.source})"
        )


def part_of_work(name: str, trains: bool) -> str:
    """The part of a step that a part of `cost/work.py` is done in.

    :param trains: whether it has a backward pass.
    """
    if name.startswith("vision") and not trains:
        return VISION_FROZEN
    if name.startswith("vision"):
        return VISION_TRAINED
    return next((part for start, part in PARTS.items() if name.startswith(start)), FUSION)
