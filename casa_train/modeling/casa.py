"""CASA and plain cross-attention, with the five switches between them and token insertion.

CASA (arXiv 2512.19535, section 3): CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T), causal within the
window; plain cross-attention: CA(x_T) = 1[T > K] MHA(x_T | y_1..y_N). By default both stand in
parallel to self-attention and share its normalised input: h <- h + SA(norm(h)) + CASA(norm(h), y).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .block import (
    DecoderContext,
    Heads,
    attend,
    feed_forward,
    plain_block,
    project,
    project_out,
    self_attention,
)
from .windowed import WindowedMechanism, linear_like, norm_like, read_windows

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Casa(WindowedMechanism):
    """Cross-attention whose keys hold the image tokens and the text tokens of the same window.

    Options, the paper's default first:

    - `share_parameters` (D1) false; true: the block's own q/k/v/o projections and input norm serve
      fusion too and are computed once; the mechanism then adds no parameters.
    - `text_in_window` (D2) true; false leaves the text keys out: plain cross-attention.
    - `placement` (D3) parallel; before or after self-attention as a sublayer of its own; replace:
      self-attention of the block is dropped. `every` n: only blocks n-1, 2n-1, ... have fusion.
    - `update_image_tokens` (D4) none; ffn: image tokens pass through the feed-forward network of
      blocks with fusion; ffn_and_attention: they also attend, causally, to what a text token in
      their place would see.
    - `history` (D5) window; all: keys are the interleaved stream of the sample from its start.
      Text before the first image then still reads nothing, except in placement=replace, where it
      would have no attention at all.
    - `window_scope` frame: every frame of a video opens a window; all_frames: one window holds all
      frames of a video and the text between them.
    - `init`: from_self_attention copies projections and norm from the block's self-attention;
      zero_output does too, but with a zero output projection; random keeps the random start. The
      first suits decoders that know image tokens, or long runs; beside a frozen text-only one the
      second begins at the loss of the text alone.
    - `image_positions`: RoPE positions of image keys. `frozen`: all at K, the text tokens before
      the image, or (K, K + row, K + column) for multimodal RoPE. `advance`: queries and keys count
      images too, as insertion does. `none`: images are not rotated. The paper says only that images
      take no text positions; this choice is ours. Plain cross-attention uses no positions.
    """

    name = "casa"
    options = {
        "share_parameters": False,
        "text_in_window": True,
        "placement": "parallel",
        "every": 1,
        "update_image_tokens": "none",
        "history": "window",
        "window_scope": "frame",
        "init": "from_self_attention",
        "image_positions": "frozen",
    }
    choices = {
        "placement": ("parallel", "before", "after", "replace"),
        "update_image_tokens": ("none", "ffn", "ffn_and_attention"),
        "history": ("window", "all"),
        "window_scope": ("frame", "all_frames"),
        "init": ("from_self_attention", "zero_output", "random"),
        "image_positions": ("frozen", "advance", "none"),
    }

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        options = self.fusion
        self.shared: bool = options["share_parameters"]
        self.text_in_window = options.get("text_in_window", False)
        self.placement: str = options["placement"]
        self.every: int = options["every"]
        self.update: str = options["update_image_tokens"]
        self.images_attend = self.update == "ffn_and_attention"
        self.history = options["history"] == "all"
        self.all_frames = options["window_scope"] == "all_frames"
        replaces = self.placement == "replace"
        self.repeats_attention = options["init"] == "from_self_attention" and not replaces
        self.leading_reads = self.history and self.text_in_window and replaces
        self.positions = options.get("image_positions", "frozen")
        self._refuse_contradictions()
        if not self.text_in_window:
            self.positions = None
        depth = text_config.num_hidden_layers
        self.last_fused = depth // self.every * self.every - 1

    def _refuse_contradictions(self) -> None:
        self.check_every()
        if self.shared and self.fusion["init"] != "from_self_attention":
            raise ValueError(
                f"fusion.init is {self.fusion['init']!r}, but with fusion.share_parameters=true "
                "there is nothing to initialise: leave one of them out"
            )
        if not self.text_in_window and self.positions != "frozen":
            raise ValueError(
                f"fusion.image_positions is {self.positions!r}, but cross-attention without "
                "text keys uses no positions: leave it out or set fusion.text_in_window=true"
            )
        if self.history and self.all_frames:
            raise ValueError(
                "fusion.window_scope=all_frames says nothing beside fusion.history=all, which "
                "already holds all frames: leave one of them out"
            )
        if self.placement == "replace" and self.every == 1 and not self.text_in_window:
            raise ValueError(
                "fusion.placement=replace with every=1 and without text keys leaves text with no "
                "way to see other text: set fusion.every=2 or fusion.text_in_window=true"
            )

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        if not self.has_fusion(layer_idx):
            return None
        sublayer = self.placement in ("before", "after")
        fusion = CasaLayer(layer, layer_idx, self.shared, text_norm=sublayer and not self.shared)
        if self.placement == "replace" and not self.shared:
            layer.self_attn = None  # dropped; its weights, if any, are adopted by fusion
        return fusion

    def copied(self, name: str) -> bool:
        if self.shared or self.fusion["init"] == "random" or ".fusion." not in name:
            return False
        part = name.split(".fusion.")[1].split(".")[0]
        if part in ("norm", "text_norm"):
            return True
        zero = part == "o_proj" and self.fusion["init"] == "zero_output"
        return part in PROJECTIONS and self.placement != "replace" and not zero

    def adopt(self, name: str) -> str | None:
        if self.placement != "replace" or self.shared or ".self_attn." not in name:
            return name
        if not self.has_fusion(int(name.split("layers.")[1].split(".")[0])):
            return name
        return None if self.fusion["init"] == "random" else name.replace("self_attn", "fusion")

    @torch.no_grad()
    def initialise(self, layer: Any) -> None:
        fusion, attention = layer.fusion, layer.self_attn
        if fusion is None or self.shared or self.fusion["init"] == "random":
            return
        if attention is not None:
            for name in PROJECTIONS:
                getattr(fusion, name).load_state_dict(getattr(attention, name).state_dict())
        for norm in (fusion.norm, fusion.text_norm):
            if norm is not None:
                norm.load_state_dict(layer.input_layernorm.state_dict())
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

    def run_layer(
        self, layer: Any, h: Tensor, images: Tensor, context: DecoderContext
    ) -> tuple[Tensor, Tensor]:
        fusion = layer.fusion
        if fusion is None:
            return plain_block(layer, h, context), images
        # Whose projections serve fusion, and the norms of its two inputs.
        owner, image_norm = fusion, fusion.norm
        text_norm = fusion.text_norm or layer.input_layernorm
        if self.shared:
            owner, image_norm = layer.self_attn, layer.input_layernorm
        width, keys = fusion.head_dim, self.text_in_window
        assert context.plan.cross is not None
        cross = context.plan.cross
        # Nothing reads image tokens behind the last block with fusion.
        updates = self.update != "none" and fusion.layer_idx != self.last_fused
        attends = updates and self.images_attend
        pictures = project(owner, image_norm(images), width, queries=attends)

        if self.placement == "parallel":
            x = layer.input_layernorm(h)
            own = project(layer.self_attn, x, width)
            text = own if self.shared else project(fusion, x, width, keys=keys)
            read, image_read = fusion(text if keys else text._replace(k=None), pictures, context)
            seen = self_attention(layer, own, context)
            if self.shared:
                h = h + layer.self_attn.o_proj(seen + read)
            else:
                h = h + layer.self_attn.o_proj(seen) + project_out(fusion.o_proj, read, cross)
        else:
            if self.placement == "after":
                h = attend(layer, h, context)
            text = project(owner, text_norm(h), width, keys=keys)
            read, image_read = fusion(text, pictures, context)
            h = h + project_out(owner.o_proj, read, cross)
            if self.placement == "before":
                h = attend(layer, h, context)

        if image_read is not None:
            images = images + owner.o_proj(image_read)
        if updates:
            images = feed_forward(layer, images)
        return feed_forward(layer, h), images


class CrossAttention(Casa):
    """Plain cross-attention: CASA without the text keys (D2), and so without positions."""

    name = "cross_attention"
    options = {
        key: value
        for key, value in Casa.options.items()
        if key not in ("text_in_window", "image_positions")
    }


class CasaLayer(nn.Module):
    """The `fusion` child of a decoder layer.

    Four projections and a norm for image tokens, shaped like the layer's own self-attention so that
    they can be copied; `text_norm` where fusion is a sublayer of its own. No parameters if shared.
    """

    def __init__(self, layer: Any, layer_idx: int, shared: bool, text_norm: bool) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim: int = layer.self_attn.head_dim
        self.norm: nn.Module | None = None
        self.text_norm: nn.Module | None = None
        if shared:
            return
        for name in PROJECTIONS:
            setattr(self, name, linear_like(getattr(layer.self_attn, name)))
        self.norm = norm_like(layer.input_layernorm)
        if text_norm:
            self.text_norm = norm_like(layer.input_layernorm)

    def forward(
        self, text: Heads, images: Heads, context: DecoderContext
    ) -> tuple[Tensor, Tensor | None]:
        """What text and image tokens read in their windows, before the output projection.

        :return: (T, H * D), exactly zero for text that has nothing to read; (N, H * D) or None.
        """
        return read_windows(self.layer_idx, text, images, context)
