"""Writes checkpoints of `naive_casa.py`, with config.json and names as published ones have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from data_recipes.synthetic import build_tokenizer
from tests.helpers import naive_casa

HEAD_PAIRS = (2, 3, 3)  # frequencies of a tiny head that turn by time, row and column
THETA = 5000.0  # not the default of any decoder


def write_naive(
    directory: Path,
    decoder: str = "llama",
    text_keys: bool = False,
    shared: bool = False,
    tower: str = "visual",
    change: Mapping[str, float] | None = None,
) -> Path:
    """A directory with random weights.

    :param decoder: llama, helium or qwen2_5_vl_text; :param text_keys: CASA, otherwise CA.
    :param shared: D1; :param tower: visual or enc, where the vision tower stands.
    :param change: factors of tensors by name, of what the remote code computes with only: they are
        applied once it has loaded the file.
    """
    directory.mkdir(parents=True)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    multimodal = decoder == "qwen2_5_vl_text"
    text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rms_norm_eps": 3e-5,
        "max_position_embeddings": 300,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
        "rope_theta": THETA,
    }
    if multimodal:
        text["rope_scaling"] = {"type": "mrope", "mrope_section": list(HEAD_PAIRS)}
    else:
        text["head_dim"] = 16
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "window_size": 56,  # 2x2 image tokens: the pictures hold several windows
    }
    fields = {
        "decoder": decoder,
        "text": text,
        "vision": vision,
        "text_keys": text_keys,
        "shared": shared,
        "tower": tower,
        "theta": THETA,
        "sections": HEAD_PAIRS if multimodal else None,
    }
    (directory / "naive_fields.json").write_text(json.dumps(fields))
    _write_config(directory, decoder, text, vision)
    code = Path(naive_casa.__file__).read_text()
    for name, factor in (change or {}).items():
        code = code.replace(
            "        return model.to(",
            f"        dict(model.named_parameters())[{name!r}].data.mul_({factor})\n"
            "        return model.to(",
        )
    (directory / "naive_casa.py").write_text(code)
    config = naive_casa.NaiveConfig()
    config.naive_fields = str(directory / "naive_fields.json")
    _write_values(directory, naive_casa.NaiveCasa(config))
    return directory


def _write_values(directory: Path, model: naive_casa.NaiveCasa) -> None:
    """Random values large enough that every part shows in the logits."""
    generator = torch.Generator().manual_seed(11)
    stored = {}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            stored[name] = noise / (1 if "embed_tokens" in name else parameter[0].numel() ** 0.5)
        else:
            stored[name] = 0.3 * noise + (0 if name.endswith("bias") else 1)
    save_file(stored, directory / "model.safetensors")


def _write_config(
    directory: Path, decoder: str, text: dict[str, Any], vision: dict[str, Any]
) -> None:
    """Text settings at the top; only Helium's say in a section what they are."""
    qwen = decoder == "qwen2_5_vl_text"
    of_text = {"text_config": {**text, "model_type": decoder}} if decoder == "helium" else text
    config = {
        **of_text,
        "vision_config": vision,
        "model_type": "CASA_Qwen2_5_VL_3B" if qwen else "CASA_Helium1_VL_2B",
        "architectures": ["NaiveCasa"],
        "torch_dtype": "float32",
        "auto_map": {"AutoConfig": "naive_casa.NaiveConfig", "AutoModel": "naive_casa.NaiveCasa"},
    }
    (directory / "config.json").write_text(json.dumps(config))
    settings = {"auto_map": {"AutoProcessor": "naive_casa.NaiveProcessor"}}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    kept = json.loads((directory / "tokenizer_config.json").read_text())
    kept.pop("chat_template", None)
    (directory / "tokenizer_config.json").write_text(json.dumps(kept))
    for file in ("chat_template.jinja", "chat_template.json"):
        (directory / file).unlink(missing_ok=True)
