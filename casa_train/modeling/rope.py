"""Rotary position embeddings, computed on the fly from a backbone's configuration.

A buffer would be cast to bfloat16 with the model and lose long positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .segments import on_device

Table = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, 1, D)
Rope = Callable[[Tensor, Table], Tensor]  # rotates (tokens, heads, D)

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rotate_halves(x: Tensor, table: Table) -> Tensor:
    """RoPE that pairs element i with i + D/2 (Llama, Qwen2)."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotate_pairs(x: Tensor, table: Table) -> Tensor:
    """RoPE that pairs element 2i with 2i + 1 (Helium); the table is laid out for halves."""
    half = x.shape[-1] // 2
    cos, sin = (t[..., :half].repeat_interleave(2, dim=-1) for t in table)
    turned = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    return x * cos + turned * sin


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


def rope_table(config: Any, positions: Tensor, dtype: torch.dtype) -> Table:
    """Cosines and sines, computed in float32: two (tokens, 1, D) of `dtype`.

    :param positions: (tokens,), or (3, tokens) for the axes of multimodal RoPE (Qwen2.5-VL).
    """
    settings = rope_settings(config)
    if settings["rope_type"] == "default":
        width = getattr(config, "head_dim", None)
        width = width or config.hidden_size // config.num_attention_heads
        exponent = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
        frequencies, scale = 1.0 / (settings["rope_theta"] ** exponent), 1.0
    else:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, positions.device)
    place = positions.float()[:, None]
    if positions.ndim == 2:
        axis = on_device(np.repeat(np.arange(3), settings["mrope_section"]), positions.device)
        place = positions.float()[axis].T  # (tokens, D/2): each frequency turns with its own axis
    angles = place * frequencies.float()
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)
