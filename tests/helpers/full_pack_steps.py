"""Training with and without a worst-case pack before it, and one that a rank has no memory for.

Started by test_memory_probe.py under torchrun on two ranks. Prints one JSON line a case.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.cost.sizes import size_model
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import Engine, init_processes
from casa_train.engine.starting import build_engine, start_model
from casa_train.errors import UserError
from casa_train.setup.model import meta_model
from casa_train.setup.optim import set_rates
from casa_train.setup.pretrained import Stored
from casa_train.setup.weights import Start
from casa_train.training import memory_probe
from casa_train.training.state import Progress
from tests.helpers.commands import TINY
from tests.helpers.zero_steps import pack_loss, packs

CASES = {
    "stage 1": ["parallel.zero_stage=1"],
    "stage 2": [],
    "stage 3": ["parallel.zero_stage=3"],
    "stage 1, bf16": ["parallel.zero_stage=1", "parallel.precision=bf16"],
    "stage 2, bf16": ["parallel.precision=bf16"],
    "stage 3, bf16": ["parallel.zero_stage=3", "parallel.precision=bf16"],
    "stage 2, frozen": ["model.backbone.trainable=false", "model.vision.train_last_blocks=1"],
    "stage 2, one micro-step": ["data.packs_per_step=2"],
    "stage 1, one micro-step": ["data.packs_per_step=2", "parallel.zero_stage=1"],
    "stage 3, one micro-step": ["data.packs_per_step=2", "parallel.zero_stage=3"],
    "stage 3, checkpointed": ["parallel.zero_stage=3", "parallel.activation_checkpointing=all"],
}


def composed(*overrides: str) -> Config:
    return compose_config(
        [
            "+experiment=demo",
            *TINY,
            "data.packs_per_step=4",
            *overrides,
            "dry_run=true",
        ]
    )


def make_engine(config: Config, ranks: Ranks) -> Engine:
    model = meta_model(config, size_model(config, []))
    start_model(config, model, Start(Stored(), [], copies=True), ranks)
    return build_engine(config, model, ranks)


def trained(config: Config, ranks: Ranks, first: bool) -> tuple[dict[str, Any], list[str]]:
    """What three steps leave behind, every number exact; and what the worst case said.

    :param first: whether a worst case comes first.
    """
    engine = make_engine(config, ranks)
    torch.manual_seed(ranks.rank)
    said: list[str] = []
    if first:
        heard = replace(ranks, out=said.append)
        memory_probe.MemoryProbe(config, heard, engine, fresh=True).begin(Progress())
    losses, norms = [], []
    accumulation = config.data.packs_per_step // ranks.world
    for _ in range(3):
        set_rates(engine.param_groups, 1.0)
        for step in packs(28)[-accumulation:]:
            loss, _ = pack_loss(engine.forward, step[ranks.rank])
            losses.append(float(loss.detach()))
            engine.backward(loss)
            engine.step()
        norms.append(engine.gradient_norm())
    weights = hashlib.sha256()
    for _, parameter in sorted(engine.module.named_parameters()):
        weights.update(engine.full_parameter(parameter).float().contiguous().numpy().tobytes())
    result = {
        "losses": losses,
        "norms": norms,
        "weights": weights.hexdigest(),
        "random": float(torch.rand(1)),
        "counters": [engine._engine.micro_steps, engine._engine.global_steps],
    }
    engine.close()
    return result, said


def leave_memory(more: int) -> None:
    """This process may take so many bytes more, and then no allocation succeeds."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))


def too_large(ranks: Ranks, where: str, stage: int) -> None:
    """A pack for which rank 1 alone has no memory in its forward or its backward pass."""
    sizes = "data.text_tokens=16384", "data.image_tokens=1024"
    config = composed(f"parallel.zero_stage={stage}", *sizes, "trainer.worst_case=true")
    engine = make_engine(config, ranks)
    run = getattr(engine, where)

    def starved(*arguments: Any, **keywords: Any) -> Any:
        leave_memory(16 << 20)
        return run(*arguments, **keywords)

    if ranks.rank == 1:
        setattr(engine, where, starved)
    kind, message = "", ""
    try:
        memory_probe.MemoryProbe(config, ranks, engine).begin(Progress())
    except UserError as error:
        kind, message = type(error).__name__, str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    line = {"case": f"too large, {where}", "rank": ranks.rank, "error": kind, "message": message}
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    ranks = init_processes()
    for name, overrides in CASES.items():
        config = composed(*overrides, "trainer.worst_case=true")
        without, _ = trained(config, ranks, first=False)
        after, said = trained(config, ranks, first=True)
        same = torch.tensor(int(without == after))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if ranks.first:
            line = {"case": name, "same": bool(same), "said": said}
            print(json.dumps({**line, "without": without, "after": after}), flush=True)
    too_large(ranks, "forward", stage=2)
    # Rank 0 waits for a gradient that never comes: only rank 1 can say why.
    memory_probe.PATIENCE = timedelta(seconds=2)
    too_large(ranks, "backward", stage=2)
    os._exit(2)


if __name__ == "__main__":
    main()
