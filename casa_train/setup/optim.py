"""Name patterns -> parameter groups; the learning-rate schedule as a pure function of the step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from casa_train.config.schema import Config, GroupConfig, OptimConfig
from casa_train.errors import UserError
from casa_train.setup.lora import GROUP, is_adapter


def build_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], groups: Mapping[str, GroupConfig]
) -> list[dict[str, Any]]:
    """Torch parameter groups: each configured group, split into decayed and undecayed tensors.

    :param parameters: all named parameters; frozen ones are left out. Patterns see the names of
        adapters behind `lora.`, so that the groups of what they stand beside do not match them.
    :return: dicts with `params`, `names`, `name`, `lr`, `base_lr`, `weight_decay`.
    :raises UserError: a trainable parameter that no group or several match, or a required group
        that matches nothing.
    """
    members: dict[str, list[tuple[str, nn.Parameter]]] = {name: [] for name in groups}
    for parameter_name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        matched = f"{GROUP}{parameter_name}" if is_adapter(parameter_name) else parameter_name
        matching = [
            name
            for name, group in groups.items()
            if any(re.search(pattern, matched) for pattern in group.patterns)
        ]
        if len(matching) != 1:
            found = f"groups {matching}" if matching else "no group"
            raise UserError(
                f"optim.groups: parameter {matched!r} matches {found}; every trainable "
                f"parameter must match exactly one of {list(groups)}. Mend the patterns of these "
                "groups, or add a group."
            )
        members[matching[0]].append((parameter_name, parameter))
    built: list[dict[str, Any]] = []
    for name, group in groups.items():
        if not members[name] and group.required:
            raise UserError(
                f"optim.groups.{name}: patterns {group.patterns} match no trainable parameter. "
                f"Mend them, or set optim.groups.{name}.required=false."
            )
        # Norm weights and biases are vectors; only they are.
        for decayed in (True, False):
            chosen = [(n, p) for n, p in members[name] if (_ndim(p) >= 2) == decayed]
            if chosen:
                built.append(
                    {
                        "name": name,
                        "names": [n for n, _ in chosen],
                        "params": [p for _, p in chosen],
                        "lr": 0.0,
                        "base_lr": group.lr,
                        "weight_decay": group.weight_decay if decayed else 0.0,
                    }
                )
    return built


def _ndim(parameter: nn.Parameter) -> int:
    # Under ZeRO-3 a sharded parameter is flat; its own shape is kept beside it.
    return len(getattr(parameter, "ds_shape", parameter.shape))


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, fused: bool | None = None
) -> torch.optim.Optimizer:
    """AdamW over the groups; the names stay out of it, since they would enter every checkpoint.

    :param fused: one kernel for the whole update, without temporaries of the weights' size; by
        default on a GPU.
    """
    plain = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    if fused is None:
        fused = all(parameter.is_cuda for group in plain for parameter in group["params"])
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(plain, betas=betas, eps=config.eps, fused=fused or None)


def fit_schedule(steps: int, warmup: int, decay: int) -> tuple[int, int]:
    """Warm-up and decay as asked, or shrunk in proportion where they exceed the run.

    A short trial of a long recipe then keeps the schedule's shape.
    """
    if warmup + decay <= steps:
        return warmup, decay
    shrunk = warmup * steps // (warmup + decay)
    return shrunk, steps - shrunk


def rate_factor(step: int, steps: int, warmup: int, decay: int) -> float:
    """Share of the peak rate in step 1..steps: linear warm-up, constant, linear decay.

    The rate depends on the step alone, so it is the same after a resume.
    """
    if warmup and step <= warmup:
        return step / warmup
    if decay and step > steps - decay:
        return (steps - step + 1) / (decay + 1)
    return 1.0


def scheduled_factor(config: Config, step: int) -> float:
    """Share of the peak rates in a step of the configuration's run."""
    optim, steps = config.optim, config.trainer.steps
    return rate_factor(step, steps, *fit_schedule(steps, optim.warmup_steps, optim.decay_steps))


def set_rates(param_groups: list[dict[str, Any]], factor: float) -> dict[str, float]:
    """Applies the schedule; returns the rate of each group name."""
    for group in param_groups:
        group["lr"] = group["base_lr"] * factor
    return {group["name"]: group["lr"] for group in param_groups}


def describe(
    parameters: Iterable[tuple[str, nn.Parameter]], groups: list[dict[str, Any]]
) -> list[str]:
    """Lines that say what trains at which rate, and what is frozen."""
    lines = []
    for name in dict.fromkeys(group["name"] for group in groups):
        same = [g for g in groups if g["name"] == name]
        count = sum(_numel(p) for g in same for p in g["params"])
        tensors = sum(len(g["params"]) for g in same)
        decay = max(g["weight_decay"] for g in same)
        rate = same[0]["base_lr"]
        lines.append(
            f"{name:<12} {count:>14,} parameters in {tensors:>4} tensors, rate {rate:g}, decay "
            f"{decay:g}"
        )
    frozen = [p for _, p in parameters if not p.requires_grad]
    count = sum(map(_numel, frozen))
    lines.append(f"{'frozen':<12} {count:>14,} parameters in {len(frozen):>4} tensors")
    return lines


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
