"""Saves and resumes under every ZeRO stage, frozen and trained, fp32 and bf16.

`python -m tests.helpers.resume_steps OUT`, started by test_resume_steps.py. Two ranks train N
steps, save, and train N more; one rank loads what they saved and saves it again; four ranks the
same; and two load that, train the last N steps, and load under one stage what another saved, also
in the layout of older checkpoints. Each writes what the parameters and Adam's moments are, by name,
as DeepSpeed itself reads them.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from casa_train.checkpoint.slices import STATE_DIRECTORY
from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import Engine
from casa_train.engine.starting import build_engine
from casa_train.errors import UserError
from casa_train.io.precision import DTYPES
from casa_train.io.tensors import save_tensors
from casa_train.setup.optim import set_rates
from tests.helpers.adapted import adapt
from tests.helpers.distributed import run_ranks
from tests.helpers.tiny import HARD_PACK, Sample, fill, tiny_model
from tests.helpers.tiny_run import tiny_settings
from tests.helpers.zero_steps import pack_loss

CASES: dict[str, tuple[int, str, bool | str]] = {
    f"stage {stage}, {precision}, {'frozen' if frozen else 'trained'}": (stage, precision, frozen)
    for stage, precision, frozen in itertools.product((1, 2, 3), ("fp32", "bf16"), (False, True))
}
# Adapters beside the frozen backbone.
CASES |= {f"stage {stage}, bf16, lora": (stage, "bf16", "lora") for stage in (1, 2, 3)}
CROSSINGS = [(1, 3), (3, 2), (2, 1)]  # ZeRO stages: saved, loaded
MOSTLY_FROZEN = [case for case in CASES if case.endswith("bf16, frozen")]
N = 2
PACKS = 4  # in a step, over all ranks
# Rates, decays and sizes differ, so that a mix-up of groups shows.
OPTIM = OptimConfig(
    groups={
        "fusion": GroupConfig([r"\.fusion\."], 1e-2, 0.1),
        "tower": GroupConfig([r"visual"], 3e-3, 0.5, required=False),
        "rest": GroupConfig([r"^(?!.*\.fusion\.)(?!.*visual)"], 2e-3, 0.0, required=False),
    },
    clip=0.5,
)


def make_engine(ranks: Ranks, stage: int, precision: str, frozen: bool | str, seed: int) -> Engine:
    model = tiny_model(seed=seed)
    if frozen == "lora":
        adapt(model, ["q_proj", "v_proj", "down_proj"], seed=seed)
    model.visual.set_trainable(1)
    if frozen:
        for name, parameter in model.named_parameters():
            if not any(part in name for part in (".fusion.", "visual", ".lora_")):
                parameter.requires_grad = False
    model.to(DTYPES[precision])
    # What a GPU would take by itself: its count of updates lies elsewhere.
    fused = precision == "bf16" and not frozen
    # ZeRO-3 makes image keys layer by layer, which rounds elsewhere: here all stages do.
    settings = tiny_settings(OPTIM, stage, precision, PACKS, joint_keys="off")
    return build_engine(settings, model, ranks, fused)


def pack(step: int, number: int) -> list[Sample]:
    return fill(HARD_PACK[: 1 + (step + number) % 4], seed=10 * step + number)


def train(engine: Engine, first: int, last: int) -> None:
    """Steps `first` to `last`, as the trainer runs them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last + 1):
        tokens = sum(len(s.ids) - 1 for n in range(PACKS) for s in pack(step, n))
        set_rates(engine.param_groups, 1 / step)
        for number in range(rank, PACKS, world):
            loss, _ = pack_loss(engine.forward, pack(step, number))
            engine.backward(loss * (world / tokens))
            engine.step()
        assert engine.step_applied()


def nan_step(engine: Engine) -> bool:
    """A step in which one rank's loss is not a number; returns whether it was applied."""
    for _ in range(PACKS // dist.get_world_size()):
        loss, _ = pack_loss(engine.forward, pack(0, 0))
        engine.backward(loss * (float("nan") if dist.get_rank() == 1 else 1.0))
        engine.step()
    return engine.step_applied()


def state(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """By name the weight the model computes with, the master and the moments, whole."""
    optimizer = engine._engine.optimizer
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        # Its first step does this too, but before all groups but one have moments.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name] = {"weight": parameter.detach().clone()}
        if parameter.requires_grad:
            found[name]["master"] = safe_get_full_fp32_param(parameter)
            for kind in ("exp_avg", "exp_avg_sq"):
                found[name][kind] = safe_get_full_optimizer_state(parameter, kind)
    inner = optimizer.optimizer
    found["updates"] = {str(i): float(s["step"]) for i, s in enumerate(inner.state.values())}
    return found


def settings(engine: Engine) -> list[dict[str, Any]]:
    """What the groups' parameters are updated with."""
    kept = ("name", "base_lr", "weight_decay", "betas", "eps")
    return [{key: group[key] for key in kept} for group in engine.param_groups]


def save_as_before(engine: Engine, directory: Path) -> None:
    """A checkpoint as it was before frozen weights had a file of their own: every rank has a share
    of them among its slices.
    """
    inner = engine._state()
    frozen = inner.frozen()
    if engine.zero_stage != 3:
        frozen = frozen[dist.get_rank() :: dist.get_world_size()]
    slices = [vars(piece) for piece in (*inner.trained(), *frozen)]
    file = directory / STATE_DIRECTORY / f"rank_{dist.get_rank():05d}.pt"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors({"updates": inner.updates(), "slices": slices}, file)


def frozen_files(checkpoints: Path) -> dict[str, int]:
    """Name and inode of every file of frozen weights."""
    return {path.name: path.stat().st_ino for path in (checkpoints / "frozen").iterdir()}


def saves_again(engine: Engine, directory: Path) -> list[Any]:
    """Frozen weights after one save, another one, and one that finds the file lost."""
    found = []
    for number in range(3):
        if number == 2 and dist.get_rank() == 0:
            for path in (directory / "frozen").iterdir():
                path.unlink()
        dist.barrier()
        engine.save(directory / f"step_{number}")
        dist.barrier()
        found.append(frozen_files(directory))
        dist.barrier()  # before one rank takes the files away
    return found


def refusals(ranks: Ranks, saved: Path) -> list[str]:
    """What is said of a state that belongs to another model."""
    said = []
    for frozen, options in ((True, {}), (False, {"mechanism": "gated_cross_attention"})):
        model = tiny_model(**options)
        for parameter in model.visual.parameters():
            parameter.requires_grad = not frozen
        engine = build_engine(tiny_settings(OPTIM, 2, packs=ranks.world), model, ranks)
        try:
            engine.load(saved)
        except UserError as error:
            said.append(str(error))
        engine.close()
    return said


def work(ranks: Ranks, action: str, before: Path, out: Path) -> None:
    """One rank's part of all cases."""
    rank = ranks.rank
    for case, options in CASES.items():
        # What is loaded over must not be what is loaded.
        engine = make_engine(ranks, *options, seed=0 if action == "straight" else 1)
        if action == "straight":
            train(engine, 1, N)
        else:
            engine.load(before / case)
        found: dict[str, Any] = {"now": state(engine), "settings": settings(engine)}
        if action != "finish":
            engine.save(out / case)
        if action == "straight" and case in MOSTLY_FROZEN:
            found["saves again"] = saves_again(engine, out / "again" / case)
            save_as_before(engine, out / "before" / case)
        if action != "carry":
            train(engine, N + 1, 2 * N)
            found["end"] = state(engine)
        if action == "finish":
            found["skipped"] = not nan_step(engine)
            found["after a skipped step"] = state(engine)
        if rank == 0:
            (out / case).mkdir(parents=True, exist_ok=True)
            torch.save(found, out / case / "found.pt")
        dist.barrier()
        engine.close()
    if action == "finish":
        said = refusals(ranks, before / "stage 2, fp32, trained")
        if rank == 0:
            (out / "refusals.json").write_text(json.dumps(said))
        for (there, here), older in itertools.product(CROSSINGS, (False, True)):
            engine = make_engine(ranks, here, "bf16", True, seed=1)
            saved = before.parent / "2" / "before" if older else before
            engine.load(saved / f"stage {there}, bf16, frozen")
            loaded = state(engine)
            name = f"{there} to {here}{', as before' if older else ''}"
            engine.save(out / name / "step_1")
            dist.barrier()
            if rank == 0:
                torch.save(loaded, out / f"{name}.pt")
            engine.close()
        # Other precisions round frozen weights, so their file is another one.
        engine = make_engine(ranks, 2, "fp32", True, seed=1)
        engine.load(before / "stage 2, bf16, frozen")
        engine.save(out / "bf16 to fp32" / "step_1")
        engine.close()
        dist.barrier()


def main() -> None:
    out = Path(sys.argv[1])
    run_ranks(2, work, "straight", out, out / "2")
    run_ranks(1, work, "carry", out / "2", out / "1")
    run_ranks(4, work, "carry", out / "1", out / "4")
    run_ranks(2, work, "finish", out / "4", out / "finish")


if __name__ == "__main__":
    main()
