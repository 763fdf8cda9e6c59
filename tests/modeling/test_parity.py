"""Models that must agree: casa turned into insertion, and the library's backbones with ours."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
)

from casa_train.modeling.casa import Casa
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.tiny import (
    BACKBONES,
    HARD_PACK,
    PROPERTY,
    VOCABULARY,
    Layout,
    fill,
    layouts,
    packed_inputs,
    random_image,
    tiny_model,
    tiny_text_config,
)
from tests.helpers.twins import TOWARDS_INSERTION, insertion_twins
from tests.helpers.variants import VARIANTS, case, packed_logits, shared_model

# The last ids of the tiny vocabulary; random text uses the ids before them.
VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = range(VOCABULARY - 4, VOCABULARY)


# Casa as insertion


@pytest.mark.parametrize("backbone", BACKBONES)
@settings(PROPERTY, max_examples=15)
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_casa_with_every_switch_is_insertion(backbone: str, pack: list[Layout], seed: int) -> None:
    """D1 to D5 are all that lies between CASA and token insertion."""
    inserted, turned = insertion_twins(backbone)
    samples = fill(pack, seed)
    with torch.no_grad():
        expected, found = packed_logits(inserted, samples), packed_logits(turned, samples)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("placement", "parallel"),
        ("every", 3),
        ("update_image_tokens", "none"),
        ("update_image_tokens", "ffn"),
        ("history", "window"),
        ("image_positions", "frozen"),
    ],
)
def test_every_switch_counts_on_the_way_to_insertion(
    backbone: str, switch: str, value: Any
) -> None:
    """One switch turned another way gives another model."""
    assert value != TOWARDS_INSERTION[switch]
    inserted, _ = insertion_twins(backbone)
    config = tiny_text_config(backbone, layers=3)
    turned = tiny_model("casa", text_config=config, **{**TOWARDS_INSERTION, switch: value})
    turned.load_state_dict(inserted.state_dict(), strict=True)
    samples = fill(HARD_PACK)
    with torch.no_grad():
        difference = packed_logits(turned, samples) - packed_logits(inserted, samples)
    assert difference.abs().max() > 1e-2


def test_the_turned_model_reads_images_in_its_own_layers() -> None:
    """Its stream holds text alone, and every block calls its fusion child."""
    _, turned = insertion_twins("llama")
    assert type(turned.mechanism) is Casa and not turned.mechanism.inserts
    inputs = packed_inputs(fill(HARD_PACK))
    plan = turned.mechanism.plan(inputs.chunks, None, None, torch.device("cpu"))
    assert plan.stream_index is None
    assert plan.stream_lengths == [layout.text for layout in HARD_PACK]
    calls: list[int] = []
    hooks = [
        layer.fusion.register_forward_hook(lambda module, args, out: calls.append(module.layer_idx))
        for layer in turned.model.layers
    ]
    with torch.no_grad():
        turned(packed=inputs)
    for hook in hooks:
        hook.remove()
    assert calls == [0, 1, 2]


# The library's Qwen2.5-VL


@functools.cache
def qwen_twins() -> tuple[CasaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration]:
    """Our insertion into Qwen2.5-VL's decoder, and the library's model with our weights."""
    text = tiny_text_config("qwen2_5_vl", layers=3)
    ours = tiny_model("insertion", text_config=text)
    return ours, library_qwen(ours)


def library_qwen(ours: CasaForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """The library's Qwen2.5-VL with the weights of ours."""
    text = ours.config.text_config.to_dict()
    names = ("model_type", "transformers_version", "architectures")
    values = {key: value for key, value in text.items() if key not in names}
    values |= {
        "vision_config": ours.config.vision_config.to_dict(),
        "image_token_id": IMAGE_PAD,
        "video_token_id": VIDEO_PAD,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
    }
    # Text fields at the top level: both transformers generations agree.
    config = Qwen2_5_VLConfig(**values)
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    nested = "model.language_model.norm.weight" in model.state_dict()  # not so in 4.51
    weights = {}
    for name, value in ours.state_dict().items():
        if ".fusion." in name or name.startswith("resampler."):
            continue
        if nested and name.startswith("visual."):
            name = "model." + name
        elif nested and name.startswith("model."):
            name = name.replace("model.", "model.language_model.", 1)
        weights[name] = value
    model.load_state_dict(weights, strict=True)
    return model


def qwen_layouts() -> st.SearchStrategy[tuple[list[int], list[tuple[int, int]]]]:
    """Text lengths around images, and the grids of the images."""
    grids = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3)
    return grids.flatmap(
        lambda images: st.tuples(
            st.lists(st.integers(0, 6), min_size=len(images) + 1, max_size=len(images) + 1),
            st.just(images),
        )
    )


@settings(PROPERTY, max_examples=20)
@given(layout=qwen_layouts(), seed=st.integers(0, 999))
@example(layout=([4, 3, 0, 5], [(2, 3), (5, 1), (1, 4)]), seed=0)
@example(layout=([0, 2], [(4, 4)]), seed=1)
def test_insertion_equals_the_librarys_qwen(
    layout: tuple[list[int], list[tuple[int, int]]], seed: int
) -> None:
    """Same weights, same pixels: the logits of every text token, and where the images stand."""
    ours, library = qwen_twins()
    texts, grids = layout
    generator = torch.Generator().manual_seed(seed)
    images = [random_image(generator, *grid) for grid in grids]
    pieces = [torch.randint(0, VISION_START, (n,), generator=generator) for n in texts]

    ids, points, written = [], [], []
    for piece, grid in zip(pieces, [*grids, None], strict=True):
        ids += piece.tolist()
        written += piece.tolist()
        if grid is not None:
            points.append(len(ids) + 1)
            ids += [VISION_START, VISION_END]
            written += [VISION_START, *[IMAGE_PAD] * (grid[0] * grid[1]), VISION_END]
    with torch.no_grad():
        packed = ours.pack(torch.tensor(ids), points, images)
        found = ours(packed=packed).logits
        expected = library_logits(library, torch.tensor(written), images)
    expected = expected[torch.tensor(written) != IMAGE_PAD]
    assert expected.std() > 0.3  # the tolerance is small beside what is compared
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def library_logits(
    model: Qwen2_5_VLForConditionalGeneration, ids: Tensor, images: list[Tensor]
) -> Tensor:
    """(S, vocabulary) logits of one sequence with image placeholders."""
    processor = Qwen2VLImageProcessor(do_resize=False)
    arrays = [image.permute(1, 2, 0).numpy() for image in images]
    pixels = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")
    extra = {}
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        extra["mm_token_type_ids"] = (ids == IMAGE_PAD).int()[None]
    logits: Tensor = model(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids)[None],
        pixel_values=pixels["pixel_values"],
        image_grid_thw=pixels["image_grid_thw"],
        **extra,
    ).logits[0]
    return logits


# Text alone

# Blocks without self-attention are no longer the backbone's.
WITH_SELF_ATTENTION = [case(name) for name in VARIANTS if "replace" not in name]


@functools.cache
def plain_backbone(variant: str) -> nn.Module:
    """The library's language model with the weights of a variant's backbone."""
    model = shared_model(variant, torch.float32)
    text = model.config.text_config
    if text.model_type.startswith("qwen2_5_vl"):
        return library_qwen(model)
    plain = AutoModelForCausalLM.from_config(text).eval()
    weights = {
        name: value
        for name, value in model.state_dict().items()
        if name.startswith(("model.", "lm_head.")) and ".fusion." not in name
    }
    wrong = plain.load_state_dict(weights, strict=False)
    assert not wrong.unexpected_keys
    assert not [key for key in wrong.missing_keys if "inv_freq" not in key]
    return plain


@pytest.mark.parametrize("variant", WITH_SELF_ATTENTION)
def test_text_alone_gives_the_plain_backbones_logits(variant: str) -> None:
    """Exactly: the fused layers are the backbone's own where there is no image."""
    model, plain = shared_model(variant, torch.float32), plain_backbone(variant)
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = model(input_ids=ids).logits, plain(input_ids=ids).logits
    assert torch.equal(found, expected)
