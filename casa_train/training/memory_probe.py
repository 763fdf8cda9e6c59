"""One pack with both budgets full before the first step: what cannot fit fails in the first minute.

Its loss counts nothing, so every gradient is exactly zero and training goes on as if it had not
been there. The update is not part of it: on a GPU AdamW is fused and needs next to nothing on top.
"""

from __future__ import annotations

import copy
import itertools
import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from casa_train.config.schema import Config
from casa_train.cost.full_pack import full_inputs, full_pack, memory_of_rank
from casa_train.data.processor import token_side_of
from casa_train.distributed.ranks import Ranks
from casa_train.errors import RankError, UserError
from casa_train.io.numbers import GIB
from casa_train.metrics.meter import memory_bytes, reset_peak
from casa_train.setup.model import meta_model
from casa_train.training.hooks import Hook
from casa_train.training.loss import answer_losses
from casa_train.training.state import Progress

# A rank that ran out of memory waits so long for the others, who may hang in a collective. One that
# did not waits as long as it takes: the watchdog ends what never comes.
PATIENCE = timedelta(seconds=60)
_rounds = itertools.count()


class Engine(Protocol):
    """What of an engine a worst case needs."""

    @property
    def module(self) -> Any: ...

    def forward(self, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def forget_gradients(self) -> None: ...

    def make_moments(self) -> None: ...


def wanted(config: Config, device: torch.device) -> bool:
    """Whether this start runs one; by default where memory is a GPU's."""
    asked = config.trainer.worst_case
    return device.type == "cuda" if asked is None else asked


class MemoryProbe(Hook):
    """Runs a full pack forward and backward on every rank before the first step; collective.

    :param heartbeat: called when it is done.
    :param fresh: the engine has no moments yet, which would come with the first update.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        engine: Engine,
        heartbeat: Callable[[], None] = lambda: None,
        fresh: bool = False,
    ) -> None:
        self.config, self.ranks, self.engine = config, ranks, engine
        self.heartbeat, self.fresh = heartbeat, fresh
        self._peaks: list[float] = []

    def begin(self, progress: Progress) -> None:
        """:raises UserError: the memory of a rank does not hold it; says what to lower."""
        device = self.ranks.device
        if wanted(self.config, device) and progress.step < self.config.trainer.steps:
            self._run(device)
            self.heartbeat()

    def _run(self, device: torch.device) -> None:
        model = meta_model(self.config, copy.deepcopy(self.engine.module.config))
        self._estimate = memory_of_rank(self.config, model, self.ranks.world)
        began = time.perf_counter()
        pack = full_pack(self.config)
        inputs = full_inputs(pack, device, token_side_of(self.config))
        kept: list[Tensor] = []  # the trainer, too, holds logits and loss until the next pack's

        def forward() -> None:
            logits = self.engine.forward(packed=inputs).logits
            kept[:] = logits, answer_losses(logits, inputs.input_ids).sum() * 0.0

        if self.fresh:
            self._attempt(self.engine.make_moments)
        devices = [device] if device.type == "cuda" else []
        # What a dropout draws here, the run must not miss: it would depend on how often it began.
        with torch.random.fork_rng(devices):
            self._passes(device, forward, kept)
        self.ranks.log(
            f"worst case: a pack of {len(inputs.input_ids):,} text and "
            f"{sum(sample.image_tokens for sample in pack):,} image tokens went forward and "
            f"backward in {time.perf_counter() - began:.1f} s; peak memory of a rank "
            f"{max(self._peaks) / GIB:.2f} GiB{self._of_total()}"
            # A process holds libraries, and on a CPU nobody touches what is only reserved.
            + (f", estimated {self._estimate.total / GIB:.2f} GiB" if device.type == "cuda" else "")
        )

    def _passes(
        self, device: torch.device, forward: Callable[[], None], kept: list[Tensor]
    ) -> None:
        # Twice: DeepSpeed makes the sums of gradients in the first backward pass, and they lie
        # under the activations of every later one.
        for _ in range(2):
            reset_peak(device)
            # Forward and backward apart: ZeRO 1 and 2 run no collective between them, so that ranks
            # agree before one waits for a gradient that never comes.
            self._attempt(forward)
            self._attempt(lambda: self.engine.backward(kept[1]))
            self.engine.forget_gradients()

    def _attempt(self, work: Callable[[], None]) -> None:
        """Runs a part and agrees with all ranks on how it went."""
        error = None
        try:
            work()
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
        except (RuntimeError, MemoryError) as caught:  # torch.OutOfMemoryError is the first
            if not is_out_of_memory(caught):
                raise
            error = " ".join(str(caught).split())[:300]
        _, peak = memory_bytes(self.ranks.device)
        reports = exchange(self.ranks, {"error": error, "peak": peak}, patient=error is None)
        failed = [rank for rank, report in enumerate(reports) if report and report["error"]]
        if failed:
            message = self._message(failed, reports)
            # The ranks that did not answer hang where only the end of this one reaches them.
            raise UserError(message) if None not in reports else RankError(message)
        self._peaks = [report["peak"] for report in reports if report]

    def _message(self, failed: list[int], reports: list[dict[str, Any] | None]) -> str:
        data, parallel = self.config.data, self.config.parallel
        first = reports[failed[0]]
        assert first is not None
        advice = [
            "lower data.image_tokens or data.text_tokens and raise data.packs_per_step by as much"
        ]
        if parallel.activation_checkpointing != "all":
            advice.insert(0, "set parallel.activation_checkpointing=all")
        if parallel.zero_stage < 3:
            advice.append("set parallel.zero_stage=3 and start more ranks")
        return (
            "out of memory before the first step: a pack with both budgets full "
            f"(data.text_tokens={data.text_tokens}, data.image_tokens={data.image_tokens}) does "
            f"not fit on {'rank' if len(failed) == 1 else 'ranks'} "
            f"{', '.join(map(str, failed[:8]))}{', ...' if len(failed) > 8 else ''}. Measured up "
            f"to there: {first['peak'] / GIB:.2f} GiB{self._of_total()}; estimated: "
            f"{self._estimate.total / GIB:.2f} GiB, {sum(self._estimate.state.values()) / GIB:.2f} "
            f"of them state. To mend it {'; or '.join(advice)}. What alters the run needs "
            f"checkpoint.resume=never in this directory. ({first['error']})"
        )

    def _of_total(self) -> str:
        device = self.ranks.device
        if device.type != "cuda":
            return " of the process"
        return f" of {torch.cuda.mem_get_info(device)[1] / GIB:.2f}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left."""
    known = (torch.OutOfMemoryError, MemoryError)
    # Torch's CPU allocator, CUDA and NCCL themselves, cuBLAS.
    texts = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, known) or any(text in str(error) for text in texts)


def exchange(ranks: Ranks, report: dict[str, Any], patient: bool) -> list[dict[str, Any] | None]:
    """The report of every rank, through the store: no collective, so no rank can miss it.

    :param patient: wait for all ranks; otherwise those that take too long are None.
    """
    store: Any = dist.distributed_c10d._get_default_store()  # type: ignore[no-untyped-call]
    prefix = f"casa_train/worst_case/{next(_rounds)}"
    keys = [f"{prefix}/{rank}" for rank in range(ranks.world)]
    store.set(keys[ranks.rank], json.dumps(report))
    timeout = timedelta(days=1) if patient else PATIENCE
    try:
        store.wait(keys, timeout)
    except dist.DistStoreError:
        pass
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]
