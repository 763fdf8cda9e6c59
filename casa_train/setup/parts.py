"""The parts of a model, how large each is, and the lines that a run begins with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from casa_train import __version__
from casa_train.config.micro_steps import micro_steps
from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.io.numbers import count
from casa_train.io.precision import DTYPES
from casa_train.modeling.attention import choose_backend
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.tower_kinds import kind_of
from casa_train.setup.optim import fit_schedule

VISION, FUSION, TEXT = "vision tower", "fusion", "text backbone"
PARTS = (TEXT, VISION, FUSION)
"""In the order in which accounts of sizes list them."""


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: the rows of every account of sizes."""
    if name.startswith("visual."):
        return VISION
    if ".fusion." in name or name.startswith(("resampler.", "adapter.", "joint_keys.")):
        return FUSION
    return TEXT


def part_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; tied ones count once."""
    sizes = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    return sizes


def banner(
    config: Config,
    model: CasaForConditionalGeneration,
    notes: Sequence[str],
    ranks: Ranks,
) -> list[str]:
    """What the run is, in a few lines; `notes` are those of its data."""
    kind, backbone = kind_of(model.config.vision_config), model.config.text_config
    tower = kind.shape(model.config.vision_config)
    accumulation = micro_steps(config.data, ranks.world)
    backend = choose_backend("auto", ranks.device, DTYPES[config.parallel.precision])
    sizes = part_sizes(model)
    linear = model.config.adapter == "linear"
    adapter = "adapter" if linear else "adapter of two linears"
    adapted = not linear or tower.out != backbone.hidden_size
    lines = [
        f"casa_train {__version__}: run {config.name} in {config.run_dir}",
        f"backbone {backbone.model_type}: {backbone.num_hidden_layers} layers, width "
        f"{backbone.hidden_size}, {sizes[TEXT]:,} parameters",
        f"vision tower of {kind.title}: {tower.depth} blocks, width {tower.width}, "
        f"{sizes[VISION]:,} parameters, {model.visual.frozen_blocks} frozen blocks"
        + (
            ", random at the start: neither model.vision.pretrained nor model.init_from is set"
            if config.model.vision.pretrained is None and config.model.init_from is None
            else ""
        ),
        f"fusion {config.fusion['mechanism']}: {sizes[FUSION]:,} parameters"
        + (
            f", an {adapter} from width {tower.out} to {backbone.hidden_size} among them"
            if adapted
            else ""
        ),
        f"attention backend: {backend} on {ranks.device.type}",
        f"{count(ranks.world, 'rank')} x {count(accumulation, 'micro-step')}, "
        f"ZeRO-{config.parallel.zero_stage}, {config.parallel.precision}, "
        f"{count(torch.get_num_threads(), 'thread')}; a pack holds "
        f"{config.data.text_tokens} text and {config.data.image_tokens} image tokens",
    ]
    optim, steps = config.optim, config.trainer.steps
    wanted = (optim.warmup_steps, optim.decay_steps)
    fitted = fit_schedule(steps, *wanted)
    lines.append(f"{steps} steps: {fitted[0]} of warm-up, {fitted[1]} of decay at the end")
    if fitted != wanted:
        lines[-1] += f" (asked for {wanted[0]} and {wanted[1]}, more than there are steps)"
    if config.evaluation.every and not (config.data.validation or config.evaluation.benchmarks):
        lines.append(
            "no validation: data.validation names no held-out split and evaluation.benchmarks no "
            "benchmark"
        )
    return [*lines, *notes]
