"""An independent float64 model of every fusion mechanism, one sample at a time.

Written from the equations of CASA (arXiv 2512.19535) and for reading: no packing, no cache, no
kernels, and nothing imported from the project or from transformers. Which query sees which key is
decided pair by pair. It is differentiable: where the parameters or the images require gradients, so
does what it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Position = tuple[int, int, int]  # time, height, width; all equal where there is one axis only
NOT_ROTATED: Position = (0, 0, 0)  # an angle of zero turns nothing


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a Llama-like decoder and its fusion mechanism.

    :param mrope_section: how many of the D/2 RoPE frequencies turn by time, height and width
        (Qwen2.5-VL); None: one-dimensional RoPE.
    :param paired: RoPE turns element 2i with 2i + 1 (Helium), not i with i + D/2.
    :param llama3: how Llama 3.1 stretches its RoPE to long texts: factor, low_freq_factor,
        high_freq_factor, original_max_position_embeddings; None: as it is.
    :param still_blocks: those in which nothing is rotated, neither in self-attention nor in what
        reads images (SmolLM3).
    :param mechanism: casa, cross_attention, insertion, qformer_insertion, gated_cross_attention or
        hyper_attention. The fields after it are the options of the first two; `every` is also one
        of gated_cross_attention.
    :param queries: with the next two: what qformer_insertion's resampler is made of.
    :param hyper_layers: the blocks that hyper_attention fuses.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    mechanism: str
    mrope_section: tuple[int, ...] | None = None
    paired: bool = False
    llama3: tuple[float, float, float, float] | None = None
    still_blocks: tuple[int, ...] = ()
    share_parameters: bool = False
    text_in_window: bool = True
    placement: str = "parallel"
    every: int = 1
    update_image_tokens: str = "none"
    history: str = "window"
    window_scope: str = "frame"
    image_positions: str = "frozen"
    queries: int = 0
    resampler_layers: int = 0
    resampler_heads: int = 1
    hyper_layers: tuple[int, ...] = ()

    def fuses(self, block: int) -> bool:
        """Whether a block of the decoder reads images."""
        if self.mechanism == "hyper_attention":
            return block in self.hyper_layers
        return block % self.every == self.every - 1


@dataclass(frozen=True)
class Token:
    """One token of a sample and where it stands.

    :param kind: text or image.
    :param row: its index among the text tokens, or among the image tokens, of the sample.
    :param window: the insertion point that opened its window; None for text before any image.
    :param text_before: text tokens before it; for an image this is K.
    :param place: text and image tokens before it, when images stand in the stream.
    :param scope: the insertion point that opened the frames it belongs to: its window's own, or
        that of the first window of a video.
    :param cell: line and column of an image token in its image's grid.
    :param qwen: where it stands by Qwen2.5-VL's rule, and an image token's image begins: an image
        moves what follows it on by the longer side of its grid.
    """

    kind: str
    row: int
    window: int | None
    text_before: int
    place: int
    scope: int | None = None
    cell: tuple[int, int] = (0, 0)
    qwen: int = 0


@dataclass
class Reference:
    """What the reference computes for one sample.

    :param logits: (T, vocabulary) float64.
    :param fusion: for every fused block, the (T, C) that it adds to the text beside its
        self-attention and its feed-forward network; empty for the insertions.
    :param reads: for every block that reads images, how much of what each text token reads there
        comes from them, (T,): the share of attention, mean over heads, NaN where it reads nothing;
        for hyper_attention the gate; empty where it is nothing but images.
    """

    logits: Tensor
    fusion: list[Tensor] = field(default_factory=list)
    reads: list[Tensor] = field(default_factory=list)


# Where tokens stand, and who sees whom


def sample_tokens(
    text: int,
    points: Sequence[int],
    image_tokens: Sequence[int],
    lines: Sequence[int] = (),
    follows: Sequence[bool] = (),
) -> list[Token]:
    """The tokens of a sample in the order in which a reader meets them.

    :param points: for each image the number of text tokens before it.
    :param image_tokens: for each image its number of tokens.
    :param lines: for each image the lines of its grid; all of one line if left out.
    :param follows: for each image, whether it is a frame of the same video as the image before it;
        all alone if left out.
    """
    lines = lines or [1] * len(points)
    follows = follows or [False] * len(points)
    tokens: list[Token] = []
    image_row = qwen = 0
    window = scope = None
    for t in range(text + 1):
        for point, count, high, frame in zip(points, image_tokens, lines, follows, strict=True):
            if point != t:
                continue
            # Images at one point have no text between them: they share the window.
            if window != point:
                scope = scope if frame and scope is not None else point
                window = point
            wide = count // high
            for i in range(count):
                cell = (i // wide, i % wide)
                tokens.append(Token("image", image_row, window, t, len(tokens), scope, cell, qwen))
                image_row += 1
            qwen += max(high, wide)
        if t < text:
            tokens.append(Token("text", t, window, t, len(tokens), scope, qwen=qwen))
            qwen += 1
    return tokens


def sees_text(query: Token, key: Token) -> bool:
    """Self-attention of a text-only stream: SA(x_T) = MHA(x_T | x_1..x_T)."""
    return query.kind == key.kind == "text" and key.row <= query.row


def sees_inserted(query: Token, key: Token) -> bool:
    """Self-attention of a stream that holds the images: SA_ins(x_T)."""
    return key.place <= query.place


def sees_image_of_window(query: Token, key: Token) -> bool:
    """CA(x_T) = 1[T>K] * MHA(x_T | y_1..y_N)."""
    return query.window is not None and key.kind == "image" and key.window == query.window


def sees_earlier_image(query: Token, key: Token) -> bool:
    """Every image of the sample that stands before the token."""
    return key.kind == "image" and key.place < query.place


def sees_fusion(query: Token, key: Token, settings: Settings) -> bool:
    """What a token reads in a block of casa or cross_attention.

    CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T) of its window, unless switches say otherwise.
    """
    if key.place > query.place:
        return False
    if key.kind == "text" and not settings.text_in_window:
        return False
    if settings.history == "all":
        leading = query.kind == "text" and query.window is None
        # Blocks that only read images in place of self-attention still let leading text read text.
        return not leading or settings.placement == "replace"
    if settings.window_scope == "all_frames":
        return query.scope is not None and key.scope == query.scope
    return query.window is not None and key.window == query.window


def pairs(
    queries: Sequence[Token], keys: Sequence[Token], sees: Callable[[Token, Token], bool]
) -> list[list[bool]]:
    """The dense mask, decided for every pair on its own."""
    return [[sees(query, key) for key in keys] for query in queries]


# Positions


def text_position(token: Token) -> Position:
    """Where a text token stands among the text tokens alone."""
    return (token.row, token.row, token.row)


def interleaved_position(token: Token, settings: Settings) -> Position:
    """Where a token stands in a stream that holds the images."""
    if settings.mrope_section is None:
        return (token.place, token.place, token.place)
    line, column = token.cell
    return (token.qwen, token.qwen + line, token.qwen + column)


def frozen_position(token: Token, settings: Settings) -> Position:
    """Where a token stands if images take no positions from the text: at K, the text before it."""
    k = token.text_before
    if settings.mrope_section is None:
        return (k, k, k)
    line, column = token.cell
    return (k, k + line, k + column)


def fusion_position(token: Token, settings: Settings) -> Position:
    """RoPE position of a token as query or key of casa or cross_attention."""
    if not settings.text_in_window:
        return NOT_ROTATED
    if settings.image_positions == "advance":
        return interleaved_position(token, settings)
    if settings.image_positions == "none" and token.kind == "image":
        return NOT_ROTATED
    return frozen_position(token, settings)


# The mechanisms


def reference(
    state: State,
    settings: Settings,
    ids: Sequence[int],
    points: Sequence[int],
    images: Sequence[Tensor],
    lines: Sequence[int] = (),
    follows: Sequence[bool] = (),
) -> Reference:
    """Runs one sample.

    :param state: parameters by the names of `CasaForConditionalGeneration`.
    :param ids: T token ids.
    :param images: for each image the (N, C) tokens of the vision tower.

    The others are those of `sample_tokens`.
    """
    state = {name: value.double() for name, value in state.items()}
    text = state["model.embed_tokens.weight"][torch.tensor(list(ids))]
    images = [image.double() for image in images]
    if "adapter.weight" in state:
        images = [linear(state, "adapter", image) for image in images]
    if settings.mechanism == "qformer_insertion":
        images = [resample(state, settings, image) for image in images]
        lines = [1] * len(images)
    counts = [len(image) for image in images]
    tokens = sample_tokens(len(ids), points, counts, lines, follows)
    y = torch.cat([text.new_zeros(0, text.shape[1]), *images])
    run = {
        "casa": run_casa,
        "cross_attention": run_casa,
        "insertion": run_insertion,
        "qformer_insertion": run_insertion,
        "gated_cross_attention": run_gated_cross_attention,
        "hyper_attention": run_hyper_attention,
    }[settings.mechanism]
    h, fusion, reads = run(state, settings, tokens, text, y)
    logits = rms_norm(state, "model.norm", settings, h) @ state["lm_head.weight"].T
    return Reference(logits, fusion, reads)


def run_insertion(
    state: State, settings: Settings, tokens: Sequence[Token], text: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Image tokens join the stream; what the text tokens (T, C) are after the last block."""
    h = torch.stack([y[t.row] if t.kind == "image" else text[t.row] for t in tokens])
    positions = [interleaved_position(token, settings) for token in tokens]
    mask = pairs(tokens, tokens, sees_inserted)
    texts = [token.place for token in tokens if token.kind == "text"]
    reads = []
    for n in range(settings.layers):
        layer = f"model.layers.{n}."
        x = rms_norm(state, layer + "input_layernorm", settings, h)
        q = project(state, layer + "self_attn.q_proj", settings, x, positions)
        k = project(state, layer + "self_attn.k_proj", settings, x, positions)
        reads.append(image_share(q, k, mask, tokens)[texts])
        h = h + self_attention(state, layer, settings, h, mask, positions)
        h = h + feed_forward(state, layer, settings, h)
    return h[texts], [], reads


def run_casa(
    state: State, settings: Settings, tokens: Sequence[Token], text: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """CASA and plain cross-attention with the switches D1 to D5."""
    texts = [token for token in tokens if token.kind == "text"]
    images = [token for token in tokens if token.kind == "image"]
    self_mask = pairs(texts, texts, sees_text)
    text_positions = [text_position(token) for token in texts]
    updated = settings.update_image_tokens != "none"
    attending = settings.update_image_tokens == "ffn_and_attention"

    keys = texts + images
    readers = keys if attending else texts
    mask = pairs(readers, keys, lambda query, key: sees_fusion(query, key, settings))
    positions = [fusion_position(token, settings) for token in keys]

    h, z = text, y
    fusion = []
    shares = []
    for n in range(settings.layers):
        layer = f"model.layers.{n}."

        def attend_to_text(h: Tensor, layer: str = layer) -> Tensor:
            return self_attention(state, layer, settings, h, self_mask, text_positions)

        if not settings.fuses(n):
            h = h + attend_to_text(h)
            h = h + feed_forward(state, layer, settings, h)
            continue

        shared = settings.share_parameters
        own = layer + ("self_attn." if shared else "fusion.")
        image_norm = layer + ("input_layernorm" if shared else "fusion.norm")
        text_norm = layer + "input_layernorm"
        if settings.placement in ("before", "after") and not shared:
            text_norm = layer + "fusion.text_norm"

        before = h
        if settings.placement == "after":
            h = h + attend_to_text(h)
        # Text and image tokens in one list, texts first: queries, keys and values alike.
        x = torch.cat(
            [rms_norm(state, text_norm, settings, h), rms_norm(state, image_norm, settings, z)]
        )
        q = project(state, own + "q_proj", settings, x, positions)
        k = project(state, own + "k_proj", settings, x, positions)
        v = project(state, own + "v_proj", settings, x)
        if settings.text_in_window:
            shares.append(image_share(q[: len(texts)], k, mask, keys))
        read = attend(q[: len(readers)], k, v, mask)
        out = project_out(state, own + "o_proj", read, mask)
        fused = out[: len(texts)]
        if settings.placement == "parallel" and shared:
            # One output projection of the sum of both reads: a bias of it counts once.
            fused = read[: len(texts)] @ state[own + "o_proj.weight"].T
        h = h + fused
        if settings.placement == "parallel":
            h = h + attend_to_text(before)
        if settings.placement == "before":
            h = h + attend_to_text(h)
        h = h + feed_forward(state, layer, settings, h)

        # Everything above read the image tokens as they were before this block.
        if attending:
            z = z + out[len(texts) :]
        if updated:
            z = z + feed_forward(state, layer, settings, z)
        fusion.append(fused)
    return h, fusion, shares


def run_gated_cross_attention(
    state: State, settings: Settings, tokens: Sequence[Token], text: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Flamingo: new cross-attention and feed-forward layers before blocks, behind tanh gates."""
    texts = [token for token in tokens if token.kind == "text"]
    images = [token for token in tokens if token.kind == "image"]
    self_mask = pairs(texts, texts, sees_text)
    text_positions = [text_position(token) for token in texts]
    mask = pairs(texts, images, sees_image_of_window)
    after_image = torch.tensor([[float(token.window is not None)] for token in texts]).double()
    h = text
    fusion = []
    for n in range(settings.layers):
        layer = f"model.layers.{n}."
        if settings.fuses(n):
            new = layer + "fusion."
            x = rms_norm(state, new + "norm", settings, h)
            normed = rms_norm(state, new + "image_norm", settings, y)
            q = project(state, new + "q_proj", settings, x)
            k = project(state, new + "k_proj", settings, normed)
            v = project(state, new + "v_proj", settings, normed)
            read = project_out(state, new + "o_proj", attend(q, k, v, mask), mask)
            with_images = h + torch.tanh(state[new + "attention_gate"]) * read
            x = rms_norm(state, new + "ffn_norm", settings, with_images)
            passed = after_image * gated_mlp(state, new + "mlp.", x)
            passed = with_images + torch.tanh(state[new + "ffn_gate"]) * passed
            fusion.append(passed - h)
            h = passed
        h = h + self_attention(state, layer, settings, h, self_mask, text_positions)
        h = h + feed_forward(state, layer, settings, h)
    return h, fusion, []


def run_hyper_attention(
    state: State, settings: Settings, tokens: Sequence[Token], text: Tensor, y: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """mPLUG-Owl3: a gate on each text token mixes what it reads in images and in text."""
    texts = [token for token in tokens if token.kind == "text"]
    images = [token for token in tokens if token.kind == "image"]
    self_mask = pairs(texts, texts, sees_text)
    text_positions = [text_position(token) for token in texts]
    mask = pairs(texts, images, sees_earlier_image)
    image_positions = [frozen_position(token, settings) for token in images]
    after_image = torch.tensor([[float(token.window is not None)] for token in texts]).double()
    h = text
    fusion = []
    gates = []
    for n in range(settings.layers):
        layer = f"model.layers.{n}."
        attended = self_attention(state, layer, settings, h, self_mask, text_positions)
        if settings.fuses(n):
            own, shared = layer + "fusion.", layer + "self_attn."
            x = rms_norm(state, layer + "input_layernorm", settings, h)
            normed = rms_norm(state, layer + "input_layernorm", settings, y)
            q = project(state, shared + "q_proj", settings, x, text_positions)
            k = project(state, shared + "k_proj", settings, x, text_positions)
            v = project(state, shared + "v_proj", settings, x)
            read_text = attend(q, k, v, self_mask)
            k = project(state, own + "k_proj", settings, normed, image_positions)
            v = project(state, own + "v_proj", settings, normed)
            read_images = attend(q, k, v, mask)
            gate = after_image * torch.sigmoid(linear(state, own + "gate", x))
            gates.append(gate[:, 0])
            mixed = (1 - gate) * read_text + gate * read_images
            fusion.append(linear(state, shared + "o_proj", mixed) - attended)
            attended = linear(state, shared + "o_proj", mixed)
        h = h + attended
        h = h + feed_forward(state, layer, settings, h)
    return h, fusion, gates


def resample(state: State, settings: Settings, y: Tensor) -> Tensor:
    """Learned queries read the tokens of one image: (N, C) -> (queries, C)."""

    def mha(prefix: str, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            linear(state, prefix + name, source).unflatten(-1, (settings.resampler_heads, -1))
            for name, source in (("q_proj", x), ("k_proj", context), ("v_proj", context))
        )
        everything = [[True] * len(context)] * len(x)
        return linear(state, prefix + "o_proj", attend(q, k, v, everything))

    s = state["resampler.queries"]
    assert len(s) == settings.queries
    for n in range(settings.resampler_layers):
        layer = f"resampler.layers.{n}."
        x = layer_norm(state, layer + "self_norm", s)
        s = s + mha(layer + "self_attn.", x, x)
        x = layer_norm(state, layer + "cross_norm", s)
        s = s + mha(layer + "cross_attn.", x, layer_norm(state, layer + "image_norm", y))
        x = linear(state, layer + "ffn.up", layer_norm(state, layer + "ffn_norm", s))
        gelu = x * 0.5 * (1 + torch.erf(x / 2**0.5))
        s = s + linear(state, layer + "ffn.down", gelu)
    return layer_norm(state, "resampler.norm", s)


# The parts of a decoder


def self_attention(
    state: State,
    layer: str,
    settings: Settings,
    h: Tensor,
    mask: Sequence[Sequence[bool]],
    positions: Sequence[Position],
) -> Tensor:
    """SA(norm(h)) of a block, (n, C)."""
    x = rms_norm(state, layer + "input_layernorm", settings, h)
    q = project(state, layer + "self_attn.q_proj", settings, x, positions)
    k = project(state, layer + "self_attn.k_proj", settings, x, positions)
    v = project(state, layer + "self_attn.v_proj", settings, x)
    return linear(state, layer + "self_attn.o_proj", attend(q, k, v, mask))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Sequence[Sequence[bool]]) -> Tensor:
    """Multi-head attention of q (n, H, D) over k and v (m, Hkv, D): (n, H * D).

    A query that sees nothing reads zeros.
    """
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    read = []
    for query, row in zip(q, mask, strict=True):
        seen = [j for j, visible in enumerate(row) if visible]
        if not seen:
            read.append(torch.zeros_like(query).flatten())
            continue
        scores = torch.einsum("hd,mhd->hm", query, k[seen]) / q.shape[-1] ** 0.5
        read.append(torch.einsum("hm,mhd->hd", scores.softmax(-1), v[seen]).flatten())
    return torch.stack(read)


def image_share(
    q: Tensor, k: Tensor, mask: Sequence[Sequence[bool]], keys: Sequence[Token]
) -> Tensor:
    """(n,): how much of the attention of q (n, H, D) over k (m, Hkv, D) falls on image keys."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    shares = []
    for query, row in zip(q, mask, strict=False):
        seen = [j for j, visible in enumerate(row) if visible]
        if not seen:
            shares.append(torch.tensor(torch.nan).double())
            continue
        scores = torch.einsum("hd,mhd->hm", query, k[seen]) / q.shape[-1] ** 0.5
        on_images = torch.tensor([keys[j].kind == "image" for j in seen]).double()
        shares.append((scores.softmax(-1) @ on_images).mean())
    return torch.stack(shares)


def project(
    state: State,
    name: str,
    settings: Settings,
    x: Tensor,
    positions: Sequence[Position] | None = None,
) -> Tensor:
    """(n, C) -> (n, heads, D), each head normed where the state holds a norm for that (Qwen3), then
    each token rotated by its position, if given, where the block rotates anything.
    """
    split = linear(state, name, x).unflatten(-1, (-1, settings.head_dim))
    norm = name.replace("_proj", "_norm")
    if norm + ".weight" in state:
        split = rms_norm(state, norm, settings, split)
    block = int(name.split("layers.")[1].split(".")[0])
    if positions is None or block in settings.still_blocks:
        return split
    return rotate(split, positions, settings)


def project_out(state: State, name: str, read: Tensor, mask: Sequence[Sequence[bool]]) -> Tensor:
    """The output projection, with its bias, where a query reads anything; zero elsewhere."""
    reads = torch.tensor([[float(any(row))] for row in mask]).double()
    return reads * linear(state, name, read)


def rotate(x: Tensor, positions: Sequence[Position], settings: Settings) -> Tensor:
    """RoPE over (n, heads, D): a pair of elements turns by position * theta^(-2i/D)."""
    half = settings.head_dim // 2
    sections = settings.mrope_section or (half,)
    assert sum(sections) == half
    axes = [axis for axis, section in enumerate(sections) for _ in range(section)]
    # Llama-like backbones are trained with angles in float32; rounding them is part of the model.
    exponents = torch.arange(0, settings.head_dim, 2, dtype=torch.float32) / settings.head_dim
    turns = torch.tensor(positions, dtype=torch.float32).reshape(-1, 3)[:, axes]
    speeds = 1.0 / settings.rope_theta**exponents
    if settings.llama3 is not None:
        speeds = torch.stack([stretched(speed, *settings.llama3) for speed in speeds])
    angles = (turns * speeds)[:, None]
    cos, sin = angles.cos().double(), angles.sin().double()
    if settings.paired:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x[..., :half], x[..., half:]
    turned = (first * cos - second * sin, second * cos + first * sin)
    if settings.paired:
        return torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat(turned, dim=-1)


def stretched(speed: Tensor, factor: float, low: float, high: float, original: float) -> Tensor:
    """What becomes of a frequency of RoPE, radians a position, in Llama 3.1: one that turns more
    than `high` times in a text of the original length stays, one that turns fewer than `low` times
    is `factor` times slower, and between the two it is mixed.
    """
    wavelength = 2 * torch.pi / speed
    if wavelength < original / high:
        return speed
    if wavelength > original / low:
        return speed / factor
    kept = (original / wavelength - low) / (high - low)
    return (1 - kept) * speed / factor + kept * speed


def feed_forward(state: State, layer: str, settings: Settings, h: Tensor) -> Tensor:
    """FFN(norm(h)) of a block."""
    x = rms_norm(state, layer + "post_attention_layernorm", settings, h)
    return gated_mlp(state, layer + "mlp.", x)


def gated_mlp(state: State, prefix: str, x: Tensor) -> Tensor:
    """down(silu(gate(x)) * up(x))."""
    gate, up = linear(state, prefix + "gate_proj", x), linear(state, prefix + "up_proj", x)
    return linear(state, prefix + "down_proj", gate * torch.sigmoid(gate) * up)


def rms_norm(state: State, name: str, settings: Settings, x: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    size = torch.sqrt((x**2).mean(-1, keepdim=True) + settings.norm_eps)
    return state[name + ".weight"] * x / size


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-6) * weight + bias."""
    centred = x - x.mean(-1, keepdim=True)
    size = torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)
    return state[name + ".weight"] * centred / size + state[name + ".bias"]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    """x W^T + b, where the state holds a bias."""
    out = x @ state[name + ".weight"].T
    return out + state[name + ".bias"] if name + ".bias" in state else out
