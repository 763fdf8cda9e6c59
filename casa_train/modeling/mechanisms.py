"""The registry of fusion mechanisms: name in the configuration -> class."""

from __future__ import annotations

from typing import Any

from .casa import Casa, CrossAttention
from .fusion import FusionMechanism
from .gated import GatedCrossAttention
from .hyper import HyperAttention
from .insertion import Insertion
from .qformer import QFormerInsertion

MECHANISMS: dict[str, type[FusionMechanism]] = {
    mechanism.name: mechanism
    for mechanism in (
        Casa,
        CrossAttention,
        Insertion,
        QFormerInsertion,
        GatedCrossAttention,
        HyperAttention,
    )
}


def build_mechanism(fusion: dict[str, Any], text_config: Any) -> FusionMechanism:
    """The mechanism that `fusion["mechanism"]` names, with its options.

    :raises ValueError: unknown mechanism or option.
    """
    name = fusion.get("mechanism")
    if name not in MECHANISMS:
        raise ValueError(
            f"fusion mechanism {name!r} is unknown; choose one of {sorted(MECHANISMS)}"
        )
    return MECHANISMS[name](fusion, text_config)
