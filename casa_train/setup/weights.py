"""Where a model's first values come from: checkpoints found and checked, then read or drawn on the
device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.setup.first_values import FirstValues, blocks
from casa_train.setup.lora import first_draws, plain_layers
from casa_train.setup.pretrained import (
    Account,
    Pretrained,
    Stored,
    find_backbone,
    find_export,
)
from casa_train.setup.tower_weights import find_vision


@dataclass(frozen=True)
class Sources:
    """The checkpoints that a run starts from, opened; None where its part starts at random."""

    backbone: Pretrained | None = None
    vision: Pretrained | None = None
    whole: Pretrained | None = None


def open_sources(config: Config) -> Sources:
    """Opens what `pretrained` or `init_from` names; reads configurations, no weights yet.

    :raises UserError: something that is not there, or nothing named.
    """
    backbone, vision, whole = (
        config.model.backbone.pretrained,
        config.model.vision.pretrained,
        config.model.init_from,
    )
    if whole is not None:
        return Sources(whole=Pretrained(whole, "model.init_from"))
    if backbone is None and "model_type" not in config.model.backbone.config:
        raise UserError(NO_BACKBONE)
    return Sources(
        None if backbone is None else Pretrained(backbone, "model.backbone.pretrained"),
        None if vision is None else Pretrained(vision, "model.vision.pretrained"),
    )


@dataclass(frozen=True)
class Start:
    """What the run starts from, found and checked, but not read.

    :param copies: whether fusion layers start from their blocks rather than from `stored`.
    """

    stored: Stored
    accounts: list[Account]
    copies: bool


def find_weights(
    model: CasaForConditionalGeneration, sources: Sources, resize: bool = False
) -> Start:
    """Finds the model's parameters in the checkpoints that the run starts from.

    :param resize: whether embedding and head may have more rows than there.
    :raises UserError: checkpoints that do not fit.
    """
    stored, accounts = Stored(), []
    if sources.whole is not None:
        accounts.append(find_export(model, sources.whole, stored, resize))
    if sources.backbone is not None:
        accounts.append(find_backbone(model, sources.backbone, stored, resize))
    if sources.vision is not None:
        accounts.append(find_vision(model, sources.vision, stored))
    return Start(stored, accounts, copies=sources.whole is None)


def start_weights(
    model: CasaForConditionalGeneration,
    start: Start | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    finish: Callable[[nn.Module], None],
) -> None:
    """Gives a model on the meta device its first values, the same on every rank, block by block.

    :param start: None leaves NaN everywhere, for a checkpoint of the run to replace.
    :param finish: called with every block that is complete, before the next one is begun.
    """
    if start is None:
        values = FirstValues(None, Stored(), seed, device, dtype)
    else:
        draw = first_draws(model, model._init_weights)
        values = FirstValues(draw, start.stored, seed, device, dtype)
    decoder = set(model.model.layers)
    for name, block in blocks(model):
        values.fill(name, block)
        if start is not None and start.copies and block in decoder:
            with plain_layers(block):
                model.mechanism.initialise(block)
        finish(block)


NO_BACKBONE = (
    "model.backbone names no model: model.backbone.pretrained, model.init_from and "
    "model.backbone.config.model_type are all empty; expected one of them. Set it."
)
