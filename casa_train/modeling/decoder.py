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

from .activation_checkpointing import run_block
from .backbones import BACKBONES, backbone_named, turns
from .block import DecoderContext
from .fusion import FusionMechanism
from .regions import RegionMLP, compiling, normed
from .rope import ROTATIONS, STATIC_ROPE_TYPES, Rope, mrope_section, rope_settings


def backbone_rope(config: Any) -> Rope:
    """The rotation of a backbone.

    :raises ValueError: an unsupported model type.
    """
    return ROTATIONS[backbone_named(config.model_type).rotation]


def check_backbone(config: Any) -> None:
    """Refuses backbones whose layers this decoder does not reproduce.

    :raises ValueError: naming the model type or the setting.
    """
    entry, name = backbone_named(config.model_type), f"backbone {config.model_type!r}"
    _check_windows(config, entry.window, name)
    if dropout := getattr(config, "attention_dropout", 0):
        raise ValueError(
            f"{name} with attention_dropout={dropout} is not supported: attention here drops "
            "nothing. Set it to 0, which computes the same wherever nothing trains"
        )
    rope = rope_settings(config)
    kinds = sorted(kind for kind, own in rope.items() if isinstance(own, dict))
    if kinds:
        raise ValueError(
            f"{name} with RoPE settings for each of {kinds} is not supported: all layers here turn "
            "alike. Give one rope_theta and one rope_type"
        )
    rope_type = rope["rope_type"]
    if rope_type not in STATIC_ROPE_TYPES:
        raise ValueError(
            f"{name} with RoPE type {rope_type!r} is not supported; choose one of "
            f"{list(STATIC_ROPE_TYPES)}"
        )
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    if config.model_type == "helium" and heads * head_dim != width:
        raise ValueError(
            f"{name} has {heads} heads of head_dim {head_dim} and hidden_size {width}; its output "
            f"projection expects heads that fill the width: set head_dim to {width // heads}"
        )
    section = mrope_section(config)
    if entry.axes == 3 and (section is None or len(section) != 3 or 2 * sum(section) != head_dim):
        raise ValueError(
            f"{name} has mrope_section {section}; expected three numbers that add up to "
            f"{head_dim // 2}, half its head width. Set rope_scaling, for instance "
            "{type: mrope, mrope_section: [16, 24, 24]}"
        )


def _check_windows(config: Any, field: str, name: str) -> None:
    """:raises ValueError: a layer's self-attention does not see the whole sample."""
    whole = "self-attention here always sees the whole sample"
    value = getattr(config, field, None)
    if field == "sliding_window" and value is not None:
        raise ValueError(
            f"{name} with sliding_window={value} is not supported: {whole}. Set it to null, which "
            "computes the same for samples of at most so many tokens"
        )
    if value:
        raise ValueError(
            f"{name} with {field}={str(value).lower()} is not supported: {whole}; set it to false"
        )
    kinds = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if kinds:
        raise ValueError(
            f"{name} with layer_types {kinds} is not supported: {whole}; expected full_attention "
            "in every layer, or no layer_types"
        )


class FusedLayer(nn.Module):
    """The forward of a decoder layer with a child `fusion`, whatever its backbone.

    :ivar turned: whether RoPE turns queries and keys here, those of fusion, too: it attends in the
        block's own space, with its projections or with copies that begin there, and there a block
        without RoPE tells no positions apart.
    """

    turned: bool

    def forward(self, h: Tensor, images: Tensor, context: DecoderContext) -> tuple[Tensor, Tensor]:
        """One decoder block over packed tokens, as the mechanism composes it.

        :param h: (S, C) stream tokens.
        :param images: (N, C) image tokens.
        :return: both, after the block.
        """
        out: tuple[Tensor, Tensor]
        run, context = context.mechanism.run_layer, context.on(h.device)
        if not self.turned:
            context = context.without_rope()
        if context.compiler is None:  # while generating, every microsecond counts
            out = run(self, h, images, context)
        else:
            with compiling(context.compiler):
                out = run(self, h, images, context)
        return out


def _fused(kind: type, base: type, name: str) -> Any:
    """A subclass of `base` with the forward of `kind`, where pickle looks for it: in this module,
    by its name.
    """
    made = type(name, (kind, base), {"__module__": __name__})
    globals()[name] = made
    return made


FUSED: dict[type, type[FusedLayer]] = {}
# Any other class of network keeps its own forward.
FUSED_MLPS: dict[type, type[RegionMLP]] = {}
for _entry in BACKBONES.values():
    _family = _entry.layer.__name__.removesuffix("DecoderLayer")
    FUSED[_entry.layer] = _fused(FusedLayer, _entry.layer, f"Fused{_family}DecoderLayer")
    FUSED_MLPS[_entry.mlp] = _fused(RegionMLP, _entry.mlp, f"Fused{_family}MLP")


def fuse_layers(backbone: Any, mechanism: FusionMechanism) -> None:
    """Swaps the classes of every decoder layer of `backbone` and of its feed-forward network, and
    adds the mechanism's children.
    """
    for index, layer in enumerate(backbone.layers):
        layer.__class__ = FUSED[type(layer)]
        layer.mlp.__class__ = FUSED_MLPS.get(type(layer.mlp), type(layer.mlp))
        layer.turned = turns(backbone.config, index)
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
