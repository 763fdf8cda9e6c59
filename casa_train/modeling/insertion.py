"""Token insertion: image tokens join the stream, as in LLaVA and Qwen2.5-VL.

SA_ins(x_T) = MHA(x_T | x_1..x_K, y_1..y_N, x_K+1..x_T). Every later token attends to them, they
pass through every feed-forward network and stay in the KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .block import FusionPlan
from .fusion import FusionMechanism, register
from .segments import on_device
from .streaming import FlatCache, StreamingState
from .windows import Chunk, image_positions, interleave, text_positions


@register
class Insertion(FusionMechanism):
    """Adds no parameters: the backbone's own layers process the image tokens.

    Positions count text and image tokens one by one; with multimodal RoPE they follow Qwen2.5-VL's
    rule for still images.
    """

    name = "insertion"
    inserts = True

    def plan(
        self,
        chunks: Sequence[Chunk],
        state: StreamingState | None,
        cache: FlatCache | None,
        device: torch.device,
    ) -> FusionPlan:
        order, lengths = interleave(chunks)
        texts = sum(chunk.text for chunk in chunks)
        of_text = text_positions(chunks, True, self.multimodal)
        of_images = image_positions(chunks, True, self.multimodal)
        if self.multimodal:
            of_text = np.broadcast_to(of_text, (3, texts))
        positions = np.concatenate([of_text, of_images], axis=-1)[..., order]
        return FusionPlan(
            stream_positions=on_device(positions, device),
            stream_lengths=lengths,
            self_attention=self._self_attention(lengths, cache, device),
            stream_index=on_device(order, device),
            text_index=on_device(np.argsort(order, kind="stable")[:texts], device),
        )
