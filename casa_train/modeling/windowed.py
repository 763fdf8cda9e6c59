"""Cross-attention whose keys are laid out by windows: the ground of casa, gated and hyper.

The key space of a forward pass is [keys kept from earlier chunks; text keys; image keys]. A *scope*
lists the key rows that stand open for the next token of a sample, in stream order, so that a causal
mask aligned bottom-right lets every query see what stands before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .attention import varlen_attention
from .block import DecoderContext, FusionPlan, Heads, project, scatter
from .fusion import FusionMechanism
from .regions import normed
from .segments import Segments, on_device
from .streaming import FlatCache, StreamingState
from .windows import Chunk, Range, image_positions, split_windows, text_positions


class WindowedMechanism(FusionMechanism):
    """Plans text (and image) queries over windows; subclasses say what a block does with them.

    :ivar text_in_window: text keys beside image keys; the attention is then causal.
    :ivar history: a scope begins with the sample, not with its window.
    :ivar all_frames: a scope goes on through the frames of a video.
    :ivar images_attend: image tokens are queries too.
    :ivar leading_reads: text before the first image reads the text before it.
    :ivar positions: RoPE positions of images: frozen, advance or none; None: no RoPE at all.
    """

    text_in_window = False
    history = False
    all_frames = False
    images_attend = False
    leading_reads = False
    positions: str | None = None

    def has_fusion(self, layer_idx: int) -> bool:
        """Whether option `every` n puts fusion into this block: n-1, 2n-1, ..."""
        every: int = self.fusion["every"]
        return layer_idx % every == every - 1

    def check_every(self) -> None:
        """Refuses an `every` that is no number of blocks."""
        every, depth = self.fusion["every"], self.text_config.num_hidden_layers
        if type(every) is not int or not 1 <= every <= depth:
            raise ValueError(
                f"fusion.every is {every!r}; expected a number of blocks from 1 to {depth}, the "
                "depth of the backbone"
            )

    def plan(
        self,
        chunks: Sequence[Chunk],
        state: StreamingState | None,
        cache: FlatCache | None,
        device: torch.device,
    ) -> FusionPlan:
        plan = super().plan(chunks, state, cache, device)
        kept = [0] * len(chunks) if state is None else state.window_lengths
        starts = list(itertools.accumulate(kept, initial=0))
        text_start = starts[-1]
        texts = sum(chunk.text for chunk in chunks) if self.text_in_window else 0
        image_start = text_start + texts
        scope: list[list[Range]] = [
            [(start, start + n)] if n else [] for start, n in zip(starts, kept, strict=False)
        ]
        opened = [chunk.past_span > 0 for chunk in chunks]
        # An image at the very start joins the window that the last chunk left without text.
        joining = {
            sample
            for sample, chunk in enumerate(chunks)
            if state is not None and 0 in chunk.points and state.window_text[sample] == 0
        }
        queries: list[list[Range]] = []
        keys: list[list[Range]] = []
        image_queries: list[list[Range]] = []
        image_keys: list[list[Range]] = []
        for window in split_windows(chunks):
            sample = window.sample
            if not window.continues:
                goes_on = self.history or (self.all_frames and window.follows) or sample in joining
                joining.discard(sample)
                earlier = scope[sample] if goes_on else []
                scope[sample] = [*earlier, _shift(window.image, image_start)]
                opened[sample] = True
                image_queries.append([window.image])
                image_keys.append(scope[sample])
            if self.text_in_window and (self.history or opened[sample]):
                scope[sample] = [*scope[sample], _shift(window.text, text_start)]
            if opened[sample] or self.leading_reads:
                queries.append([window.text])
                keys.append(scope[sample])
        plan.cross = Segments(queries, keys, causal=self.text_in_window, device=device)
        if self.images_attend:
            plan.image_cross = Segments(image_queries, image_keys, causal=True, device=device)
        plan.keep = scope
        if self.positions is not None:
            advance = self.positions == "advance"
            of_images = image_positions(chunks, advance, self.multimodal)
            if self.positions == "none":
                of_images = np.zeros_like(of_images)  # position 0 rotates by nothing
            plan.image_positions = on_device(of_images, device)
            plan.query_positions = plan.stream_positions
            if advance:
                of_text = text_positions(chunks, True, self.multimodal)
                plan.query_positions = on_device(of_text, device)
        return plan


def read_windows(
    layer_idx: int, text: Heads, images: Heads, context: DecoderContext
) -> tuple[Tensor, Tensor | None]:
    """What text and image tokens read in their scopes, before any output projection.

    :param text: heads of the text tokens; k and v are None where text is no key.
    :param images: heads of the image tokens; q is None where images do not attend.
    :return: (T, H * D), zero for text that reads nothing; (N, H * D) or None.
    """
    plan, state = context.plan, context.state
    assert plan.cross is not None and text.q is not None
    if context.step is not None:
        return _read_on(layer_idx, text, context), None
    assert images.k is not None and images.v is not None
    q, k, v, image_q = text.q, images.k, images.v, images.q
    k_text = text.k
    if context.query_table is not None and context.image_table is not None:
        q = context.rope(q, context.query_table)
        k = context.rope(k, context.image_table)
        k_text = None if k_text is None else context.rope(k_text, context.query_table)
        image_q = None if image_q is None else context.rope(image_q, context.image_table)
    if k_text is not None and text.v is not None:
        k, v = torch.cat([k_text, k]), torch.cat([text.v, v])
    if context.image_attention is not None and k_text is not None:
        of_images = torch.arange(len(k), device=k.device) >= len(k_text)
        context.image_attention.attention(layer_idx, q, k, plan.cross, of_images)
    if state is not None:
        if layer_idx in state.window:
            kept = state.window[layer_idx]
            k, v = torch.cat([kept[0], k]), torch.cat([kept[1], v])
        state.window[layer_idx] = k[context.keep_index], v[context.keep_index]
    read = scatter(varlen_attention(q, k, v, plan.cross, context.backend), plan.cross, len(q))
    image_read = None
    if image_q is not None:
        assert plan.image_cross is not None
        of_images = varlen_attention(image_q, k, v, plan.image_cross, context.backend)
        image_read = scatter(of_images, plan.image_cross, len(image_q))
    return read, image_read


def _read_on(layer_idx: int, text: Heads, context: DecoderContext) -> Tensor:
    """`read_windows` where every row takes one text token and no image."""
    q, k = text.q, text.k
    assert q is not None
    if context.query_table is not None:
        q = context.rope(q, context.query_table)
        k = None if k is None else context.rope(k, context.query_table)
    read: Tensor = context.step.window_attention(layer_idx, q, k, text.v)
    return read


def image_heads(
    owner: Any,
    norm: Any,
    images: Tensor,
    head_dim: int,
    context: DecoderContext,
    queries: bool = False,
) -> Heads:
    """Keys and values (and queries) of normed image tokens; none where a step brings no image."""
    if context.step is not None:
        return Heads(None, None, None)
    return project(owner, normed(norm, images), head_dim, queries=queries)


def linear_like(
    source: nn.Linear, inputs: int | None = None, outputs: int | None = None
) -> nn.Linear:
    """A new linear of the same shape, or of these widths, with a bias where `source` has one."""
    inputs = source.in_features if inputs is None else inputs
    outputs = source.out_features if outputs is None else outputs
    return nn.Linear(inputs, outputs, bias=source.bias is not None)


HEAD_NORMS = ("q_norm", "k_norm")


def head_norms(attention: Any) -> dict[str, nn.Module]:
    """The norms of heads that an attention has, by name: none of most backbones."""
    found = {name: attention._modules.get(name) for name in HEAD_NORMS}
    return {name: norm for name, norm in found.items() if norm is not None}


def norm_like(source: Any) -> nn.Module:
    """A new norm of the same class, width and epsilon."""
    norm: nn.Module = type(source)(source.weight.shape[0], eps=source.variance_epsilon)
    return norm


def _shift(rows: Range, by: int) -> Range:
    return rows[0] + by, rows[1] + by
