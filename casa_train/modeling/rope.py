"""Rotary position embeddings, computed on the fly from a backbone's configuration.

A buffer would be cast to bfloat16 with the model and lose long positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .regions import region
from .segments import on_device

# Cosines and signed sines, each (tokens, 1, D); or, for `BY_PRODUCT`, one (tokens, D, D).
Table = tuple[Tensor, ...]

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Rope(Protocol):
    """How a backbone pairs the elements of a head; called, it rotates (tokens, heads, D)."""

    def __call__(self, x: Tensor, table: Table) -> Tensor: ...

    def lay_out(self, cos: Tensor, sin: Tensor) -> Table:
        """(tokens, D/2) cosines and sines as (tokens, 1, D), signed as the pairs need them."""
        ...


class RotateHalves:
    """Pairs element i with i + D/2 (all backbones but Helium)."""

    def __call__(self, x: Tensor, table: Table) -> Tensor:
        return rotate_halves(x, table)

    def lay_out(self, cos: Tensor, sin: Tensor) -> Table:
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]


class RotatePairs:
    """Pairs element 2i with 2i + 1 (Helium)."""

    def __call__(self, x: Tensor, table: Table) -> Tensor:
        return rotate_pairs(x, table)

    def lay_out(self, cos: Tensor, sin: Tensor) -> Table:
        cosines, sines = torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)
        return cosines.flatten(-2)[:, None], sines.flatten(-2)[:, None]


class ByProduct:
    """Either of the two as a product with the matrix of each token's rotation: one operation in
    place of four, for the single token a row of a decode step.
    """

    def __call__(self, x: Tensor, table: Table) -> Tensor:
        matrices = table[0]
        if x.dtype != matrices.dtype:
            wide = torch.promote_types(x.dtype, matrices.dtype)
            x, matrices = x.to(wide), matrices.to(wide)
        return torch.bmm(x, matrices)


BY_PRODUCT = ByProduct()


class Still:
    """Of layers without RoPE, whose queries and keys know no positions (SmolLM3): x as it is."""

    def __call__(self, x: Tensor, table: Table) -> Tensor:
        return x

    def lay_out(self, cos: Tensor, sin: Tensor) -> Table:
        return ()


STILL = Still()
# By the names that entries of `backbones.py` use.
ROTATIONS: dict[str, Rope] = {"halves": RotateHalves(), "pairs": RotatePairs()}


def as_products(rope: Rope, table: Table) -> Table:
    """A table for `BY_PRODUCT`: what the rotation makes of every unit vector."""
    tokens, _, width = table[0].shape
    units = torch.eye(width, dtype=table[0].dtype, device=table[0].device)
    return (rope(units.expand(tokens, -1, -1), table),)


@region
def rotate_halves(x: Tensor, table: Table) -> Tensor:
    """x times cosines, and the other element of each pair times signed sines."""
    cos, sin = table
    return _sum(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@region
def rotate_pairs(x: Tensor, table: Table) -> Tensor:
    """As `rotate_halves`, for pairs of neighbours."""
    cos, sin = table
    others: Tensor = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return _sum(x * cos, others, sin)


def _sum(first: Tensor, others: Tensor, sin: Tensor) -> Tensor:
    """first + others * sin: by one kernel on a GPU; elsewhere rounded twice, to the last bit as
    transformers does it.
    """
    return torch.addcmul(first, others, sin) if first.is_cuda else first + others * sin


def rope_settings(config: Any) -> dict[str, Any]:
    """RoPE settings under one name: 5.x writes `rope_parameters`, 4.x `rope_theta`,
    `rope_scaling`.
    """
    settings = dict(getattr(config, "rope_parameters", None) or {})
    if not settings:
        scaling = getattr(config, "rope_scaling", None)  # HeliumConfig of 4.51.3 has none
        settings = {"rope_theta": config.rope_theta, **(scaling or {})}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    # Multimodal RoPE says how frequencies are shared out, not how they are computed.
    settings["rope_type"] = "default" if kind == "mrope" else kind
    return settings


def mrope_section(config: Any) -> list[int] | None:
    """How many of the D/2 frequencies turn with time, height and width; None: one axis."""
    section: list[int] | None = rope_settings(config).get("mrope_section")
    return section


@dataclass(frozen=True)
class Frequencies:
    """What a backbone's RoPE turns by.

    :param values: (D/2,) float32 radians a position.
    :param scale: of cosines and sines.
    :param axis: (D/2,) int64, the axis of multimodal RoPE that each frequency turns with; None:
        there is one.
    """

    values: Tensor
    scale: float
    axis: Tensor | None


def rope_frequencies(config: Any, device: torch.device) -> Frequencies:
    """Those of a backbone's configuration."""
    settings = rope_settings(config)
    if settings["rope_type"] == "default":
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
        values, scale = 1.0 / (settings["rope_theta"] ** exponent), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        values, scale = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, device)
    axis, section = None, settings.get("mrope_section")
    if section is not None:
        axis = on_device(np.repeat(np.arange(3), section), device)
    return Frequencies(values.float(), scale, axis)


def rope_table(
    rope: Rope, positions: Tensor, frequencies: Frequencies, dtype: torch.dtype
) -> Table:
    """Cosines and sines, computed in float32: two (tokens, 1, D) of `dtype`.

    :param positions: (tokens,), or (3, tokens) for the axes of multimodal RoPE (Qwen2.5-VL).
    """
    place = positions.float()[:, None]
    if positions.ndim == 2:  # (tokens, D/2): each frequency turns with its own axis
        place = positions.float()[frequencies.axis].T
    angles = place * frequencies.values
    cos, sin = rope.lay_out(angles.cos(), angles.sin())
    if frequencies.scale != 1:
        cos, sin = cos * frequencies.scale, sin * frequencies.scale
    return cos.to(dtype), sin.to(dtype)
