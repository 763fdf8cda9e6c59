"""Hugging Face decoder layers as weight containers, with our own forward and our own loop.

The class of each layer is swapped for a subclass with a child `fusion` and a forward over packed
tokens. Parameter names stay the backbone's, and without images the logits equal the plain
backbone's. The library's own forward is not used because its masks are dense in the packed length
and its signatures differ between releases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.helium.modeling_helium import HeliumDecoderLayer, HeliumMLP
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2MLP
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2MLP as Qwen2_5_VLMLP

from .activation_checkpointing import run_block
from .block import DecoderContext
from .fusion import FusionMechanism
from .regions import RegionMLP, compiling, normed
from .rope import (
    STATIC_ROPE_TYPES,
    Rope,
    RotateHalves,
    RotatePairs,
    mrope_section,
    rope_settings,
)

# Backbones by model_type; the decoder layers of each have the children that `block.py` uses.
BACKBONES: dict[str, Rope] = {
    "llama": RotateHalves(),
    "helium": RotatePairs(),
    "qwen2": RotateHalves(),
    "qwen2_5_vl_text": RotateHalves(),
}
# transformers 4.51.3 knows Qwen2.5-VL's text decoder by the name of the whole model.
ALIASES = {"qwen2_5_vl": "qwen2_5_vl_text"}


def backbone_rope(config: Any) -> Rope:
    """The rotation of a backbone.

    :raises ValueError: an unsupported model type.
    """
    name = ALIASES.get(config.model_type, config.model_type)
    if name not in BACKBONES:
        raise ValueError(
            f"backbone {config.model_type!r} is not supported; choose one of {sorted(BACKBONES)}"
        )
    return BACKBONES[name]


def check_backbone(config: Any) -> None:
    """Refuses backbones whose layers this decoder does not reproduce.

    :raises ValueError: naming the model type or the setting.
    """
    backbone_rope(config)
    if getattr(config, "use_sliding_window", False):
        raise ValueError(
            f"backbone {config.model_type!r} with use_sliding_window=true is not supported: "
            "self-attention here always sees the whole sample; set it to false"
        )
    rope_type = rope_settings(config)["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"backbone {config.model_type!r} with RoPE type {rope_type!r} is not supported; "
            f"choose one of {list(STATIC_ROPE_TYPES)}"
        )
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    if config.model_type == "helium" and heads * head_dim != width:
        raise ValueError(
            f"backbone 'helium' has {heads} heads of head_dim {head_dim} and hidden_size {width}; "
            f"its output projection expects heads that fill the width: set head_dim to "
            f"{width // heads}"
        )
    section = mrope_section(config)
    multimodal = ALIASES.get(config.model_type, config.model_type) == "qwen2_5_vl_text"
    if multimodal and (section is None or len(section) != 3 or 2 * sum(section) != head_dim):
        raise ValueError(
            f"backbone {config.model_type!r} has mrope_section {section}; expected three numbers "
            f"that add up to {head_dim // 2}, half its head width. Set rope_scaling, for instance "
            "{type: mrope, mrope_section: [16, 24, 24]}"
        )


class FusedLayer(nn.Module):
    """The forward of a decoder layer with a child `fusion`, whatever its backbone."""

    def forward(self, h: Tensor, images: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor]:
        """One decoder block over packed tokens, as the mechanism composes it.

        :param h: (S, C) stream tokens.
        :param images: (N, C) image tokens.
        :return: both, after the block.
        """
        out: tuple[Tensor, Tensor]
        run, context = context.mechanism.run_layer, context.on(h.device)
        if context.compiler is None:  # while generating, every microsecond counts
            out = run(self, h, images, context)
        else:
            with compiling(context.compiler):
                out = run(self, h, images, context)
        return out


# Written out, because pickle finds a class by its name in its module.
class FusedLlamaDecoderLayer(FusedLayer, LlamaDecoderLayer): ...


class FusedHeliumDecoderLayer(FusedLayer, HeliumDecoderLayer): ...


class FusedQwen2DecoderLayer(FusedLayer, Qwen2DecoderLayer): ...


class FusedQwen2_5_VLDecoderLayer(FusedLayer, Qwen2_5_VLDecoderLayer): ...


class FusedLlamaMLP(RegionMLP, LlamaMLP): ...


class FusedHeliumMLP(RegionMLP, HeliumMLP): ...


class FusedQwen2MLP(RegionMLP, Qwen2MLP): ...


class FusedQwen2_5_VLMLP(RegionMLP, Qwen2_5_VLMLP): ...


FUSED: dict[type, type[FusedLayer]] = {
    LlamaDecoderLayer: FusedLlamaDecoderLayer,
    HeliumDecoderLayer: FusedHeliumDecoderLayer,
    Qwen2DecoderLayer: FusedQwen2DecoderLayer,
    Qwen2_5_VLDecoderLayer: FusedQwen2_5_VLDecoderLayer,
}
# Any other class of network keeps its own forward.
FUSED_MLPS: dict[type, type[RegionMLP]] = {
    LlamaMLP: FusedLlamaMLP,
    HeliumMLP: FusedHeliumMLP,
    Qwen2MLP: FusedQwen2MLP,
    Qwen2_5_VLMLP: FusedQwen2_5_VLMLP,
}


def fuse_layers(backbone: Any, mechanism: FusionMechanism) -> None:
    """Swaps the classes of every decoder layer of `backbone` and of its feed-forward network, and
    adds the mechanism's children.
    """
    for index, layer in enumerate(backbone.layers):
        layer.__class__ = FUSED[type(layer)]
        layer.mlp.__class__ = FUSED_MLPS.get(type(layer.mlp), type(layer.mlp))
        layer.fusion = mechanism.make_layer(layer, index)
    # RoPE tables are computed here; the library's module would only carry a buffer along.
    del backbone.rotary_emb


def run_decoder(
    backbone: Any,
    text: Tensor,
    images: Tensor,
    context: DecoderContext,
    checkpointed: bool = False,
    states: list[Tensor] | None = None,
) -> Tensor:
    """Runs the fused layers and the final norm.

    :param text: (T, C) text embeddings.
    :param images: (N, C) image tokens.
    :param checkpointed: layers keep their inputs only and run again in the backward pass.
    :param states: takes what enters each layer and what is returned, (T, C) each.
    :return: (T, C) hidden states of the text tokens.
    """
    plan = context.plan

    def of_text(h: Tensor) -> Tensor:
        return h if plan.text_index is None else h.index_select(0, plan.text_index.to(h.device))

    h = text
    if plan.stream_index is not None:
        h = torch.cat([text, images.to(text.device)]).index_select(0, plan.stream_index)
    for layer in backbone.layers:
        if states is not None:
            states.append(of_text(h))
        h, images = run_block(layer, h, images, context, checkpointed=checkpointed)
    out = normed(backbone.norm, of_text(h))
    if states is not None:
        states.append(out)
    return out
