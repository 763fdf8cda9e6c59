"""An independent float64 model of casa.md sections 2, 3 and 5, one sample at a time.

Written from the equations and for reading: no packing, no cache, no kernels, and nothing imported
from the project or from transformers. Which query sees which key is decided pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a Llama-like decoder and its fusion mechanism.

    :param mechanism: casa, cross_attention or insertion.
    :param image_positions: frozen, advance or none; only casa reads it.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    mechanism: str
    image_positions: str = "frozen"


@dataclass(frozen=True)
class Token:
    """One token of a sample and where it stands.

    :param kind: text or image.
    :param row: its index among the text tokens, or among the image tokens, of the sample.
    :param window: the insertion point that opened its window; None for text before any image.
    :param text_before: text tokens before it; for an image this is K.
    :param place: text and image tokens before it, when images stand in the stream.
    """

    kind: str
    row: int
    window: int | None
    text_before: int
    place: int


@dataclass
class Reference:
    """What the reference computes for one sample.

    :param logits: (T, vocabulary) float64.
    :param fusion: for every layer the (T, C) output of its fusion child; empty for insertion.
    """

    logits: Tensor
    fusion: list[Tensor] = field(default_factory=list)


def sample_tokens(text: int, points: Sequence[int], image_tokens: Sequence[int]) -> list[Token]:
    """The tokens of a sample in the order in which a reader meets them."""
    tokens: list[Token] = []
    image_row = 0
    for t in range(text + 1):
        for point, count in zip(points, image_tokens, strict=True):
            if point == t:
                for _ in range(count):
                    # Images at one point have no text between them: they share the window.
                    tokens.append(Token("image", image_row, point, t, len(tokens)))
                    image_row += 1
        if t < text:
            opened = [point for point in points if point <= t]
            window = max(opened) if opened else None
            tokens.append(Token("text", t, window, t, len(tokens)))
    return tokens


def sees_text(query: Token, key: Token) -> bool:
    """Self-attention of a text-only stream: SA(x_T) = MHA(x_T | x_1..x_T)."""
    return query.kind == key.kind == "text" and key.row <= query.row


def sees_inserted(query: Token, key: Token) -> bool:
    """Self-attention of a stream that holds the images: SA_ins(x_T)."""
    return key.place <= query.place


def sees_casa(query: Token, key: Token) -> bool:
    """CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T)."""
    if query.window is None or key.window != query.window:
        return False
    return key.kind == "image" or key.row <= query.row


def sees_cross_attention(query: Token, key: Token) -> bool:
    """CA(x_T) = 1[T>K] * MHA(x_T | y_1..y_N)."""
    return query.window is not None and key.kind == "image" and key.window == query.window


def fusion_position(token: Token, settings: Settings) -> int | None:
    """RoPE position of a token in a fusion layer; None: it is not rotated."""
    if settings.mechanism == "cross_attention":
        return None
    if settings.image_positions == "advance":
        return token.place
    if token.kind == "image":
        return None if settings.image_positions == "none" else token.text_before
    return token.text_before


def reference(
    state: State,
    settings: Settings,
    ids: Sequence[int],
    points: Sequence[int],
    images: Sequence[Tensor],
) -> Reference:
    """Runs one sample.

    :param state: parameters by the names of `CasaForConditionalGeneration`.
    :param ids: T token ids.
    :param points: for each image the number of text tokens before it.
    :param images: for each image the (N, C) tokens of the vision tower.
    """
    state = {name: value.detach().double() for name, value in state.items()}
    tokens = sample_tokens(len(ids), points, [len(image) for image in images])
    text_tokens = [token for token in tokens if token.kind == "text"]
    image_tokens = [token for token in tokens if token.kind == "image"]
    text = state["model.embed_tokens.weight"][torch.tensor(list(ids))]
    width = text.shape[1]
    y = text.new_zeros(0, width)
    if images:
        y = torch.cat([image.detach().double() for image in images])
        if "adapter.weight" in state:
            y = linear(state, "adapter", y)

    if settings.mechanism == "insertion":
        h = torch.stack([y[t.row] if t.kind == "image" else text[t.row] for t in tokens])
        for n in range(settings.layers):
            layer = f"model.layers.{n}."
            x = rms_norm(h, state[layer + "input_layernorm.weight"], settings)
            places = [token.place for token in tokens]
            h = h + attention(
                state,
                layer + "self_attn.",
                settings,
                x,
                x,
                pairs(tokens, tokens, sees_inserted),
                places,
                places,
            )
            h = h + feed_forward(state, layer, settings, h)
        h = torch.stack([h[token.place] for token in text_tokens])
        return Reference(logits(state, settings, h))

    sees = {"casa": sees_casa, "cross_attention": sees_cross_attention}[settings.mechanism]
    keys = text_tokens + image_tokens
    self_mask, cross_mask = (
        pairs(text_tokens, text_tokens, sees_text),
        pairs(text_tokens, keys, sees),
    )
    text_positions = [token.row for token in text_tokens]
    query_positions = [fusion_position(token, settings) for token in text_tokens]
    key_positions = [fusion_position(token, settings) for token in keys]
    h = text
    fusion = []
    for n in range(settings.layers):
        layer = f"model.layers.{n}."
        x = rms_norm(h, state[layer + "input_layernorm.weight"], settings)
        # Images enter every layer as the tower gave them, under the layer's own norm.
        normed_images = rms_norm(y, state[layer + "fusion.norm.weight"], settings)
        read = attention(
            state, layer + "self_attn.", settings, x, x, self_mask, text_positions, text_positions
        )
        fused = attention(
            state,
            layer + "fusion.",
            settings,
            x,
            torch.cat([x, normed_images]),
            cross_mask,
            query_positions,
            key_positions,
        )
        h = h + read + fused
        h = h + feed_forward(state, layer, settings, h)
        fusion.append(fused)
    return Reference(logits(state, settings, h), fusion)


def pairs(
    queries: Sequence[Token], keys: Sequence[Token], sees: Callable[[Token, Token], bool]
) -> list[list[bool]]:
    """The dense mask, decided for every pair on its own."""
    return [[sees(query, key) for key in keys] for query in queries]


def attention(
    state: State,
    prefix: str,
    settings: Settings,
    x: Tensor,
    context: Tensor,
    mask: Sequence[Sequence[bool]],
    query_positions: Sequence[int | None],
    key_positions: Sequence[int | None],
) -> Tensor:
    """Multi-head attention of x (n, C) over context (m, C); a query without keys gives zeros."""
    q = heads(linear(state, prefix + "q_proj", x), query_positions, settings)
    k = heads(linear(state, prefix + "k_proj", context), key_positions, settings)
    v = linear(state, prefix + "v_proj", context).unflatten(-1, (-1, settings.head_dim))
    out = torch.zeros_like(x)
    for i, row in enumerate(mask):
        seen = [j for j, visible in enumerate(row) if visible]
        if not seen:
            continue
        read = []
        for head in range(settings.heads):
            shared = head // (settings.heads // settings.kv_heads)
            scores = k[seen, shared] @ q[i, head] / settings.head_dim**0.5
            read.append(torch.softmax(scores, dim=0) @ v[seen, shared])
        out[i] = linear(state, prefix + "o_proj", torch.cat(read))
    return out


def heads(x: Tensor, positions: Sequence[int | None], settings: Settings) -> Tensor:
    """(n, heads * D) -> (n, heads, D), each token rotated by its position."""
    split = x.unflatten(-1, (-1, settings.head_dim))
    rotated = [
        token if position is None else rotate(token, position, settings.rope_theta)
        for token, position in zip(split, positions, strict=True)
    ]
    return torch.stack(rotated) if rotated else split


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """RoPE over (heads, D): element i turns with element i + D/2 by position * theta^(-2i/D)."""
    width = x.shape[-1]
    # Llama-like backbones are trained with angles in float32; rounding them is part of the model.
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    angles = torch.tensor(float(position), dtype=torch.float32) * (1.0 / theta**exponents)
    cos, sin = angles.cos().double(), angles.sin().double()
    first, second = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return weight * x / torch.sqrt((x**2).mean(-1, keepdim=True) + settings.norm_eps)


def feed_forward(state: State, layer: str, settings: Settings, h: Tensor) -> Tensor:
    """The gated FFN under its norm: down(silu(gate(x)) * up(x))."""
    x = rms_norm(h, state[layer + "post_attention_layernorm.weight"], settings)
    gate, up = linear(state, layer + "mlp.gate_proj", x), linear(state, layer + "mlp.up_proj", x)
    return linear(state, layer + "mlp.down_proj", gate * torch.sigmoid(gate) * up)


def logits(state: State, settings: Settings, h: Tensor) -> Tensor:
    """(T, C) -> (T, vocabulary)."""
    return rms_norm(h, state["model.norm.weight"], settings) @ state["lm_head.weight"].T


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x W^T + b, where the state holds a bias."""
    out = x @ state[name + ".weight"].T
    return out + state[name + ".bias"] if name + ".bias" in state else out
