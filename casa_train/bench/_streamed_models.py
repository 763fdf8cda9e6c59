"""The models whose streams are measured: exports, or random ones of known sizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from casa_train.export.loading import load_model, load_processor
from casa_train.io.quiet import quiet_libraries
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration

# Sizes of random models. smollm2-135m: SmolLM2-135M's with a small tower; helium1-2b: Helium1-2B's
# with the Qwen2.5-VL tower.
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=256)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2)
        | dict(out_hidden_size=64, fullatt_block_indexes=[1]),
    ),
    "small": (
        dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, vocab_size=8192)
        | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64),
        dict(depth=4, hidden_size=160, intermediate_size=428, num_heads=2)
        | dict(out_hidden_size=256, fullatt_block_indexes=[3]),
    ),
    "smollm2-135m": (
        dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=49152)
        | dict(num_attention_heads=9, num_key_value_heads=3, head_dim=64, tie_word_embeddings=True),
        dict(depth=4, hidden_size=160, intermediate_size=428, num_heads=2)
        | dict(out_hidden_size=576, fullatt_block_indexes=[3]),
    ),
    "helium1-2b": (
        dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=28, vocab_size=64000)
        | dict(num_attention_heads=16, num_key_value_heads=8, head_dim=128),
        dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
        | dict(out_hidden_size=2048, fullatt_block_indexes=[7, 15, 23, 31]),
    ),
}
MECHANISMS = ("casa", "insertion")


def load_models(
    arguments: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    labels: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Models and, of exports, their processors by the label of their columns, in eval mode; none
    ends a turn early.

    :param labels: of the exports; none: the mechanisms'.
    """
    processors: dict[str, Any] = {}
    if arguments.export:
        quiet_libraries()
        loaded = [load_model(path, dtype) for path in arguments.export]
    else:
        loaded = [random_model(name, arguments.size, device) for name in MECHANISMS]
    models: dict[str, Any] = {}
    for number, model in enumerate(loaded):
        label = labels[number] if labels else str(model.config.fusion["mechanism"])
        if label in models:
            label += f" {len(models) + 1}"
        if arguments.export:
            processors[label] = load_processor(arguments.export[number])
        model.generation_config.eos_token_id = None
        models[label] = model.to(device, dtype).eval()
    return models, processors


def random_model(mechanism: str, size: str, device: torch.device) -> CasaForConditionalGeneration:
    text, vision = SIZES[size]
    special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = CasaConfig(
        text_config={"model_type": "llama", **text, **special},
        vision_config={**vision, "window_size": 112},
        fusion={"mechanism": mechanism},
    )
    with device:
        model = CasaForConditionalGeneration(config)
    model.initialise_fusion()
    return model


def sources(models: dict[str, Any], arguments: argparse.Namespace) -> list[str]:
    """A line for each model: where it comes from, and how large it is."""
    lines = []
    for label, model in models.items():
        parameters = sum(p.numel() for p in model.parameters())
        where = model.config.name_or_path if arguments.export else f"random, {arguments.size}"
        lines.append(f"{label}: {where}, {parameters / 1e6:,.1f} M parameters")
    return lines
