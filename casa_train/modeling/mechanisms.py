"""The project's own fusion mechanisms: importing this file registers all of them."""

from __future__ import annotations

from .casa import Casa
from .cross_attention import CrossAttention
from .fusion import MECHANISMS, build_mechanism
from .gated import GatedCrossAttention
from .hyper import HyperAttention
from .insertion import Insertion
from .qformer import QFormerInsertion

__all__ = [
    "MECHANISMS",
    "Casa",
    "CrossAttention",
    "GatedCrossAttention",
    "HyperAttention",
    "Insertion",
    "QFormerInsertion",
    "build_mechanism",
]
