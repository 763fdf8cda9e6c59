"""Hugging Face decoder layers as weight containers, with our own forward and our own loop.

The class of each layer is swapped for a subclass with a child `fusion` and a forward over packed
tokens. Parameter names stay the backbone's, and without images the logits equal the plain
backbone's. The library's own forward is not used because its masks are dense in the packed length
and its signatures differ between releases.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .fusion import FusionMechanism, FusionPlan
from .streaming import FlatCache, StreamingState

Table = tuple[Tensor, Tensor]  # cosine and sine, each (tokens, 1, D)
Rope = Callable[[Tensor, Table], Tensor]  # rotates (tokens, heads, D)

STATIC_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass
class DecoderContext:
    """What every layer of one forward pass shares.

    :param stream_table: RoPE table of the stream tokens.
    :param query_table: RoPE table of text tokens in fusion layers, None without RoPE there.
    :param image_table: RoPE table of image tokens in fusion layers, None without RoPE there.
    :param backend: attention backend (`attention.BACKENDS`).
    :param cache: the KV cache while generating, None in training.
    :param state: the streaming state while generating, None in training.
    :param keep_index: rows of a fusion layer's key space to keep for the next chunk.
    """

    plan: FusionPlan
    stream_table: Table
    query_table: Table | None
    image_table: Table | None
    backend: str
    cache: FlatCache | None = None
    state: StreamingState | None = None
    keep_index: Tensor | None = None


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


# Backbones by model_type; the decoder layers of each have the children that `fused_forward` uses.
BACKBONES: dict[str, Rope] = {
    "llama": rotate_halves,
    "helium": rotate_pairs,
    "qwen2": rotate_halves,
}


def check_backbone(config: Any) -> None:
    """Refuses backbones whose layers this decoder does not reproduce.

    :raises ValueError: naming the model type or the setting.
    """
    if config.model_type not in BACKBONES:
        raise ValueError(
            f"backbone {config.model_type!r} is not supported; choose one of {sorted(BACKBONES)}"
        )
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"backbone {config.model_type!r} with use_sliding_window=true is not supported: "
            "self-attention here always sees the whole sample; set it to false"
        )
    rope_type = rope_settings(config).get("rope_type", "default")
    if rope_type not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"backbone {config.model_type!r} with RoPE type {rope_type!r} is not supported; "
            f"choose one of {list(STATIC_ROPE_TYPES)}"
        )


def rope_settings(config: Any) -> dict[str, Any]:
    """RoPE settings under one name: 5.x writes `rope_parameters`, 4.x `rope_theta`,
    `rope_scaling`.
    """
    settings = dict(getattr(config, "rope_parameters", None) or {})
    if not settings:
        settings = {"rope_theta": config.rope_theta, **(config.rope_scaling or {})}
    settings.setdefault("rope_type", settings.get("type", "default"))
    return settings


def rope_table(config: Any, positions: Tensor, dtype: torch.dtype) -> Table:
    """Cosines and sines for positions (tokens,), computed in float32: two (tokens, 1, D) of
    `dtype`.

    Computed on the fly: a buffer would be cast to bfloat16 with the model and lose long positions.
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
    angles = positions.float()[:, None] * frequencies.float()
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)


def project_heads(projection: nn.Module, x: Tensor, head_dim: int) -> Tensor:
    """(tokens, C) -> (tokens, heads, D)."""
    projected: Tensor = projection(x)
    heads: Tensor = projected.unflatten(-1, (-1, head_dim))
    return heads


def fused_forward(
    self: Any, h: Tensor, images: Tensor, rope: Rope, context: DecoderContext
) -> Tensor:
    """One decoder block over packed tokens: h + SA(norm(h)) + fusion(norm(h), images), then the
    FFN.

    :param h: (S, C) stream tokens.
    :param images: (N, C) image tokens.
    :return: (S, C).
    """
    attention, plan = self.self_attn, context.plan
    x = self.input_layernorm(h)
    q, k, v = (
        project_heads(projection, x, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = rope(q, context.stream_table), rope(k, context.stream_table)
    if context.cache is not None:
        k, v = context.cache.update(k, v, attention.layer_idx)
    read = varlen_attention(q, k, v, plan.self_attention, context.backend)
    h = h + attention.o_proj(read.flatten(1))
    if self.fusion is not None:
        h = h + self.fusion(x, images, rope, context)
    out: Tensor = h + self.mlp(self.post_attention_layernorm(h))
    return out


@functools.cache
def fused_class(base: Any) -> Any:
    """The subclass of a Hugging Face decoder layer that runs `fused_forward`."""
    return type("Fused" + base.__name__, (base,), {"forward": fused_forward})


def fuse_layers(backbone: Any, mechanism: FusionMechanism) -> None:
    """Swaps the class of every decoder layer of `backbone` and adds the mechanism's children."""
    for index, layer in enumerate(backbone.layers):
        layer.__class__ = fused_class(layer.__class__)
        layer.fusion = mechanism.make_layer(layer, index)
    # RoPE tables are computed here; the library's module would only carry a buffer along.
    del backbone.rotary_emb


def run_decoder(backbone: Any, text: Tensor, images: Tensor, context: DecoderContext) -> Tensor:
    """Runs the fused layers and the final norm.

    :param text: (T, C) text embeddings.
    :param images: (N, C) image tokens.
    :return: (T, C) hidden states of the text tokens.
    """
    rope = BACKBONES[backbone.config.model_type]
    plan = context.plan
    h = text
    if plan.stream_index is not None:
        h = torch.cat([text, images]).index_select(0, plan.stream_index)
    for layer in backbone.layers:
        h = layer(h, images, rope, context)
    if plan.text_index is not None:
        h = h.index_select(0, plan.text_index)
    out: Tensor = backbone.norm(h)
    return out
