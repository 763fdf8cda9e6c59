"""The class of every vision tower; see `tower_kinds.py` for what else there is to know of each."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from .tower_kinds import TOWER_KINDS, kind_of
from .vision import VisionTower
from .vision_qwen import QwenTower
from .vision_siglip import SiglipTower

TOWERS: Mapping[str, type[VisionTower]] = {"qwen2_5_vl": QwenTower, "siglip2": SiglipTower}


def build_tower(config: PretrainedConfig) -> VisionTower:
    """The tower that a vision configuration describes.

    :raises ValueError: one of no tower that there is, or with settings that its tower has not.
    """
    kind = kind_of(config)
    (name,) = (name for name, one in TOWER_KINDS.items() if one is kind)
    return TOWERS[name](config)  # type: ignore[call-arg]
