"""Text decoders that a model may stand on: one entry each, of transformers' classes and facts.

A decoder joins if its layers compute h <- h + SA(norm(h)), h <- h + FFN(norm(h)) with the children
that `block.py` uses, and its self-attention is causal over the whole sample. Gemma 3, with four
norms a layer, scales of its own and windows in five layers of six, is none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.helium import modeling_helium as helium
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5_vl
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from .configuration_casa import ALIASES, SINCE, UNTURNED, too_old

try:
    from transformers.models.smollm3 import modeling_smollm3 as smollm3
except ImportError:  # of a release before the one that `SINCE` names
    smollm3 = None


@dataclass(frozen=True)
class Backbone:
    """What a kind of text decoder is made of.

    Norms of heads are no matter of the entry: projections whose owner has a child `q_norm` or
    `k_norm` go through it (`block.project`), and fusion layers that copy them have it, too.

    :param layer: transformers' class of its layers; :param mlp: of their feed-forward networks.
    :param norm: of all its norms: x / sqrt(mean(x^2) + eps) * weight, with a `variance_epsilon`.
    :param rotation: what RoPE turns together, of `rope.ROTATIONS`.
    :param axes: of its RoPE positions; three where images have rows and columns (Qwen2.5-VL).
    :param window: the field of its configuration that narrows self-attention to a sliding window
        where it is set, beside `layer_types`, which every backbone may have.
    :param unturned: the field that says for each layer whether RoPE turns its queries and keys;
        None: it does in all.
    """

    layer: type[nn.Module]
    mlp: type[nn.Module]
    norm: type[nn.Module]
    rotation: str = "halves"
    axes: int = 1
    window: str = "use_sliding_window"
    unturned: str | None = None


BACKBONES: dict[str, Backbone] = {
    "llama": Backbone(llama.LlamaDecoderLayer, llama.LlamaMLP, llama.LlamaRMSNorm),
    "helium": Backbone(
        helium.HeliumDecoderLayer, helium.HeliumMLP, helium.HeliumRMSNorm, rotation="pairs"
    ),
    "mistral": Backbone(
        mistral.MistralDecoderLayer,
        mistral.MistralMLP,
        mistral.MistralRMSNorm,
        window="sliding_window",
    ),
    "qwen2": Backbone(qwen2.Qwen2DecoderLayer, qwen2.Qwen2MLP, qwen2.Qwen2RMSNorm),
    "qwen2_5_vl_text": Backbone(
        qwen2_5_vl.Qwen2_5_VLDecoderLayer,
        qwen2_5_vl.Qwen2MLP,
        # As transformers 5 and 4.51 name it.
        getattr(qwen2_5_vl, "Qwen2_5_VLRMSNorm", None) or qwen2_5_vl.Qwen2RMSNorm,
        axes=3,
    ),
    "qwen3": Backbone(qwen3.Qwen3DecoderLayer, qwen3.Qwen3MLP, qwen3.Qwen3RMSNorm),
}
"""By `model_type`; those that this release of transformers has."""
if smollm3 is not None:
    BACKBONES["smollm3"] = Backbone(
        smollm3.SmolLM3DecoderLayer,
        smollm3.SmolLM3MLP,
        smollm3.SmolLM3RMSNorm,
        unturned=UNTURNED,
    )


def backbone_named(model_type: str) -> Backbone:
    """The entry of a configuration's `model_type`.

    :raises ValueError: there is none, or it needs a newer release of transformers.
    """
    name = ALIASES.get(model_type, model_type)
    if name in BACKBONES:
        return BACKBONES[name]
    if name in SINCE:
        raise ValueError(too_old(name))
    raise ValueError(f"backbone {model_type!r} is not supported; choose one of {sorted(BACKBONES)}")


def turns(config: Any, index: int) -> bool:
    """Whether RoPE turns queries and keys in a layer of a backbone.

    :param config: the backbone's; :param index: the layer's.
    """
    field = backbone_named(config.model_type).unturned
    return field is None or bool(getattr(config, field)[index])
