"""The whole model against the independent reference, packed, padded, streamed and step by step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    HeliumForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from casa_train.modeling.block import project_out
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.reference import Reference, reference, sample_tokens
from tests.tiny import (
    HARD_PACK,
    PROPERTY,
    VOCABULARY,
    Layout,
    Sample,
    fill,
    layouts,
    packed_inputs,
    random_image,
    reference_settings,
    sample_layouts,
    tiny_model,
    tiny_text_config,
)

MECHANISMS = ("casa", "cross_attention", "insertion")
# Every mechanism with every choice of image positions.
VARIANTS: dict[str, dict[str, Any]] = {
    "casa-frozen": {"mechanism": "casa"},
    "casa-advance": {"mechanism": "casa", "image_positions": "advance"},
    "casa-none": {"mechanism": "casa", "image_positions": "none"},
    "cross_attention": {"mechanism": "cross_attention"},
    "insertion": {"mechanism": "insertion"},
}
PLAIN: dict[str, type[PreTrainedModel]] = {
    "llama": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "helium": HeliumForCausalLM,
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
without_insertion = pytest.mark.parametrize("mechanism", MECHANISMS[:2])


@functools.cache
def shared_model(
    variant: str, layers: int = 2, dtype: torch.dtype = torch.float64
) -> CasaForConditionalGeneration:
    """One model a variant for tests that do not change it."""
    return tiny_model(layers=layers, dtype=dtype, **VARIANTS[variant])


def default_variant(mechanism: str) -> str:
    """The variant of a mechanism without further options."""
    return "casa-frozen" if mechanism == "casa" else mechanism


@torch.no_grad()
def reference_of(model: CasaForConditionalGeneration, sample: Sample) -> Reference:
    """The reference for one sample; each image goes through the tower by itself."""
    images = [model.visual([image]) for image in sample.images]
    return reference(
        model.state_dict(),
        reference_settings(model),
        sample.ids.tolist(),
        sample.layout.points,
        images,
    )


def packed_logits(model: CasaForConditionalGeneration, samples: list[Sample]) -> Tensor:
    """(T, vocabulary) logits of a pack."""
    logits: Tensor = model(packed=packed_inputs(samples)).logits
    return logits


def fusion_outputs(model: CasaForConditionalGeneration, samples: list[Sample]) -> list[Tensor]:
    """(T, C) for every layer: what its `fusion` child adds for a pack."""
    outputs: list[Tensor] = []
    hooks = [
        layer.fusion.register_forward_hook(
            lambda module, args, out: outputs.append(
                project_out(module.o_proj, out[0], args[-1].plan.cross)
            )
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        packed_logits(model, samples)
    for hook in hooks:
        hook.remove()
    return outputs


def windows_of_text(layout: Layout) -> list[int | None]:
    """The window of every text token of a sample, by the reference's definition."""
    tokens = sample_tokens(layout.text, layout.points, layout.image_tokens)
    return [token.window for token in tokens if token.kind == "text"]


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


# Against the reference


@every_variant
@PROPERTY
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_float64_logits_equal_the_reference(variant: str, pack: list[Layout], seed: int) -> None:
    model, samples = shared_model(variant), fill(pack, seed)
    with torch.no_grad():
        found = packed_logits(model, samples)
    expected = torch.cat([reference_of(model, sample).logits for sample in samples])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@every_variant
@settings(PROPERTY, max_examples=8)
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_float32_logits_equal_the_reference(variant: str, pack: list[Layout], seed: int) -> None:
    """The model as users run it, with the backbone's own norms."""
    model, samples = shared_model(variant, dtype=torch.float32), fill(pack, seed)
    with torch.no_grad():
        found = packed_logits(model, samples).double()
    expected = torch.cat([reference_of(model, sample).logits for sample in samples])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "insertion"])
@PROPERTY
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_fusion_outputs_equal_the_reference(variant: str, pack: list[Layout], seed: int) -> None:
    """Layer by layer, and exactly zero where text has no window."""
    model, samples = shared_model(variant), fill(pack, seed)
    found = fusion_outputs(model, samples)
    references = [reference_of(model, sample) for sample in samples]
    windows = [window for layout in pack for window in windows_of_text(layout)]
    alone = torch.tensor([window is None for window in windows])
    for n, out in enumerate(found):
        expected = torch.cat([r.fusion[n] for r in references])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        assert (out[alone] == 0).all()
        assert (out[~alone] != 0).any(1).all()


@every_mechanism
@pytest.mark.parametrize("backbone", ["qwen2", "llama"])
def test_biases_are_used_and_leave_text_without_a_window_at_zero(
    backbone: str, mechanism: str
) -> None:
    """Qwen2 has biases on q, k and v; Llama's option adds one to the output projection too."""
    options = {"attention_bias": True} if backbone == "llama" else {}
    config = tiny_text_config(backbone, **options)
    model = tiny_model(mechanism, text_config=config, dtype=torch.float64)
    assert "model.layers.0.self_attn.k_proj.bias" in model.state_dict()
    samples = fill(HARD_PACK)
    with torch.no_grad():
        found = packed_logits(model, samples)
    references = [reference_of(model, sample) for sample in samples]
    expected = torch.cat([r.logits for r in references])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    if mechanism != "insertion":
        alone = [w is None for layout in HARD_PACK for w in windows_of_text(layout)]
        assert all((out[torch.tensor(alone)] == 0).all() for out in fusion_outputs(model, samples))


@every_mechanism
def test_an_adapter_joins_towers_of_another_width(mechanism: str) -> None:
    model = tiny_model(mechanism, vision_width=40, dtype=torch.float64)
    assert "adapter.weight" in model.state_dict()
    samples = fill(HARD_PACK)
    with torch.no_grad():
        found = packed_logits(model, samples)
    expected = torch.cat([reference_of(model, sample).logits for sample in samples])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_casa_without_text_keys_is_cross_attention() -> None:
    """D2 off gives the mechanism of its own name."""
    samples = fill(HARD_PACK)
    with torch.no_grad():
        switched = packed_logits(tiny_model("casa", text_in_window=False), samples)
        named = packed_logits(tiny_model("cross_attention"), samples)
    assert torch.equal(switched, named)


# Packed, padded and alone


@every_variant
@settings(PROPERTY, max_examples=15)
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_pack_equals_samples_alone(variant: str, pack: list[Layout], seed: int) -> None:
    """Logits, and the gradients of every parameter, the tower's included."""
    model, samples = shared_model(variant), fill(pack, seed)
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(layout.text for layout in pack), VOCABULARY)
    weights = torch.randn(shape, generator=generator, dtype=torch.float64)

    model.zero_grad(set_to_none=True)
    together = packed_logits(model, samples)
    (together * weights).sum().backward()
    packed_gradients = gradients_of(model)

    model.zero_grad(set_to_none=True)
    alone = []
    for sample, part in zip(samples, weights.split([layout.text for layout in pack]), strict=True):
        logits = packed_logits(model, [sample])
        (logits * part).sum().backward()
        alone.append(logits)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    for name, gradient in gradients_of(model).items():
        error = (packed_gradients[name] - gradient).abs().max()
        assert error <= 1e-8 * (1 + gradient.abs().max()), (name, float(error))


def gradients_of(model: CasaForConditionalGeneration) -> dict[str, Tensor]:
    """A copy of every parameter's gradient, zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


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
        "pixel_values": [image for sample in samples for image in sample.images],
    }


@every_variant
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_batch_equals_pack(variant: str, left: bool) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    batch = padded_batch(samples, left)
    with torch.no_grad():
        logits = model(**batch).logits
        expected = packed_logits(model, samples)
    torch.testing.assert_close(logits[batch["attention_mask"].bool()], expected, rtol=0, atol=1e-9)


@every_variant
def test_logits_index_picks_rows(variant: str) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    inputs = packed_inputs(samples)
    with torch.no_grad():
        every = model(packed=inputs).logits
        inputs.logits_index = torch.tensor([3, 0, 11])
        torch.testing.assert_close(model(packed=inputs).logits, every[[3, 0, 11]])


# Who influences whom


@every_variant
def test_no_token_changes_what_stands_before_it(variant: str) -> None:
    """Nor anything in another sample of the pack."""
    model, samples = shared_model(variant), fill(HARD_PACK)
    with torch.no_grad():
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            text = sample.layout.text
            for t in range(text):
                changed = changed_rows(packed_logits(model, with_token(samples, index, t)), before)
                assert changed == list(range(start + t, start + text))
            start += text


@every_variant
def test_no_image_changes_what_stands_before_it(variant: str) -> None:
    """But everything after it, through self-attention; no other sample."""
    model, samples = shared_model(variant), fill(HARD_PACK)
    with torch.no_grad():
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            text = sample.layout.text
            for i, point in enumerate(sample.layout.points):
                changed = changed_rows(packed_logits(model, with_image(samples, index, i)), before)
                assert changed == list(range(start + point, start + text))
            start += text


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "insertion"])
def test_one_block_reads_images_of_its_own_window_only(variant: str) -> None:
    """Later windows see an earlier image through the self-attention of a later block alone."""
    model, samples = shared_model(variant, layers=1), fill(HARD_PACK)
    with torch.no_grad():
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            windows = windows_of_text(sample.layout)
            for i, point in enumerate(sample.layout.points):
                changed = changed_rows(packed_logits(model, with_image(samples, index, i)), before)
                expected = [start + t for t, window in enumerate(windows) if window == point]
                assert changed == expected
            start += sample.layout.text


@without_insertion
def test_fusion_reads_text_of_its_own_window_only(mechanism: str) -> None:
    """A token reaches its window's later tokens in CASA, itself alone in cross-attention."""
    model, samples = (
        shared_model(default_variant(mechanism)),
        fill(HARD_PACK),
    )
    before = fusion_outputs(model, samples)[0]
    start = 0
    for index, sample in enumerate(samples):
        windows = windows_of_text(sample.layout)
        for t, window in enumerate(windows):
            changed = changed_rows(fusion_outputs(model, with_token(samples, index, t))[0], before)
            readers = range(t, len(windows)) if mechanism == "casa" else [t]
            same = [r for r in readers if window is not None and windows[r] == window]
            assert changed == [start + r for r in same]
        start += sample.layout.text


# Generation


def greedy_check(
    model: CasaForConditionalGeneration, out: Tensor, batch: dict[str, Any], first: int
) -> None:
    """Every id of `out` from column `first` on is the best of a full forward without a cache."""
    new = out.shape[1] - batch["attention_mask"].shape[1]
    mask = torch.cat([batch["attention_mask"], torch.ones(len(out), new, dtype=torch.long)], 1)
    logits = model(**{**batch, "input_ids": out, "attention_mask": mask}).logits
    assert torch.equal(logits[:, first - 1 : -1].argmax(-1), out[:, first:])


@every_variant
def test_steps_with_the_cache_equal_the_full_forward(variant: str) -> None:
    """Greedy decoding of a batch with left padding: ids, and the logits of every step."""
    model = shared_model(variant)
    batch = padded_batch(fill(HARD_PACK))
    prompt = batch["input_ids"].shape[1]
    result = model.generate(
        **batch,
        max_new_tokens=6,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    out = result.sequences
    assert out.shape == (len(HARD_PACK), prompt + 6)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(out), 6, dtype=torch.long)], 1)
    with torch.no_grad():
        full = model(**{**batch, "input_ids": out, "attention_mask": mask}).logits
    steps = torch.stack(result.logits, 1)
    torch.testing.assert_close(steps.double(), full[:, prompt - 1 : -1], rtol=0, atol=1e-5)
    greedy_check(model, out, batch, prompt)


@every_variant
def test_batched_generation_equals_samples_alone(variant: str) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    batch = padded_batch(samples)
    arguments = [
        batch["input_ids"],
        batch["pixel_values"],
        batch["image_embeds_insertion_points"],
        batch["attention_mask"],
    ]
    together = model.generate_from_image(*arguments, max_new_tokens=5, do_sample=False)
    for row, sample in enumerate(samples):
        alone = model.generate_from_image(
            sample.ids[None],
            sample.images,
            [list(sample.layout.points)],
            None,
            max_new_tokens=5,
            do_sample=False,
        )
        assert torch.equal(alone[0, -5:], together[row, -5:])


@every_mechanism
def test_only_text_enters_the_cache_unless_images_are_inserted(mechanism: str) -> None:
    model = tiny_model(mechanism)
    (sample,) = fill(HARD_PACK[:1])
    cache = DynamicCache()
    model.generate_from_image(
        sample.ids[None],
        sample.images,
        [list(sample.layout.points)],
        None,
        past_key_values=cache,
        max_new_tokens=4,
        do_sample=False,
    )
    # The last generated id has not entered: it comes with the next turn.
    text = sample.layout.text + 3
    images = sum(sample.layout.image_tokens) if mechanism == "insertion" else 0
    assert cache.get_seq_length() == text + images


def stream_turns(seed: int) -> Iterator[tuple[Tensor, Tensor, list[list[int]], list[Tensor]]]:
    """Three turns of two streams: new ids, their mask, columns of images, images.

    The first turn is padded, the second brings an image for each stream, the third for one only.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = [((2, 6), [[3, 4], [0, 0]]), ((2, 4), [[0], [2]]), ((2, 5), [[], [1]])]
    for turn, (shape, points) in enumerate(shapes):
        ids = torch.randint(0, VOCABULARY, shape, generator=generator)
        mask = torch.ones_like(ids)
        if turn == 0:
            mask[0, :2] = 0
        grids = [(1, 2), (2, 2), (3, 1), (1, 1)]
        images = [random_image(generator, *grids[i]) for i in range(sum(map(len, points)))]
        yield ids, mask, points, images


def image_tokens(images: list[Tensor], columns: list[int]) -> int:
    """Image tokens of the newest images of a stream, as many as there are columns."""
    newest = images[len(images) - len(columns) :]
    return sum(image.shape[1] * image.shape[2] // 28**2 for image in newest)


@every_variant
def test_three_turn_stream_equals_the_full_forward(variant: str) -> None:
    """The last id of a turn enters with the next one, in the older window."""
    model = shared_model(variant)
    told = torch.zeros(2, 0, dtype=torch.long)
    masks, points, images = [], [[], []], [[], []]
    slots = waiting = 0
    model.start_ca_streaming_states()
    for ids, mask, columns, pixels in stream_turns(seed=5):
        remaining = list(pixels)
        for row in range(2):
            points[row] += [told.shape[1] + column for column in columns[row]]
            images[row] += [remaining.pop(0) for _ in columns[row]]
        out = model.generate_from_image(
            ids,
            pixels,
            columns,
            mask,
            reset_streaming=False,
            max_new_tokens=4,
            do_sample=False,
        )
        assert torch.equal(out[:, : ids.shape[1]], ids)
        # A batch takes as many cache slots as its longest stream; the last of four ids stays out.
        entered = (mask.sum(1) + waiting).tolist()
        if variant == "insertion":
            entered = [n + image_tokens(images[row], columns[row]) for row, n in enumerate(entered)]
        slots += max(entered) + 3
        assert model.streaming_cache.get_seq_length() == slots
        masks += [mask, torch.ones(2, 4, dtype=torch.long)]
        prompt = told.shape[1] + ids.shape[1]
        told = torch.cat([told, out], 1)
        waiting = 1
        transcript = {
            "attention_mask": torch.cat(masks, 1),
            "image_embeds_insertion_points": points,
            "pixel_values": images[0] + images[1],
        }
        greedy_check(model, told, transcript, prompt)
    model.reset_ca_streaming_states()


@every_variant
@PROPERTY
@given(layout=sample_layouts(), data=st.data(), seed=st.integers(0, 999))
def test_chunks_with_a_cache_equal_the_whole(
    variant: str, layout: Layout, data: st.DataObject, seed: int
) -> None:
    """A sample cut anywhere into up to three chunks; images at a cut stay on one side of it."""
    cuts = sorted(data.draw(st.sets(st.integers(1, layout.text), max_size=2)) - {layout.text})
    late = data.draw(st.booleans())
    model, (sample,) = shared_model(variant), fill([layout], seed)
    assert_chunks_equal_whole(model, sample, cut_sample(sample, cuts, late))


@every_mechanism
def test_consecutive_images_share_a_window_over_a_chunk_boundary(mechanism: str) -> None:
    """No text stands between the end of one chunk and the start of the next."""
    model = tiny_model(mechanism, dtype=torch.float64)
    (sample,) = fill([Layout(5, (1, 3, 3), ((1, 1), (1, 2), (2, 1)))])
    chunks = cut_sample(sample, [3], late=True)
    # Move the first image at the cut to the chunk before.
    chunks[0]["pixel_values"].append(chunks[1]["pixel_values"].pop(0))
    chunks[0]["image_embeds_insertion_points"] = [[1, 3]]
    chunks[1]["image_embeds_insertion_points"] = [[0]]
    assert_chunks_equal_whole(model, sample, chunks)


def cut_sample(sample: Sample, cuts: list[int], late: bool) -> list[dict[str, Any]]:
    """Forward keywords of each chunk of a sample.

    :param cuts: text tokens before each cut.
    :param late: whether images at a cut come with the chunk after it.
    """
    chunks = []
    for start, stop in zip([0, *cuts], [*cuts, sample.layout.text], strict=True):
        last = stop == sample.layout.text
        inside = [
            i
            for i, point in enumerate(sample.layout.points)
            if start < point < stop
            or (point == start and (late or start == 0))
            or (point == stop and (not late or last))
        ]
        chunks.append(
            {
                "input_ids": sample.ids[None, start:stop],
                "image_embeds_insertion_points": [
                    [sample.layout.points[i] - start for i in inside]
                ],
                "pixel_values": [sample.images[i] for i in inside],
            }
        )
    return chunks


@torch.no_grad()
def assert_chunks_equal_whole(
    model: CasaForConditionalGeneration, sample: Sample, chunks: list[dict[str, Any]]
) -> None:
    """Chunks through one cache give the logits of the whole sample."""
    cache = DynamicCache()
    apart = [model(**chunk, past_key_values=cache).logits[0] for chunk in chunks]
    whole = packed_logits(model, [sample])
    torch.testing.assert_close(torch.cat(apart), whole, rtol=0, atol=1e-9)


@every_mechanism
def test_image_tokens_around_an_appended_image(mechanism: str) -> None:
    """Without insertion points each row ends: ids before the image, the image, ids after it."""
    model = shared_model(default_variant(mechanism))
    ids = torch.tensor([[5, 6, 7]])
    image = random_image(torch.Generator().manual_seed(0), 2, 2)
    short = model.generate_from_image(
        ids,
        [image],
        None,
        None,
        pre_image_tokens=[11],
        post_image_tokens=[12, 13],
        max_new_tokens=16,
        do_sample=False,
    )
    written = torch.tensor([[5, 6, 7, 11, 12, 13]])
    long = model.generate_from_image(
        written, [image], [[4]], None, max_new_tokens=16, do_sample=False
    )
    assert torch.equal(short, long)


# Beside the plain backbone


@every_mechanism
@pytest.mark.parametrize("backbone", PLAIN)
def test_text_alone_gives_the_plain_backbones_logits(backbone: str, mechanism: str) -> None:
    """Exactly: the fused layers are the backbone's own where there is no image."""
    config = tiny_text_config(backbone)
    model = tiny_model(mechanism, text_config=config)
    plain = PLAIN[backbone](config).eval()
    weights = {k: v for k, v in model.state_dict().items() if ".fusion." not in k}
    wrong = plain.load_state_dict(
        {k: v for k, v in weights.items() if k.startswith(("model.", "lm_head."))}, strict=False
    )
    assert not wrong.unexpected_keys
    assert not [key for key in wrong.missing_keys if "inv_freq" not in key]
    ids = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


@without_insertion
@pytest.mark.parametrize("backbone", ["llama", "qwen2", "helium"])
def test_from_self_attention_copies_the_block(backbone: str, mechanism: str) -> None:
    """Projections with their biases, and the input norm; copies, not shared tensors."""
    model = tiny_model(mechanism, text_config=tiny_text_config(backbone), perturb=False)
    for layer in model.model.layers:
        pairs = [(layer.fusion.norm, layer.input_layernorm)]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            pairs.append((getattr(layer.fusion, name), getattr(layer.self_attn, name)))
        for copy, source in pairs:
            assert copy.state_dict().keys() == source.state_dict().keys()
            for key, value in source.state_dict().items():
                assert torch.equal(copy.state_dict()[key], value)
                assert copy.state_dict()[key].data_ptr() != value.data_ptr()


@without_insertion
def test_zero_output_starts_as_the_plain_backbone(mechanism: str) -> None:
    """Images change nothing until the output projection has learned something."""
    bias = tiny_text_config(attention_bias=True)
    model = tiny_model(mechanism, text_config=bias, perturb=False, init="zero_output")
    for layer in model.model.layers:
        assert torch.equal(layer.fusion.k_proj.weight, layer.self_attn.k_proj.weight)
    samples = fill(HARD_PACK)
    blind = [Sample(Layout(s.layout.text), s.ids, []) for s in samples]
    with torch.no_grad():
        assert torch.equal(packed_logits(model, samples), packed_logits(model, blind))
        copied = tiny_model(mechanism, text_config=bias, perturb=False)
        assert not torch.equal(packed_logits(copied, samples), packed_logits(copied, blind))


@without_insertion
def test_random_start_is_no_copy(mechanism: str) -> None:
    model = tiny_model(mechanism, perturb=False, init="random")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.initialise_fusion()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for layer in model.model.layers:
        assert not torch.equal(layer.fusion.q_proj.weight, layer.self_attn.q_proj.weight)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MistralConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1), "'mistral'"),
        (tiny_text_config("qwen2", use_sliding_window=True), "use_sliding_window"),
    ],
)
def test_backbones_that_are_not_reproduced_are_refused_by_name(
    config: PretrainedConfig, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        tiny_model(text_config=config)


@without_insertion
@pytest.mark.parametrize("option", ["init", "image_positions"])
def test_unknown_options_are_refused_by_name(mechanism: str, option: str) -> None:
    with pytest.raises(ValueError, match=option):
        tiny_model(mechanism, **{option: "nonsense"})
