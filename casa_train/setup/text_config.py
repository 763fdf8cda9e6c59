"""The text decoder's configuration out of that of a checkpoint which holds more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from casa_train.errors import UserError

# A text decoder's special tokens; Qwen2.5-VL's configuration holds others beside them.
TEXT_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Exports of this project, see `CasaConfig`.
EXPORT = "casa_vlm"


def backbone_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's configuration out of a checkpoint's.

    Qwen2.5-VL's holds it beside the vision tower's: at the top level, or as `text_config` where
    newer releases of transformers wrote it. That of an export of this project is its text model.

    :raises UserError: an export whose decoder does not work alone.
    """
    if config.get("model_type") == EXPORT:
        return _text_of_export(config)
    if config.get("model_type") != "qwen2_5_vl":
        return dict(config)
    nested = config.get("text_config") or {}
    text = {**config, **nested}
    # Releases before 5.0 tie inside of text_config, later ones beside it.
    text["tie_word_embeddings"] = any(c.get("tie_word_embeddings") for c in (config, nested))
    for name in list(text):
        if name.endswith(("_config", "_token_id")) and name not in TEXT_TOKENS:
            del text[name]
    return {**text, "model_type": "qwen2_5_vl_text"}


def _text_of_export(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of token insertion alone, whose decoder is a plain backbone.

    :raises UserError: another mechanism, or adapters that are not merged.
    """
    mechanism = (config.get("fusion") or {}).get("mechanism")
    if mechanism != "insertion" or config.get("kept_adapter") is not None:
        kept = "" if config.get("kept_adapter") is None else " with adapters that are not merged"
        raise UserError(
            f"model.backbone.pretrained is an export of this project with the mechanism "
            f"{mechanism!r}{kept}; expected token insertion's, merged, whose decoder works without "
            "its mechanism. To go on from the whole model set model.init_from instead."
        )
    return dict(config["text_config"])
