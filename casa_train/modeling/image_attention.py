"""How much of what text reads comes from images, layer by layer: CASA's implicit gate, and others'.

CASA has no gate: how far a layer turns to the image or to the text is the share of attention that
falls on image keys. Token insertion has the same share in its self-attention. Where a mechanism
has gates, their values are what to look at; plain cross-attention reads images alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_on
from .segments import Segments

IMAGE_SHARE = "image share"
IMAGE_GATE = "image gate"
ATTENTION_GATE = "attention gate"
FFN_GATE = "feed-forward gate"


class ImageAttention:
    """Listens to one forward pass; `CasaForConditionalGeneration.image_attention` makes it.

    :param rows: (R,) int64, the text rows of the pack to listen for.
    :ivar values: by quantity and by layer index, (R,) numbers of at least float32. `IMAGE_SHARE`:
        the share of attention on image keys, the others being text, mean over heads; NaN where a
        token has nothing to read. `IMAGE_GATE`: sigmoid, 0 reads text alone. The others: tanh.
    :ivar uniform: (R,) what the image share would be if all keys got the same; None without one.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.values: dict[str, dict[int, Tensor]] = {}
        self.uniform: Tensor | None = None

    def attention(
        self,
        layer_idx: int,
        q: Tensor,
        k: Tensor,
        segments: Segments,
        of_images: Tensor,
        text_index: Tensor | None = None,
    ) -> None:
        """Takes the queries and keys of an attention, rotated.

        :param q: (Tq, H, D); :param k: (Tk, Hkv, D).
        :param of_images: (Tk,) bool, True for image keys.
        :param text_index: the rows of q that are text; None: all, in order.
        """
        rows = self.rows.to(q.device)
        if text_index is not None:
            rows = text_index[rows]
        if self.uniform is None:
            self.uniform = attention_on(torch.zeros_like(q), k, segments, rows, of_images)
        share = attention_on(q, k, segments, rows, of_images)
        self.values.setdefault(IMAGE_SHARE, {})[layer_idx] = share

    def gate(self, layer_idx: int, name: str, gate: Tensor) -> None:
        """Takes the values of a gate (T, 1)."""
        wide = torch.promote_types(gate.dtype, torch.float32)
        self.values.setdefault(name, {})[layer_idx] = gate[self.rows.to(gate.device), 0].to(wide)
