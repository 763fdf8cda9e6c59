"""CASA and plain cross-attention: text queries read image keys, with or without the text beside
them.

CASA (arXiv 2512.19535, section 3): CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T), causal within the
window; plain cross-attention: CA(x_T) = 1[T > K] MHA(x_T | y_1..y_N). Both stand in parallel to
self-attention and share its normalised input: h <- h + SA(norm(h)) + CASA(norm(h), y). Each has its
own projections. Text before the first image gets exactly zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import Segments, varlen_attention
from .decoder import DecoderContext, Rope, project_heads
from .fusion import FusionMechanism, FusionPlan
from .streaming import FlatCache, StreamingState
from .windows import Chunk, Range, image_positions, split_windows, text_positions

INITS = ("from_self_attention", "zero_output", "random")
IMAGE_POSITIONS = ("frozen", "advance", "none")


class Casa(FusionMechanism):
    """Cross-attention whose keys hold the image tokens and the text tokens of the same window.

    Options:

    - `text_in_window` (D2): false leaves the text keys out, which is plain cross-attention.
    - `init`: from_self_attention copies projections and norm from the block's self-attention;
      zero_output does too, but with a zero output projection; random keeps the random start.
    - `image_positions`: RoPE positions of image keys. `frozen`: all at K, the text tokens before
      the image. `advance`: queries and keys count image tokens too, as insertion does. `none`:
      image keys are not rotated. The paper does not say more than that images take no text
      positions; this choice is ours. Plain cross-attention uses no positions at all.
    """

    name = "casa"
    options = {
        "text_in_window": True,
        "init": "from_self_attention",
        "image_positions": "frozen",
    }

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        for key, allowed in (("init", INITS), ("image_positions", IMAGE_POSITIONS)):
            if key in self.fusion and self.fusion[key] not in allowed:
                raise ValueError(
                    f"fusion.{key} is {self.fusion[key]!r}; expected one of {list(allowed)}"
                )
        self.text_in_window = bool(self.fusion.get("text_in_window", False))
        self.image_positions = self.fusion.get("image_positions", "frozen")
        if not self.text_in_window and self.image_positions != "frozen":
            raise ValueError(
                f"fusion.image_positions is {self.image_positions!r}, but cross-attention without "
                "text keys uses no positions: leave it out or set fusion.text_in_window=true"
            )

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module:
        return CasaLayer(layer, layer_idx)

    @torch.no_grad()
    def initialise(self, layer: Any) -> None:
        fusion, attention = layer.fusion, layer.self_attn
        if self.fusion["init"] == "random":
            return
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            getattr(fusion, name).load_state_dict(getattr(attention, name).state_dict())
        fusion.norm.load_state_dict(layer.input_layernorm.state_dict())
        if self.fusion["init"] == "zero_output":
            for parameter in fusion.o_proj.parameters():
                parameter.zero_()

    def zero_at_start(self, name: str) -> bool:
        # A zero output projection lets no gradient through to what stands before it: the rest of
        # the layer and everything that made the image tokens.
        if self.fusion["init"] != "zero_output":
            return False
        if ".fusion." in name:
            return "o_proj" not in name
        return name.startswith(("visual", "adapter"))

    def plan(
        self,
        chunks: Sequence[Chunk],
        state: StreamingState | None,
        cache: FlatCache | None,
        device: torch.device,
    ) -> FusionPlan:
        plan = self._text_only(chunks, cache, device)
        kept = [0] * len(chunks) if state is None else state.window_lengths
        kept_starts = list(itertools.accumulate(kept, initial=0))
        text_start = kept_starts[-1]  # key rows: kept keys of open windows, then text, then images
        image_start = text_start + sum(chunk.text for chunk in chunks)
        open_window: list[list[Range]] = [
            [(start, start + n)] if n else [] for start, n in zip(kept_starts, kept, strict=False)
        ]
        # An image at the very start joins the window that the last chunk left without text.
        joining = {
            sample
            for sample, chunk in enumerate(chunks)
            if state is not None and 0 in chunk.points and state.window_text[sample] == 0
        }
        queries: list[list[Range]] = []
        keys: list[list[Range]] = []
        for window in split_windows(chunks):
            text = (text_start + window.text[0], text_start + window.text[1])
            image = (image_start + window.image[0], image_start + window.image[1])
            if window.continues and not open_window[window.sample]:
                continue  # text before the first image
            # The image stands first: with bottom-right causality every text token sees all of it.
            key = [] if window.continues else [image]
            if window.continues or window.sample in joining:
                key = [*open_window[window.sample], *key]
                joining.discard(window.sample)
            if self.text_in_window:
                key.append(text)
            queries.append([window.text])
            keys.append(key)
            open_window[window.sample] = key
        plan.cross = Segments(queries, keys, causal=self.text_in_window, device=device)
        plan.keep = open_window
        if self.text_in_window:
            advance = self.image_positions == "advance"
            of_text, of_images = text_positions(chunks, advance), image_positions(chunks, advance)
            if self.image_positions == "none":
                of_images = np.zeros_like(of_images)  # position 0 rotates by nothing
            plan.query_positions = torch.from_numpy(of_text).to(device)
            plan.image_positions = torch.from_numpy(of_images).to(device)
        return plan


class CrossAttention(Casa):
    """Plain cross-attention: CASA without the text keys (D2), and so without positions."""

    name = "cross_attention"
    options = {"init": "from_self_attention"}


class CasaLayer(nn.Module):
    """The `fusion` child of a decoder layer: norm for image tokens and four projections.

    Shapes and biases follow the layer's own self-attention, so that it can be copied.
    """

    def __init__(self, layer: Any, layer_idx: int) -> None:
        super().__init__()
        attention = layer.self_attn
        self.layer_idx = layer_idx
        self.head_dim: int = attention.head_dim
        self.q_proj = _linear_like(attention.q_proj)
        self.k_proj = _linear_like(attention.k_proj)
        self.v_proj = _linear_like(attention.v_proj)
        self.o_proj = _linear_like(attention.o_proj)
        norm = layer.input_layernorm
        self.norm: nn.Module = type(norm)(norm.weight.shape[0], eps=norm.variance_epsilon)

    def forward(self, x: Tensor, images: Tensor, rope: Rope, context: DecoderContext) -> Tensor:
        """What the text reads in its windows.

        :param x: (T, C) text hidden states after the block's input norm.
        :param images: (N, C) image tokens as the vision tower gave them.
        :param rope: rotates (tokens, heads, D) by the tables in `context`.
        :return: (T, C), exactly zero for text without a window.
        """
        plan = context.plan
        assert plan.cross is not None
        y = self.norm(images)
        q = project_heads(self.q_proj, x, self.head_dim)
        k_text, v_text = (project_heads(p, x, self.head_dim) for p in (self.k_proj, self.v_proj))
        k_image, v_image = (project_heads(p, y, self.head_dim) for p in (self.k_proj, self.v_proj))
        if context.query_table is not None and context.image_table is not None:
            q, k_text = (rope(t, context.query_table) for t in (q, k_text))
            k_image = rope(k_image, context.image_table)
        k, v = torch.cat([k_text, k_image]), torch.cat([v_text, v_image])
        if context.state is not None:
            if self.layer_idx in context.state.window:
                kept = context.state.window[self.layer_idx]
                k, v = torch.cat([kept[0], k]), torch.cat([kept[1], v])
            context.state.window[self.layer_idx] = k[context.keep_index], v[context.keep_index]
        if len(plan.cross) == 0:
            return torch.zeros_like(x)
        read: Tensor = self.o_proj(
            varlen_attention(q, k, v, plan.cross, context.backend).flatten(1)
        )
        if plan.cross.covers(x.shape[0]):
            return read
        return torch.zeros_like(x).index_copy(0, plan.cross.query_index, read)


def _linear_like(source: nn.Linear) -> nn.Linear:
    """A new linear of the same shape, with a bias where `source` has one."""
    return nn.Linear(source.in_features, source.out_features, bias=source.bias is not None)
