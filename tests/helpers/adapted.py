"""Tiny models with adapters (LoRA) of random values, and twins whose weights hold them by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from casa_train.config.model_schema import BackboneConfig, LoraSettings
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.setup.lora import add_adapters

RANK, ALPHA = 3, 5.0


def adapt(
    model: CasaForConditionalGeneration,
    targets: list[str] | None = None,
    dropout: float = 0.0,
    seed: int = 5,
) -> CasaForConditionalGeneration:
    """Puts adapters into a model, trained beside a frozen backbone; none of their values is zero.

    :return: the model, in evaluation mode.
    """
    dtype = model.model.norm.weight.dtype
    for part in (model.model, model.lm_head):
        part.requires_grad_(False)
    settings = LoraSettings(RANK, ALPHA, dropout, targets)
    add_adapters(model, BackboneConfig(trainable="lora", lora=settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            values = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = values.to(dtype)
            parameter.requires_grad_(True)
        elif ".fusion." in name:
            parameter.requires_grad_(True)
    return model.eval()


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """By the name that its linear's weight has without it, every adapter's A and B."""
    found = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    downs = [name for name in found if ".lora_A." in name]
    return {
        name.split(".lora_A.")[0] + ".weight": (found[name], found[name.replace("_A.", "_B.")])
        for name in downs
    }


@torch.no_grad()
def add_by_hand(plain: CasaForConditionalGeneration, adapted: Any) -> None:
    """W + B A alpha / rank into the weights of a model without adapters."""
    weights = dict(plain.named_parameters())
    for name, (down, up) in factors(adapted).items():
        weights[name] += up @ down * (ALPHA / RANK)
