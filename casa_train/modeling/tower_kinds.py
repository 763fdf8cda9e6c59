"""The vision towers there are, and what is known of each without its weights.

One entry a tower. Its class, under the same name, stands in `towers.py`; where its weights lie in
published checkpoints stands outside of this folder, which every export carries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig

# The kind of a configuration that names none: all exports were of it when there was no other.
FIRST = "qwen2_5_vl"
MERGE = 2  # SigLIP2's patches on a side of an image token: its configuration has no merge


@dataclass(frozen=True)
class TowerShape:
    """A tower's sizes, whatever its configuration calls them.

    :param ffn: inner width of the feed-forward networks; :param gated: whether they have a gate.
    :param patch: numbers in a patch of a still image; :param cell: patches of an image token.
    :param out: width of the image tokens.
    :param merger: whether two linears make an image token out of its patches, or none.
    :param window: side of an attention window in image tokens; 0: there are none.
    :param full_blocks: indices of the blocks whose attention sees the whole image.
    :param table: side of the square of learned positions; 0: positions are rotated in.
    """

    depth: int
    width: int
    ffn: int
    patch: int
    cell: int
    out: int
    gated: bool
    merger: bool
    window: int
    full_blocks: tuple[int, ...]
    table: int


@dataclass(frozen=True)
class TowerKind:
    """What a tower is known by.

    :param title: for people.
    :param config_class: of `vision_config`; :param model_types: what that calls itself.
    :param side: of the square of pixels that becomes one image token.
    :param mean: of red, green and blue in 0..1, as its image processor subtracts it.
    :param std: likewise, what it divides by.
    :param shape: configuration -> sizes.
    """

    title: str
    config_class: type[PretrainedConfig]
    model_types: tuple[str, ...]
    side: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    shape: Callable[[Any], TowerShape]


def _qwen_shape(config: Any) -> TowerShape:
    return TowerShape(
        depth=config.depth,
        width=config.hidden_size,
        ffn=config.intermediate_size,
        patch=config.in_channels * config.patch_size**2,
        cell=config.spatial_merge_size**2,
        out=config.out_hidden_size,
        gated=True,
        merger=True,
        window=config.window_size // (config.patch_size * config.spatial_merge_size),
        full_blocks=tuple(config.fullatt_block_indexes),
        table=0,
    )


def _siglip_shape(config: Any) -> TowerShape:
    cell = MERGE**2
    return TowerShape(
        depth=config.num_hidden_layers,
        width=config.hidden_size,
        ffn=config.intermediate_size,
        patch=config.num_channels * config.patch_size**2,
        cell=cell,
        out=cell * config.hidden_size,
        gated=False,
        merger=False,
        window=0,
        full_blocks=tuple(range(config.num_hidden_layers)),
        table=int(config.num_patches**0.5),
    )


TOWER_KINDS: Mapping[str, TowerKind] = {
    FIRST: TowerKind(
        title="Qwen2.5-VL",
        config_class=Qwen2_5_VLVisionConfig,
        # 4.51.3 calls the tower as it calls the whole model.
        model_types=("qwen2_5_vl", "qwen2_5_vl_vision"),
        side=28,
        # CLIP's statistics.
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        shape=_qwen_shape,
    ),
    "siglip2": TowerKind(
        title="SigLIP2",
        config_class=Siglip2VisionConfig,
        model_types=("siglip2_vision_model",),
        side=32,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        shape=_siglip_shape,
    ),
}


def name_of_kind(model_type: str | None) -> str:
    """The tower whose configuration is of this type; None: the first there was.

    :raises ValueError: a type that no tower has.
    """
    if model_type is None:
        return FIRST
    for name, kind in TOWER_KINDS.items():
        if model_type in kind.model_types:
            return name
    known = [model_type for kind in TOWER_KINDS.values() for model_type in kind.model_types]
    raise ValueError(
        f"vision_config.model_type is {model_type!r}; the vision towers there are have one of "
        f"{known}"
    )


def kind_of(config: PretrainedConfig) -> TowerKind:
    """Of a vision configuration.

    :raises ValueError: one of no tower that there is.
    """
    for kind in TOWER_KINDS.values():
        if isinstance(config, kind.config_class):
            return kind
    return TOWER_KINDS[name_of_kind(str(config.model_type))]


def tower_shape(config: PretrainedConfig) -> TowerShape:
    """The sizes of the tower that a vision configuration describes."""
    return kind_of(config).shape(config)


def vision_config_of(values: Mapping[str, Any]) -> PretrainedConfig:
    """A vision configuration out of a dict, whose `model_type` picks the tower.

    :raises ValueError: a type that no tower has.
    """
    kind = TOWER_KINDS[name_of_kind(values.get("model_type"))]
    return kind.config_class(**{k: v for k, v in values.items() if k != "model_type"})
