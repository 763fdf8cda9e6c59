"""Cross-attention with projections like self-attention's: the ground of casa and cross_attention.

What both have in common: where it stands in a block (D3), whose projections it takes (D1), what
becomes of the image tokens (D4) and how far back it reads (D5).
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
from .block_work import BlockWork
from .joint_keys import KeySource
from .lean import linear
from .regions import normed
from .windowed import (
    HEAD_NORMS,
    WindowedMechanism,
    head_norms,
    image_heads,
    linear_like,
    norm_like,
    read_windows,
)

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class WindowAttention(WindowedMechanism):
    """Options, the paper's default first:

    - `share_parameters` (D1) false; true: the block's own q/k/v/o projections and input norm serve
      fusion too and are computed once; the mechanism then adds no parameters.
    - `placement` (D3) parallel; before or after self-attention as a sublayer of its own; replace:
      self-attention of the block is dropped. `every` n: only blocks n-1, 2n-1, ... have fusion.
    - `update_image_tokens` (D4) none; ffn: image tokens pass through the feed-forward network of
      blocks with fusion; ffn_and_attention: they also attend, causally, to what a text token in
      their place would see.
    - `history` (D5) window; all: keys are the interleaved stream of the sample from its start.
      Text before the first image then still reads nothing, except in placement=replace with text
      keys, where it would have no attention at all.
    - `window_scope` frame: every frame of a video opens a window; all_frames: one window holds all
      frames of a video and the text between them.
    - `init`: from_self_attention copies projections and norm from the block's self-attention;
      zero_output does too, but with a zero output projection; random keeps the random start. The
      first suits decoders that know image tokens, or long runs; beside a frozen text-only one the
      second begins at the loss of the text alone.
    """

    options = {
        "share_parameters": False,
        "placement": "parallel",
        "every": 1,
        "update_image_tokens": "none",
        "history": "window",
        "window_scope": "frame",
        "init": "from_self_attention",
    }
    decode_steps = True
    choices = {
        "placement": ("parallel", "before", "after", "replace"),
        "update_image_tokens": ("none", "ffn", "ffn_and_attention"),
        "history": ("window", "all"),
        "window_scope": ("frame", "all_frames"),
        "init": ("from_self_attention", "zero_output", "random"),
    }

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        options = self.fusion
        self.shared: bool = options["share_parameters"]
        self.placement: str = options["placement"]
        self.every: int = options["every"]
        self.update: str = options["update_image_tokens"]
        self.images_attend = self.update == "ffn_and_attention"
        self.history = options["history"] == "all"
        self.all_frames = options["window_scope"] == "all_frames"
        self.check_every()
        if self.shared and options["init"] != "from_self_attention":
            raise ValueError(
                f"fusion.init is {options['init']!r}, but with fusion.share_parameters=true there "
                "is nothing to initialise: leave one of them out"
            )
        if self.history and self.all_frames:
            raise ValueError(
                "fusion.window_scope=all_frames says nothing beside fusion.history=all, which "
                "already holds all frames: leave one of them out"
            )
        depth = text_config.num_hidden_layers
        self.last_fused = depth // self.every * self.every - 1

    def check_text_is_read(self, text_keys: bool) -> None:
        """Refuses blocks that all drop self-attention and read images alone."""
        if self.placement == "replace" and self.every == 1 and not text_keys:
            raise ValueError(
                "fusion.placement=replace with every=1 and without text keys leaves text with no "
                "way to see other text: set fusion.every=2 or fusion.text_in_window=true"
            )

    def start_advice(self) -> tuple[str, str] | None:
        if self.fusion["init"] != "from_self_attention" or self.placement == "replace":
            return None
        instead = "fusion.init=zero_output"
        if self.shared:
            unshared = f"fusion.share_parameters=false with {instead}"
            return "fusion.share_parameters=true", unshared
        return "fusion.init=from_self_attention", instead

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        if not self.has_fusion(layer_idx):
            return None
        sublayer = self.placement in ("before", "after")
        text_norm = sublayer and not self.shared
        fusion = CrossAttentionLayer(layer, layer_idx, self.shared, text_norm)
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
        projects = part in PROJECTIONS or part in HEAD_NORMS
        return projects and self.placement != "replace" and not zero

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
            for name in (*PROJECTIONS, *head_norms(attention)):
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

    def image_keys(self, layer: Any) -> KeySource | None:
        fusion = layer.fusion
        if fusion is None or self.shared or self.update != "none":
            return None
        return KeySource(fusion.norm, fusion, fusion.head_dim)

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
        updates = updates and context.step is None  # which brings no image tokens
        attends = updates and self.images_attend
        pictures = context.image_heads.get(fusion.layer_idx)
        if pictures is None:
            pictures = image_heads(owner, image_norm, images, width, context, queries=attends)

        if self.placement == "parallel":
            x = normed(layer.input_layernorm, h)
            own = project(layer.self_attn, x, width)
            text = own if self.shared else project(fusion, x, width, keys=keys)
            read, image_read = fusion(text if keys else text._replace(k=None), pictures, context)
            seen = self_attention(layer, own, context)
            if self.shared:
                added = [linear(layer.self_attn.o_proj, seen + read)]
            else:
                own_out = linear(layer.self_attn.o_proj, seen)
                added = [own_out, project_out(fusion.o_proj, read, cross)]
        else:
            if self.placement == "after":
                h = attend(layer, h, context)
            text = project(owner, normed(text_norm, h), width, keys=keys)
            read, image_read = fusion(text, pictures, context)
            added = [project_out(owner.o_proj, read, cross)]
            if self.placement == "before":
                h, added = attend(layer, h + added[0], context), []

        if image_read is not None:
            images = images + owner.o_proj(image_read)
        if updates:
            images = feed_forward(layer, images)
        return feed_forward(layer, h, *added), images

    def count_layer(self, work: BlockWork, layer_idx: int, h: bool, z: bool) -> tuple[bool, bool]:
        if not self.has_fusion(layer_idx):
            return work.plain_block(h), z
        width, q_width = work.sizes.width, work.sizes.q_width
        own, sublayer = not self.shared, self.placement in ("before", "after")
        reuse = self.shared and self.placement == "parallel"
        y = work.norm(z) or own
        if self.placement == "after":
            h = work.attend(h)
        x = work.norm(h) or (own and sublayer)
        q, k = False, 0
        if self.placement == "parallel":
            q, k = work.project(x)
            seen = work.self_attention(q, k)
        if not reuse:
            q = work.text_linear(width, q_width, own, x, "q_proj")
            k = work.text_keys(own, x) if self.text_in_window else 0
        k = work.image_keys(own, y) | (k if self.text_in_window else 0)
        read = work.cross_attention(q, k)
        if reuse:
            h |= work.project_out(seen or read)
        else:
            if self.placement == "parallel":
                h |= work.project_out(seen)
            h |= work.text_linear(q_width, width, own, read, "o_proj")
        if self.placement == "before":
            h = work.attend(h)
        if self.update != "none" and layer_idx != self.last_fused:
            z = self._count_update(work, z, y, k)
        return work.feed_forward(h), z

    def _count_update(self, work: BlockWork, z: bool, y: bool, k: int) -> bool:
        """The work of D4."""
        part, own, images = "image updates, linears", not self.shared, work.images
        width, q_width = work.sizes.width, work.sizes.q_width
        if self.images_attend:
            q = work.linear(part, images, width, q_width, own, y, "q_proj")
            read = work.attention("image updates, attention", work.pairs.image, q, k)
            z |= work.linear(part, images, q_width, width, own, read, "o_proj")
        return z | work.mlp(part, images, False, work.norm(z))


class CrossAttentionLayer(nn.Module):
    """The `fusion` child of a decoder layer.

    Four projections, with norms of heads where the layer's own self-attention has them, and a norm
    for image tokens, shaped like the layer's own so that they can be copied; `text_norm` where
    fusion is a sublayer of its own. No parameters if shared.
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
        for name, norm in head_norms(layer.self_attn).items():
            setattr(self, name, norm_like(norm))
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
