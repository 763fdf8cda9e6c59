"""A run in which one rank's loss is not finite in chosen steps.

`python -m tests.helpers.nan_steps OUT STEPS`: two ranks under torchrun train a tiny model as any
run is trained; rank 1 multiplies its logits by NaN in the given steps (comma-separated). Rank 0
writes every record to OUT.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine
from casa_train.errors import UserError
from casa_train.train import build_run
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_run import Lines, tiny_batch, tiny_settings


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
            time.sleep(2)
        sources = [("a", 3), (f"only rank {self.rank}", 1)]
        return [tiny_batch(self.rank, f"rank{self.rank}", sources, operations=1 + self.rank)]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Keep(Lines):
    """Keeps records among the lines."""

    def write(self, record: dict[str, Any]) -> None:
        self.lines.append(json.dumps(record))


def main() -> None:
    out, broken = Path(sys.argv[1]), {int(step) for step in sys.argv[2].split(",") if step}
    torch.set_num_threads(1)
    ranks = init_processes()
    config = tiny_settings(OptimConfig(groups={"all": GroupConfig(["."], 1e-3)}), stage=2)
    config.trainer = replace(config.trainer, steps=12, max_skipped_steps=3, log_every=4)
    model = tiny_model()
    engine, loader = build_engine(config, model, ranks), Packs(ranks.rank)
    lines: list[str] = []
    run = build_run(config, ranks, engine, loader, sinks=[Keep(lines)])

    def sometimes_nan(module: Any, inputs: Any, output: Any) -> None:
        if ranks.rank == 1 and loader.step in broken:
            output.logits = output.logits * float("nan")

    model.register_forward_hook(sometimes_nan)
    weight = model.model.norm.weight
    before = engine.full_parameter(weight).clone()
    try:
        run.trainer.run()
    except UserError as error:
        lines.append(f"error: {error}")
    finite = bool(torch.isfinite(engine.full_parameter(weight)).all())
    moved = not torch.equal(engine.full_parameter(weight), before)
    lines.append(json.dumps({"finite": finite, "moved": moved, **vars(run.state.progress)}))
    if ranks.first:
        out.write_text("\n".join(lines) + "\n")
    engine.close()
    leave_processes()


if __name__ == "__main__":
    main()
