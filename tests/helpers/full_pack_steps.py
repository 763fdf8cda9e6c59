"""Training with and without a worst-case pack before it, and one that a rank has no memory for.

Started by test_worst_case.py under torchrun on two ranks. Prints one JSON line a case.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.cost.sizes import size_model
from casa_train.engine.engine import Engine, init_processes, shard
from casa_train.errors import UserError
from casa_train.setup.model import meta_model
from casa_train.setup.optim import build_groups, build_optimizer, set_rates
from casa_train.setup.precision import DTYPES
from casa_train.setup.pretrained import Stored
from casa_train.setup.weights import Start, start_weights
from casa_train.training import memory_probe as worst_case
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
    "stage 3, recomputed": ["parallel.zero_stage=3", "parallel.activation_checkpointing=all"],
}


def composed(*overrides: str) -> Config:
    return compose_config(
        ["+experiment=demo", *TINY, "data.packs_per_step=4", *overrides, "dry_run=true"]
    )


def make_engine(config: Config) -> Engine:
    stage, precision = config.parallel.zero_stage, config.parallel.precision
    model = meta_model(config, size_model(config, []))
    start = Start(Stored(), [], copies=True)
    dtype = DTYPES[precision]
    finish = lambda block: shard(block, stage, precision)  # noqa: E731
    start_weights(model, start, 0, torch.device("cpu"), dtype, finish)
    model.checkpoint_activations(config.parallel.activation_checkpointing)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    optimizer = build_optimizer(groups, config.optim)
    accumulation = config.data.packs_per_step // dist.get_world_size()
    engine = Engine(model, optimizer, stage, precision, accumulation, config.optim.clip)
    engine.train()
    return engine


def trained(config: Config, rank: int, first: bool) -> tuple[dict[str, Any], list[str]]:
    """What three steps leave behind, every number exact; and what the worst case said.

    :param first: whether a worst case comes first.
    """
    torch.manual_seed(rank)
    engine, said = make_engine(config), []
    if first:
        worst_case.WorstCase(config, engine, torch.device("cpu"), said.append, fresh=True).run()
    losses, norms = [], []
    accumulation = config.data.packs_per_step // dist.get_world_size()
    for _ in range(3):
        set_rates(engine.param_groups, 1.0)
        for step in packs()[-accumulation:]:
            loss, _ = pack_loss(engine.forward, step[rank])
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


def too_large(rank: int, where: str, stage: int) -> None:
    """A pack for which rank 1 alone has no memory in its forward or its backward pass."""
    config = composed(
        f"parallel.zero_stage={stage}", "data.text_tokens=16384", "data.image_tokens=1024"
    )
    engine = make_engine(config)
    run = getattr(engine, where)

    def starved(*arguments: Any, **keywords: Any) -> Any:
        leave_memory(16 << 20)
        return run(*arguments, **keywords)

    if rank == 1:
        setattr(engine, where, starved)
    kind, message = "", ""
    try:
        worst_case.WorstCase(config, engine, torch.device("cpu"), lambda line: None).run()
    except UserError as error:
        kind, message = type(error).__name__, str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    line = {"case": f"too large, {where}", "rank": rank, "error": kind, "message": message}
    print(json.dumps(line), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    rank, _, _ = init_processes()
    for name, overrides in CASES.items():
        config = composed(*overrides)
        without, _ = trained(config, rank, first=False)
        after, said = trained(config, rank, first=True)
        same = torch.tensor(int(without == after))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        if rank == 0:
            line = {"case": name, "same": bool(same), "said": said}
            print(json.dumps({**line, "without": without, "after": after}), flush=True)
    too_large(rank, "forward", stage=2)
    # Rank 0 waits for a gradient that never comes: only rank 1 can say why.
    worst_case.PATIENCE = timedelta(seconds=2)
    too_large(rank, "backward", stage=2)
    os._exit(2)


if __name__ == "__main__":
    main()
