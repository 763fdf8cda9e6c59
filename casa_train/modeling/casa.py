"""CASA: cross-attention that sees the text of its window, with the five switches to its relatives.

CASA (arXiv 2512.19535, section 3): CASA(x_T) = MHA(x_T | y_1..y_N, x_K+1..x_T), causal within the
window; plain cross-attention: CA(x_T) = 1[T > K] MHA(x_T | y_1..y_N). By default both stand in
parallel to self-attention and share its normalised input: h <- h + SA(norm(h)) + CASA(norm(h), y).
"""

from __future__ import annotations

from typing import Any

from .fusion import register
from .window_attention import WindowAttention


@register
class Casa(WindowAttention):
    """Cross-attention whose keys hold the image tokens and the text tokens of the same window.

    Options beside those of `WindowAttention`, the paper's default first:

    - `text_in_window` (D2) true; false leaves the text keys out: plain cross-attention.
    - `image_positions`: RoPE positions of image keys. `frozen`: all at K, the text tokens before
      the image, or (K, K + row, K + column) for multimodal RoPE. `advance`: queries and keys count
      images too, as insertion does. `none`: images are not rotated. The paper says only that images
      take no text positions; this choice is ours. Plain cross-attention uses no positions.
    """

    name = "casa"
    options = {**WindowAttention.options, "text_in_window": True, "image_positions": "frozen"}
    choices = {**WindowAttention.choices, "image_positions": ("frozen", "advance", "none")}

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        self.text_in_window = self.fusion["text_in_window"]
        self.positions = self.fusion["image_positions"] if self.text_in_window else None
        self.leading_reads = self.history and self.text_in_window and self.placement == "replace"
        if not self.text_in_window and self.fusion["image_positions"] != "frozen":
            raise ValueError(
                f"fusion.image_positions is {self.fusion['image_positions']!r}, but "
                "cross-attention without text keys uses no positions: leave it out or set "
                "fusion.text_in_window=true"
            )
        self.check_text_is_read(self.text_in_window)
