"""A run in which one rank's loss is not finite in chosen steps.

`python -m tests.helpers.nan_steps OUT STEPS`: two ranks under torchrun train a tiny model with the
real trainer, engine and audit; rank 1 multiplies its logits by NaN in the given steps (comma-
separated). Rank 0 writes every record to OUT.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.distributed.ranks import gather
from casa_train.engine.engine import Engine, init_processes, leave_processes
from casa_train.errors import UserError
from casa_train.setup.optim import build_groups, build_optimizer, set_rates
from casa_train.training.audit import Audit
from casa_train.training.loop import Trainer
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs, tiny_model


class Packs:
    """The same pack in every step, a sample name of its own for each rank.

    Rank 1 waits for that of step 5.
    """

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0

    def next_step(self) -> list[Any]:
        self.step += 1
        if self.rank == 1 and self.step == 5:
            time.sleep(0.1)
        inputs = packed_inputs(fill(HARD_PACK, seed=self.rank))
        inputs.logits_index = torch.arange(4)
        return [
            SimpleNamespace(
                inputs=inputs,
                targets=inputs.input_ids[1:5],
                answer_sources=[("a", 3), (f"only rank {self.rank}", 1)],
                sample_ids=[f"rank{self.rank}"],
                text_tokens=18,
                image_tokens=10,
                fills=(1.0, 1.0),
                pairs=1,
                failures=[],
                left_out=0,
                operations=1 + self.rank,
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        return {}


def main() -> None:
    out, broken = Path(sys.argv[1]), {int(step) for step in sys.argv[2].split(",") if step}
    torch.set_num_threads(1)
    rank, world, device = init_processes()
    model = tiny_model().train()
    optim = OptimConfig(groups={"all": GroupConfig(["."], 1e-3)})
    groups = build_groups(model.named_parameters(), optim.groups)
    engine = Engine(model, build_optimizer(groups, optim), 2, "fp32", 1, 1.0)
    names = {name: group["name"] for group in groups for name in group["names"]}
    lines: list[str] = []
    sink = SimpleNamespace(write=lambda record: lines.append(json.dumps(record)), log=lines.append)
    trainer = Trainer(
        engine=engine,
        loader=Packs(rank),
        device=device,
        world=world,
        steps=12,
        save_every=100,
        max_bad_share=1.0,
        set_rates=lambda step: set_rates(engine.param_groups, 1.0),
        save=lambda *arguments: None,
        quarantine=lambda failures: None,
        gather=gather,
        sinks=[sink],
        audit=Audit(engine, names, model.mechanism.zero_at_start),
        max_skipped=3,
        source_every=4,
    )
    forward = engine.forward

    def sometimes_nan(**inputs: Any) -> Any:
        output = forward(**inputs)
        if rank == 1 and trainer.progress.step + 1 in broken:
            output.logits = output.logits * float("nan")
        return output

    engine.forward = sometimes_nan  # type: ignore[method-assign]
    weight = model.model.norm.weight
    before = engine.full_parameter(weight).clone()
    try:
        trainer.run()
    except UserError as error:
        lines.append(f"error: {error}")
    finite = bool(torch.isfinite(engine.full_parameter(weight)).all())
    moved = not torch.equal(engine.full_parameter(weight), before)
    lines.append(json.dumps({"finite": finite, "moved": moved, **vars(trainer.progress)}))
    if rank == 0:
        out.write_text("\n".join(lines) + "\n")
    engine.close()
    leave_processes()


if __name__ == "__main__":
    main()
