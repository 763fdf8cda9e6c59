"""Several ranks that start, save and resume under each ZeRO stage; a script for torchrun.

`zero_start.py OUT OVERRIDE...`: rank 0 writes to OUT the digests of all parameters, for each stage
and precision after the start and after a resume into a model that held no values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from hydra import compose, initialize_config_dir

from casa_train.config.compose import to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import Engine, init_processes, leave_processes
from casa_train.engine.starting import build_engine, start_model
from casa_train.setup.inputs import check_inputs


def engine_of(config: Config, ranks: Ranks, stage: int, precision: str, resumed: bool) -> Engine:
    """As in `train`; under ZeRO-3 no block may be left whole on a rank."""
    parallel = replace(config.parallel, zero_stage=stage, precision=precision)
    data = replace(config.data, packs_per_step=ranks.world)
    config = replace(config, parallel=parallel, data=data)
    checked = check_inputs(config, ranks.world)
    start_model(config, checked.model, None if resumed else checked.start, ranks)
    if stage == 3:
        assert all(p.numel() == 0 for p in checked.model.parameters()), "a block was not sharded"
    return build_engine(config, checked.model, ranks)


def digests(engine: Engine) -> dict[str, str]:
    """sha256 of the whole fp32 value of every parameter, under all its names."""
    found = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        value = engine.full_parameter(parameter).detach().float().cpu().contiguous()
        assert not bool(value.isnan().any()), name
        found[name] = hashlib.sha256(value.numpy().tobytes()).hexdigest()
    return found


def main(out: Path, overrides: list[str]) -> None:
    ranks = init_processes()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        config = to_config(compose("train", overrides=overrides))
    results = {}
    for precision, stage in itertools.product(("fp32", "bf16"), (1, 2, 3)):
        engine = engine_of(config, ranks, stage, precision, resumed=False)
        started = digests(engine)
        saved = out.with_name(f"{precision}_{stage}")
        engine.save(saved)
        dist.barrier()
        engine.close()
        engine = engine_of(config, ranks, stage, precision, resumed=True)
        engine.load(saved)
        resumed = digests(engine)
        engine.close()
        mine = json.dumps([started, resumed])
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        assert set(everyone) == {mine}, f"ranks differ in {precision}, stage {stage}"
        results[f"{precision} {stage}"] = {"started": started, "resumed": resumed}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.barrier()
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
