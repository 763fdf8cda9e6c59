"""Every fusion mechanism with its switches, as tiny models, and what tests do with them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.reference import Reference, Token, reference, sample_tokens
from tests.helpers.tiny import (
    CONFIGS,
    VOCABULARY,
    Layout,
    Sample,
    packed_inputs,
    reference_settings,
    tiny_model,
    tiny_text_config,
)

# The switches of casa and cross_attention, defaults first. `context` stands for `history` and
# `window_scope`, which exclude each other.
SWITCHES: dict[str, tuple[Any, ...]] = {
    "mechanism": ("casa", "cross_attention"),
    "share_parameters": (False, True),
    "placement": ("parallel", "before", "after", "replace"),
    "every": (1, 2),
    "update_image_tokens": ("none", "ffn", "ffn_and_attention"),
    "context": ("window", "all_frames", "all"),
    "image_positions": ("frozen", "advance", "none"),
    "backbone": ("llama", "helium", "qwen2_5_vl", "biased"),
}
CONTEXTS = {"window": {}, "all_frames": {"window_scope": "all_frames"}, "all": {"history": "all"}}
# Llama's option gives all four projections a bias; Qwen's backbones have none on the output.
BACKBONES: dict[str, dict[str, Any]] = {"biased": {"backbone": "llama", "attention_bias": True}}


def allowed(switches: Mapping[str, Any]) -> bool:
    """Whether a combination is one that the model takes."""
    plain = switches["mechanism"] == "cross_attention"
    if plain and switches["image_positions"] != "frozen":
        return False
    # No text token would ever see another.
    return not (plain and switches["placement"] == "replace" and switches["every"] == 1)


def pairwise() -> list[dict[str, Any]]:
    """Few combinations in which every allowed pair of values occurs, the defaults first."""
    names = list(SWITCHES)
    combinations = [dict(zip(names, c, strict=True)) for c in itertools.product(*SWITCHES.values())]
    pairs: dict[Any, int] = {}  # each pair of values as one bit

    def bits(combination: dict[str, Any]) -> int:
        items = itertools.combinations(combination.items(), 2)
        return sum({1 << pairs.setdefault(pair, len(pairs)) for pair in items})

    covers = [(bits(c), c) for c in combinations if allowed(c)]
    missing = (1 << len(pairs)) - 1
    chosen = []
    while missing:
        best, combination = max(covers, key=lambda cover: (cover[0] & missing).bit_count())
        chosen.append(combination)
        missing &= ~best
    return chosen


def named(combination: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A combination's name, which lists what is no default, and its options for `build`."""
    changed = {k: v for k, v in combination.items() if v != SWITCHES[k][0] and k != "mechanism"}
    words = {"share_parameters": "shared", "every": f"every{combination['every']}"}
    name = "-".join([combination["mechanism"], *(words.get(k, str(v)) for k, v in changed.items())])
    options = {"mechanism": combination["mechanism"], **changed}
    options |= CONTEXTS[options.pop("context", "window")]
    if combination["every"] == 2:
        options["blocks"] = 4  # so that image tokens updated in one block are read in another
    return name, options


# Every pair of switches of casa and cross_attention, what the paper ran, and other mechanisms.
VARIANTS: dict[str, dict[str, Any]] = {
    **dict(named(combination) for combination in pairwise()),
    "casa-advance": {"mechanism": "casa", "image_positions": "advance"},
    "casa-none": {"mechanism": "casa", "image_positions": "none"},
    "casa-qwen2": {"mechanism": "casa", "backbone": "qwen2"},
    "casa-qwen2_5_vl": {"mechanism": "casa", "backbone": "qwen2_5_vl"},
    "casa-shared-biased": {"mechanism": "casa", "share_parameters": True, "backbone": "biased"},
    "casa-replace-every2": {"mechanism": "casa", "placement": "replace", "every": 2, "blocks": 4},
    "casa-replace-all": {"mechanism": "casa", "placement": "replace", "history": "all"},
    "cross_attention": {"mechanism": "cross_attention"},
    "cross_attention-shared": {"mechanism": "cross_attention", "share_parameters": True},
    "cross_attention-ffn": {"mechanism": "cross_attention", "update_image_tokens": "ffn"},
    "insertion": {"mechanism": "insertion"},
    "insertion-qwen2": {"mechanism": "insertion", "backbone": "qwen2"},
    "insertion-helium": {"mechanism": "insertion", "backbone": "helium"},
    "insertion-qwen2_5_vl": {"mechanism": "insertion", "backbone": "qwen2_5_vl"},
    "qformer_insertion": {"mechanism": "qformer_insertion", "queries": 3},
    "qformer_insertion-qwen2_5_vl": {
        "mechanism": "qformer_insertion",
        "queries": 2,
        "layers": 1,
        "heads": 4,
        "ffn_width": 72,
        "backbone": "qwen2_5_vl",
    },
    "gated_cross_attention": {"mechanism": "gated_cross_attention"},
    "gated_cross_attention-every2-biased": {
        "mechanism": "gated_cross_attention",
        "every": 2,
        "ffn_width": 40,
        "blocks": 4,
        "backbone": "biased",
    },
    "gated_cross_attention-qwen2_5_vl": {
        "mechanism": "gated_cross_attention",
        "backbone": "qwen2_5_vl",
    },
    "hyper_attention": {"mechanism": "hyper_attention"},
    "hyper_attention-spread": {"mechanism": "hyper_attention", "blocks": 6, "backbone": "helium"},
    "hyper_attention-qwen2_5_vl": {
        "mechanism": "hyper_attention",
        "layers": [1, 2],
        "blocks": 4,
        "backbone": "qwen2_5_vl",
    },
    "hyper_attention-biased": {"mechanism": "hyper_attention", "backbone": "biased"},
}
# Norms of heads (Qwen3), blocks without RoPE (SmolLM3): what reads images has and does the same.
# Each mechanism on both, and the switches that say whose projections those are.
VARIANTS |= {
    "casa-qwen3": {
        "mechanism": "casa",
        "update_image_tokens": "ffn_and_attention",
        "backbone": "qwen3",
    },
    "casa-shared-qwen3": {"mechanism": "casa", "share_parameters": True, "backbone": "qwen3"},
    "casa-replace-all-qwen3": {**VARIANTS["casa-replace-all"], "backbone": "qwen3"},
    "cross_attention-before-qwen3": {
        "mechanism": "cross_attention",
        "placement": "before",
        "backbone": "qwen3",
    },
    "qformer_insertion-qwen3": {**VARIANTS["qformer_insertion"], "backbone": "qwen3"},
    "gated_cross_attention-qwen3": {"mechanism": "gated_cross_attention", "backbone": "qwen3"},
    "hyper_attention-qwen3": {"mechanism": "hyper_attention", "backbone": "qwen3"},
    "casa-llama3": {"mechanism": "casa", "backbone": "llama3"},
    "casa-mistral": {"mechanism": "casa", "backbone": "mistral"},
}
if "smollm3" in CONFIGS:
    VARIANTS |= {
        "casa-smollm3": {"mechanism": "casa", "backbone": "smollm3", "blocks": 4},
        "casa-shared-advance-smollm3": {
            "mechanism": "casa",
            "share_parameters": True,
            "image_positions": "advance",
            "backbone": "smollm3",
        },
        "casa-replace-every2-smollm3": {**VARIANTS["casa-replace-every2"], "backbone": "smollm3"},
        "cross_attention-smollm3": {"mechanism": "cross_attention", "backbone": "smollm3"},
        "insertion-smollm3": {"mechanism": "insertion", "backbone": "smollm3"},
        "qformer_insertion-smollm3": {**VARIANTS["qformer_insertion"], "backbone": "smollm3"},
        "gated_cross_attention-smollm3": {
            "mechanism": "gated_cross_attention",
            "backbone": "smollm3",
        },
        "hyper_attention-smollm3": {"mechanism": "hyper_attention", "backbone": "smollm3"},
    }
MECHANISMS = sorted({variant["mechanism"] for variant in VARIANTS.values()})
# For daily work every mechanism, and one model each with parameters of the backbone, without
# self-attention, with positions of three axes and with image tokens that change.
DAILY = {*MECHANISMS, "casa-shared-biased", "casa-replace-every2", "casa-qwen2_5_vl"}
DAILY |= {"cross_attention-ffn", "casa-qwen3"}
DAILY |= {"casa-smollm3"} & VARIANTS.keys()


def case(variant: str, *values: Any) -> Any:
    """A variant, and other values behind it, as a test's parameters; most variants are slow."""
    return pytest.param(variant, *values, marks=[] if variant in DAILY else pytest.mark.slow)


every_variant = pytest.mark.parametrize("variant", [case(variant) for variant in VARIANTS])
every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)


def build(variant: str, **options: Any) -> CasaForConditionalGeneration:
    """A new model of a variant; `options` are those of `tiny_model`."""
    values = {"blocks": 2, "backbone": "llama", **VARIANTS[variant], **options}
    backbone = values.pop("backbone")
    text = {"backbone": backbone, **BACKBONES.get(backbone, {})}
    config = tiny_text_config(layers=values.pop("blocks"), **text)
    return tiny_model(text_config=config, **values)


@functools.cache
def shared_model(variant: str, dtype: torch.dtype = torch.float64) -> CasaForConditionalGeneration:
    """One model a variant for tests that do not change it."""
    return build(variant, dtype=dtype)


def inserts(variant: str) -> bool:
    """Whether images stand in the text stream."""
    return VARIANTS[variant]["mechanism"].endswith("insertion")


def reference_of(
    model: CasaForConditionalGeneration,
    sample: Sample,
    state: Mapping[str, Tensor] | None = None,
    images: list[Tensor] | None = None,
) -> Reference:
    """The reference for one sample.

    :param state: parameters to differentiate by; the model's own if left out.
    :param images: tokens of each image; through the model's tower, one by one, if left out.
    """
    if images is None:
        with torch.no_grad():
            images = [model.visual([image]) for image in sample.images]
    return reference(
        model.state_dict() if state is None else state,
        reference_settings(model),
        sample.ids.tolist(),
        sample.layout.points,
        images,
        sample.layout.rows,
        sample.layout.follows,
    )


def packed_logits(model: CasaForConditionalGeneration, samples: list[Sample]) -> Tensor:
    """(T, vocabulary) logits of a pack."""
    logits: Tensor = model(packed=packed_inputs(samples)).logits
    return logits


def gradients_of(model: CasaForConditionalGeneration) -> dict[str, Tensor]:
    """A copy of every parameter's gradient, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_gradients_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Every gradient to 1e-8 of its size."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (found[name] - gradient).abs().max()
        assert error <= 1e-8 * (1 + gradient.abs().max()), (name, float(error))


def tokens_of(layout: Layout) -> list[Token]:
    """The tokens of a sample, by the reference's definition."""
    return sample_tokens(
        layout.text, layout.points, layout.image_tokens, layout.rows, layout.follows
    )


def text_tokens(layout: Layout) -> list[Token]:
    """The text tokens of a sample, with their windows."""
    return [token for token in tokens_of(layout) if token.kind == "text"]


def changed_rows(a: Tensor, b: Tensor) -> list[int]:
    """Rows in which two results differ at all."""
    return (a != b).any(1).nonzero().flatten().tolist()


def with_token(samples: list[Sample], index: int, t: int) -> list[Sample]:
    """The samples with another id at text token t of sample `index`."""
    ids = samples[index].ids.clone()
    ids[t] = (ids[t] + 1) % VOCABULARY
    changed = Sample(samples[index].layout, ids, samples[index].images)
    return [*samples[:index], changed, *samples[index + 1 :]]


def with_image(samples: list[Sample], index: int, i: int) -> list[Sample]:
    """The samples with the negative of image i of sample `index`."""
    images = list(samples[index].images)
    images[i] = 255 - images[i]
    changed = Sample(samples[index].layout, samples[index].ids, images)
    return [*samples[:index], changed, *samples[index + 1 :]]


def follows_of(layout: Layout) -> list[bool]:
    """For each image whether it follows the one before it."""
    return list(layout.follows or [False] * len(layout.points))


def padded_batch(samples: list[Sample], left: bool = True) -> dict[str, Any]:
    """The samples as a padded batch in Hugging Face's keywords; the padding is not id 0."""
    width = max(len(sample.ids) for sample in samples)
    ids = torch.full((len(samples), width), VOCABULARY - 1)
    mask = torch.zeros_like(ids)
    points = []
    for row, sample in enumerate(samples):
        start = width - len(sample.ids) if left else 0
        ids[row, start : start + len(sample.ids)] = sample.ids
        mask[row, start : start + len(sample.ids)] = 1
        points.append([start + point for point in sample.layout.points])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "image_embeds_insertion_points": points,
        "image_follows": [follows_of(sample.layout) for sample in samples],
        "pixel_values": [image for sample in samples for image in sample.images],
    }
