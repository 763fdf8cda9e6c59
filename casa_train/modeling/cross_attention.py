"""Plain cross-attention, CA(x_T) = 1[T > K] MHA(x_T | y_1..y_N): text reads images alone."""

from __future__ import annotations

from typing import Any

from .fusion import register
from .window_attention import WindowAttention


@register
class CrossAttention(WindowAttention):
    """CASA without the text keys (D2), and so without positions; options in `WindowAttention`."""

    name = "cross_attention"

    def __init__(self, fusion: dict[str, Any], text_config: Any) -> None:
        super().__init__(fusion, text_config)
        self.check_text_is_read(False)
