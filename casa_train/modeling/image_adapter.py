"""From the width of image tokens to that of text: a linear, or two with GELU between them."""

from __future__ import annotations

from torch import nn

ADAPTERS = ("linear", "mlp")


def build_adapter(kind: str, inputs: int, outputs: int) -> nn.Module:
    """(N, inputs) -> (N, outputs).

    :param kind: `linear`: stands only where the widths differ; `mlp`: always, as in LLaVA-1.5
        (arXiv 2310.03744): linear, exact GELU, linear of the text's width.
    :raises ValueError: another kind.
    """
    if kind not in ADAPTERS:
        raise ValueError(f"adapter is {kind!r}; choose one of {list(ADAPTERS)}")
    if kind == "mlp":
        return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))
    return nn.Identity() if inputs == outputs else nn.Linear(inputs, outputs)
