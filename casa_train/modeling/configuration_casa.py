"""CasaConfig: backbone, vision tower and fusion switches of one model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from .tower_kinds import vision_config_of

# Qwen2.5-VL's text decoder; transformers 4.51.3 has one configuration for the whole model.
QWEN_TEXT, QWEN_WHOLE = "qwen2_5_vl_text", "qwen2_5_vl"
QWEN_NOT_TEXT = ("text_config", "vision_config", "image_token_id", "video_token_id")
# It knows Qwen2.5-VL's text decoder by the name of the whole model.
ALIASES = {QWEN_WHOLE: QWEN_TEXT}
ROPE_IN_ONE_DICT = int(transformers.__version__.split(".")[0]) >= 5
# The oldest release of transformers that exports run on, and backbones that came with later ones.
OLDEST = "4.51.3"
SINCE = {"smollm3": "4.53"}
# Their field that says for each layer whether it has RoPE.
UNTURNED = "no_rope_layers"


class CasaConfig(PretrainedConfig):
    """Configuration of `CasaForConditionalGeneration`.

    :param text_config: a backbone configuration (or its dict with `model_type`).
    :param vision_config: a vision tower's (or its dict, whose `model_type` picks the tower; without
        one it is Qwen2.5-VL's); see `tower_kinds.py`.
    :param fusion: `{"mechanism": name, option: value, ...}`; see the mechanism's class.
    :param pre_image_tokens: ids that the chat template has before an image; `post_image_tokens`
        after it.
    :param adapter: from image tokens to the text's width: `linear`, which stands only where the
        widths differ, or `mlp`, two linears with GELU between them.
    :param answer_end_token: the id that ends an answer there; None where it is not known.
    :param kept_adapter: the folder beside the weights that holds the adapters (LoRA) they were
        trained with; None where there are none, or merged ones.
    """

    model_type = "casa_vlm"
    # What a Trainer's evaluation leaves out of the predictions it gathers.
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: PretrainedConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        fusion: dict[str, Any] | None = None,
        pre_image_tokens: Sequence[int] = (),
        post_image_tokens: Sequence[int] = (),
        answer_end_token: int | None = None,
        adapter: str = "linear",
        kept_adapter: str | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:
            text_config = AutoConfig.for_model("llama")
        elif isinstance(text_config, dict):
            text_config = _text_config(text_config)
        if vision_config is None or isinstance(vision_config, dict):
            vision_config = vision_config_of(vision_config or {})
        self.text_config = text_config
        self.vision_config = vision_config
        self.fusion = dict(fusion or {"mechanism": "casa"})
        self.pre_image_tokens = list(pre_image_tokens)
        self.post_image_tokens = list(post_image_tokens)
        self.answer_end_token = answer_end_token
        self.adapter = adapter
        self.kept_adapter = kept_adapter
        # The library reads tying and special tokens at the top level.
        for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """As the library's, with RoPE written in the words of both transformers generations."""
        out: dict[str, Any] = super().to_dict()
        text = out["text_config"]
        if isinstance(text, dict):
            text |= rope_apart(text)
        if isinstance(text, dict) and text.get("model_type") == QWEN_WHOLE:
            text["model_type"] = QWEN_TEXT
            for name in QWEN_NOT_TEXT:
                text.pop(name, None)
        return out


def rope_apart(values: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` of transformers 5 says of RoPE, in the words of transformers 4:
    `rope_theta`, where it is there, and `rope_scaling`; nothing where it says nothing.

    :param values: a backbone's configuration.
    """
    rope = dict(values.get("rope_parameters") or {})
    if any(isinstance(value, Mapping) for value in rope.values()):
        return {}  # Gemma 3, refused later on, has one for each kind of layer
    found = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    if rope or found:
        found["rope_scaling"] = None if rope in ({}, {"rope_type": "default"}) else rope
    return found


def _text_config(values: dict[str, Any]) -> PretrainedConfig:
    """A backbone's configuration, whichever transformers generation wrote it.

    :raises ValueError: a backbone that came with a later release, or too few layers' RoPE.
    """
    values = dict(values)
    if values.get("rope_parameters"):
        if not ROPE_IN_ONE_DICT:
            values |= rope_apart(values)
        for name in ("rope_theta", "rope_scaling") if ROPE_IN_ONE_DICT else ("rope_parameters",):
            values.pop(name, None)
    model_type = values.pop("model_type")
    if model_type in SINCE and model_type not in CONFIG_MAPPING:
        raise ValueError(too_old(model_type))
    turned, depth = values.get(UNTURNED), values.get("num_hidden_layers")
    if turned is not None and depth is not None and len(turned) < depth:
        raise ValueError(
            f"backbone {model_type!r} has {UNTURNED} {turned}; expected a number for each of its "
            f"{depth} layers, 0 where it has no RoPE. Give so many, or leave it out: then every "
            "fourth has none"
        )
    if model_type in (QWEN_WHOLE, QWEN_TEXT):
        model_type = QWEN_TEXT if QWEN_TEXT in CONFIG_MAPPING else QWEN_WHOLE
        for name in QWEN_NOT_TEXT:
            values.pop(name, None)
    return AutoConfig.for_model(model_type, **values)


def too_old(model_type: str) -> str:
    """What to say of a backbone of `SINCE` that this release of transformers lacks."""
    return (
        f"backbone {model_type!r} needs transformers {SINCE[model_type]} or newer, this is "
        f"{transformers.__version__}: install a newer one"
    )
