"""One optimiser step of every mechanism under ZeRO 1, 2 and 3, beside plain torch.

Started by test_zero_steps.py under torchrun: one launch runs all cases, since starting DeepSpeed
takes longer than any of them. Prints one JSON line a case.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from casa_train.config import GroupConfig, OptimConfig
from casa_train.engine import Engine, init_processes, leave_processes
from casa_train.loss import answer_losses
from casa_train.optim import build_groups, build_optimizer, set_rates
from tests.tiny import HARD_PACK, Layout, Sample, fill, packed_inputs, tiny_model

CASES: dict[str, dict[str, Any]] = {
    "casa": {"mechanism": "casa"},
    "casa zero output": {"mechanism": "casa", "init": "zero_output"},
    "casa shared, images updated": {
        "mechanism": "casa",
        "share_parameters": True,
        "update_image_tokens": "ffn_and_attention",
        "history": "all",
    },
    "casa before": {"mechanism": "casa", "placement": "before", "image_positions": "advance"},
    "casa replacing": {"mechanism": "casa", "placement": "replace", "every": 2},
    "cross attention after, ffn": {
        "mechanism": "cross_attention",
        "placement": "after",
        "update_image_tokens": "ffn",
    },
    "insertion": {"mechanism": "insertion"},
    "qformer_insertion": {"mechanism": "qformer_insertion", "queries": 3},
    "gated_cross_attention": {"mechanism": "gated_cross_attention"},
    "hyper_attention": {"mechanism": "hyper_attention"},
}
OPTIM = OptimConfig(
    groups={
        "fusion": GroupConfig([r"\.fusion\.", "^resampler"], 1e-2, 0.1, required=False),
        "rest": GroupConfig([r"^(?!resampler)(?!.*\.fusion\.)"], 2e-3, 0.0),
    },
    # A first Adam step is the sign of the gradient; so large an epsilon makes it see the size.
    eps=1e-2,
)
CLIP = 0.5
# What the loader makes of a pack without images: a dummy sample keeps all ranks on one graph.
TEXT_ONLY = [Layout(6), Layout(1, (0,), ((1, 1),))]


def packs() -> list[list[list[Sample]]]:
    """Three micro-steps of two ranks; rank 1 first has text alone, and at last nothing to learn."""
    return [
        [fill(HARD_PACK, 1), fill(TEXT_ONLY, 2)],
        [fill(HARD_PACK[:2], 3), fill(HARD_PACK[1:3], 4)],
        [fill(HARD_PACK[:1], 5), fill([Layout(1, (0,), ((1, 2),))], 6)],
    ]


def pack_loss(forward: Any, samples: list[Sample]) -> tuple[Tensor, int]:
    """Summed loss of predicting every token of a sample from the one before it."""
    inputs = packed_inputs(samples)
    first = 0
    rows, targets = [], []
    for sample in samples:
        count = len(sample.ids)
        rows += range(first, first + count - 1)
        targets.append(sample.ids[1:])
        first += count
    inputs.logits_index = torch.tensor(rows, dtype=torch.long)
    losses = answer_losses(forward(packed=inputs).logits, torch.cat(targets))
    return losses.sum(), len(rows)


def plain_step(case: dict[str, Any], total: int) -> dict[str, Tensor]:
    """The weights after one step of torch's own AdamW on all four packs."""
    model = tiny_model(**case).train()
    groups = build_groups(model.named_parameters(), OPTIM.groups)
    optimizer = build_optimizer(groups, OPTIM)
    set_rates(optimizer.param_groups, 1.0)
    loss = sum(pack_loss(model, samples)[0] for step in packs() for samples in step)
    (loss / total).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def engine_step(case: dict[str, Any], stage: int, rank: int, total: int) -> dict[str, Tensor]:
    """The same through the project's engine, each rank with its own packs."""
    model = tiny_model(**case)
    groups = build_groups(model.named_parameters(), OPTIM.groups)
    engine = Engine(model, build_optimizer(groups, OPTIM), stage, "fp32", len(packs()), CLIP)
    set_rates(engine.param_groups, 1.0)
    engine.train()
    for step in packs():
        loss, _ = pack_loss(engine.forward, step[rank])
        engine.backward(loss * (2 / total))
        engine.step()
    weights = {n: engine.full_parameter(p).clone() for n, p in engine.module.named_parameters()}
    engine.close()
    return weights


def main() -> None:
    torch.set_num_threads(1)
    rank, world, _ = init_processes()
    assert world == 2
    total = sum(len(s.ids) - 1 for step in packs() for samples in step for s in samples)
    for name, case in CASES.items():
        expected = plain_step(case, total)
        for stage in (1, 2, 3):
            found = engine_step(case, stage, rank, total)
            start = dict(tiny_model(**case).named_parameters())
            worst = max(float((found[n] - expected[n]).abs().max()) for n in expected)
            moved = min(float((expected[n] - start[n]).detach().abs().max()) for n in expected)
            if rank == 0:
                assert math.isfinite(worst)
                line = {"case": name, "stage": stage, "error": worst, "least_move": moved}
                print(json.dumps(line), flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
