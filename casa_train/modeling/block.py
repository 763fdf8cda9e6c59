"""The pieces of a decoder block over packed tokens, and what all blocks of a forward pass share.

A fusion mechanism composes its blocks from these pieces (`FusionMechanism.run_layer`). Weights are
those of a Hugging Face decoder layer: `self_attn.{q,k,v,o}_proj`, `self_attn.{q,k}_norm` where it
norms its heads (Qwen3), `mlp` and its two norms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .image_attention import ImageAttention
from .lean import linear
from .regions import Compiler, add_normed, normed
from .rope import STILL, Table
from .segments import Segments
from .streaming import FlatCache, StreamingState
from .windows import Range


@dataclass
class FusionPlan:
    """Index layouts of one forward pass; every tensor lies on the model's device.

    :param stream_positions: (S,) RoPE positions of the stream tokens, the decoder's hidden states;
        (3, S) for multimodal RoPE where they differ by axis.
    :param stream_lengths: stream tokens of each sample.
    :param self_attention: self-attention of the stream, block-diagonal over samples.
    :param stream_index: (S,) the stream as rows of [text tokens; image tokens]; None: text only.
    :param text_index: (T,) the text tokens as rows of the stream; None: all of it.
    :param cross: text queries over a key space [kept keys; text keys; image keys]; without text
        keys that part is empty.
    :param image_cross: image queries over the same key space; None: images do not attend.
    :param query_positions: (T,) or (3, T) positions of text in `cross`; None: no RoPE.
    :param image_positions: (N,) or (3, N) positions of images in `cross`; None: no RoPE.
    :param keep: rows of the key space of `cross` that the next chunk needs, per sample.
    """

    stream_positions: Tensor
    stream_lengths: list[int]
    self_attention: Segments
    stream_index: Tensor | None = None
    text_index: Tensor | None = None
    cross: Segments | None = None
    image_cross: Segments | None = None
    query_positions: Tensor | None = None
    image_positions: Tensor | None = None
    keep: list[list[Range]] = field(default_factory=list)


@dataclass
class DecoderContext:
    """What every layer of one forward pass shares.

    :param mechanism: the fusion mechanism; its `run_layer` is the forward of every layer.
    :param rope: the backbone's rotation.
    :param stream_table: RoPE table of the stream tokens.
    :param query_table: RoPE table of text tokens in fusion layers, None without RoPE there.
    :param image_table: RoPE table of image tokens in fusion layers, None without RoPE there.
    :param backend: attention backend (`attention.BACKENDS`).
    :param cache: the KV cache while generating, None in training.
    :param state: the streaming state while generating, None in training.
    :param keep_index: rows of a fusion layer's key space to keep for the next chunk.
    :param image_attention: listens to what text reads from images; None in training and generation.
    :param step: in place of cache and state where every row takes one token (`decoding.py`).
    :param compiler: what compiles the layers' regions; None: they run eagerly.
    :param image_heads: by layer index, image keys and values that were made for all layers at once.
    :param elsewhere: copies of this context on other devices.
    :param still: the copy of this context for layers without RoPE.
    """

    mechanism: Any
    plan: FusionPlan
    rope: Callable[[Tensor, Table], Tensor]
    stream_table: Table
    query_table: Table | None
    image_table: Table | None
    backend: str
    cache: FlatCache | None = None
    state: StreamingState | None = None
    keep_index: Tensor | None = None
    image_attention: ImageAttention | None = None
    step: Any = None
    compiler: Compiler | None = None
    image_heads: dict[int, Heads] = field(default_factory=dict)
    elsewhere: dict[torch.device, DecoderContext] = field(default_factory=dict)
    still: DecoderContext | None = None

    def on(self, device: torch.device) -> DecoderContext:
        """This context for layers that live on `device`: with a `device_map` there are several."""
        if device == self.stream_table[0].device:
            return self
        if device not in self.elsewhere:
            plan = replace(self.plan, **_moved(self.plan, device))
            moved = {**_moved(self, device), "plan": plan, "still": None}
            self.elsewhere[device] = replace(self, **moved)
        return self.elsewhere[device]

    def without_rope(self) -> DecoderContext:
        """This context for layers whose queries and keys are not turned."""
        if self.still is None:
            self.still = replace(self, rope=STILL)
        return self.still


def _moved(holder: Any, device: torch.device) -> dict[str, Any]:
    """The fields of a dataclass that hold tensors, on another device."""
    moved: dict[str, Any] = {}
    for name in (f.name for f in fields(holder)):
        value = getattr(holder, name)
        if isinstance(value, Tensor | Segments):
            moved[name] = value.to(device)
        elif isinstance(value, tuple):  # a RoPE table
            moved[name] = tuple(part.to(device) for part in value)
    return moved


class Heads(NamedTuple):
    """Before RoPE and behind norms of heads: q (tokens, H, D), k and v (tokens, Hkv, D); None: not
    needed.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


def project(owner: Any, x: Tensor, head_dim: int, queries: bool = True, keys: bool = True) -> Heads:
    """(tokens, C) -> heads, through `owner`'s q_proj, k_proj and v_proj, and its norms of heads."""
    return Heads(
        norm_heads(owner, "q_norm", linear(owner.q_proj, x), head_dim) if queries else None,
        norm_heads(owner, "k_norm", linear(owner.k_proj, x), head_dim) if keys else None,
        split_heads(linear(owner.v_proj, x), head_dim) if keys else None,
    )


def norm_heads(owner: Any, name: str, x: Tensor, head_dim: int) -> Tensor:
    """(tokens, heads * D) -> (tokens, heads, D), each head through `owner`'s norm of that name, if
    it has one (Qwen3: before RoPE).
    """
    heads, norm = split_heads(x, head_dim), owner._modules.get(name)
    return heads if norm is None else normed(norm, heads)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """(tokens, heads * D) -> (tokens, heads, D)."""
    return x.view(x.shape[0], x.shape[1] // head_dim, head_dim)


def self_attention(layer: Any, heads: Heads, context: DecoderContext) -> Tensor:
    """(S, H * D): what every stream token reads in its own sample, before the output projection."""
    assert heads.q is not None and heads.k is not None and heads.v is not None
    table = context.stream_table
    q, k, v = context.rope(heads.q, table), context.rope(heads.k, table), heads.v
    plan, listener = context.plan, context.image_attention
    if listener is not None and plan.stream_index is not None and plan.text_index is not None:
        of_images = plan.stream_index >= len(plan.text_index)
        index = layer.self_attn.layer_idx
        listener.attention(index, q, k, plan.self_attention, of_images, plan.text_index)
    if context.step is not None:
        read: Tensor = context.step.self_attention(layer.self_attn.layer_idx, q, k, v)
        return read
    if context.cache is not None:
        k, v = context.cache.update(k, v, layer.self_attn.layer_idx)
    return varlen_attention(q, k, v, plan.self_attention, context.backend).flatten(1)


def attend(layer: Any, h: Tensor, context: DecoderContext) -> Tensor:
    """h + SA(norm(h)): (S, C)."""
    attention = layer.self_attn
    heads = project(attention, normed(layer.input_layernorm, h), attention.head_dim)
    return h + linear(attention.o_proj, self_attention(layer, heads, context))


def feed_forward(layer: Any, h: Tensor, *added: Tensor) -> Tensor:
    """h + FFN(norm(h)): (tokens, C).

    :param added: to h before, such as what was read: (tokens, C) each.
    """
    h, x = add_normed(layer.post_attention_layernorm, h, *added)
    out: Tensor = h + layer.mlp(x)
    return out


def plain_block(layer: Any, h: Tensor, context: DecoderContext) -> Tensor:
    """The backbone's own block: (S, C)."""
    attention = layer.self_attn
    heads = project(attention, normed(layer.input_layernorm, h), attention.head_dim)
    return feed_forward(layer, h, linear(attention.o_proj, self_attention(layer, heads, context)))


def scatter(read: Tensor, segments: Segments, rows: int) -> Tensor:
    """(Q, H, D) in segment order -> (rows, H * D); rows that are no query are zero."""
    flat = read.flatten(1)
    if segments.covers(rows):
        return flat
    return flat.new_zeros(rows, flat.shape[1]).index_copy(0, segments.query_index, flat)


def project_out(o_proj: nn.Module, read: Tensor, segments: Segments) -> Tensor:
    """(T, H * D) -> (T, C), exactly zero in rows that `segments` does not name, bias or not."""
    out = linear(o_proj, read)
    if getattr(o_proj, "bias", None) is None or segments.covers(len(read)):
        return out
    return out * query_mask(segments, len(read), out.dtype)


def query_mask(segments: Segments, rows: int, dtype: torch.dtype) -> Tensor:
    """(rows, 1): one in rows that are a query of `segments`, zero elsewhere."""
    mask = torch.zeros(rows, 1, dtype=dtype, device=segments.device)
    return mask.index_fill(0, segments.query_index, 1.0)
