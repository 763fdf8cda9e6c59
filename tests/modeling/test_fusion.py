"""Every variant of the whole model against the independent reference, packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModel, MistralConfig, PretrainedConfig

from casa_train.modeling.block import project_out
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.reference import Token
from tests.helpers.tiny import (
    BACKBONES,
    HARD_PACK,
    PROPERTY,
    VOCABULARY,
    Layout,
    Sample,
    fill,
    layouts,
    packed_inputs,
    reference_settings,
    tiny_model,
    tiny_text_config,
)
from tests.helpers.variants import (
    MECHANISMS,
    VARIANTS,
    assert_gradients_close,
    build,
    case,
    changed_rows,
    every_mechanism,
    every_variant,
    gradients_of,
    packed_logits,
    padded_batch,
    reference_of,
    shared_model,
    text_tokens,
    tokens_of,
    with_image,
    with_token,
)

SMALL = settings(PROPERTY, max_examples=5)


def float32_variants() -> list[str]:
    """One variant of each mechanism and of each backbone."""
    return [*MECHANISMS, "casa-qwen2_5_vl", "insertion-helium", "hyper_attention-biased"]


# Against the reference


@every_variant
@SMALL
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_float64_logits_equal_the_reference(variant: str, pack: list[Layout], seed: int) -> None:
    model, samples = shared_model(variant), fill(pack, seed)
    with torch.no_grad():
        found = packed_logits(model, samples)
        expected = torch.cat([reference_of(model, sample).logits for sample in samples])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", float32_variants())
@SMALL
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_float32_logits_equal_the_reference(variant: str, pack: list[Layout], seed: int) -> None:
    """The model as users run it, with the backbone's own norms."""
    model, samples = shared_model(variant, torch.float32), fill(pack, seed)
    with torch.no_grad():
        found = packed_logits(model, samples).double()
        expected = torch.cat([reference_of(model, sample).logits for sample in samples])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@every_variant
def test_gradients_equal_the_references(variant: str) -> None:
    """Of every parameter behind the vision tower, and of the tokens that the tower gives."""
    model, samples = shared_model(variant), fill(HARD_PACK)
    weights = random_weights(HARD_PACK)
    with torch.no_grad():
        tower = [[model.visual([image]) for image in sample.images] for sample in samples]

    given = torch.cat([y for images in tower for y in images]).requires_grad_()
    model.zero_grad(set_to_none=True)
    hook = model.visual.register_forward_hook(lambda module, args, out: given)
    (packed_logits(model, samples) * weights).sum().backward()
    hook.remove()
    found = {k: v for k, v in gradients_of(model).items() if not k.startswith("visual.")}

    state = {name: value.clone().requires_grad_() for name, value in model.state_dict().items()}
    leaves = [[y.clone().requires_grad_() for y in images] for images in tower]
    for sample, images, part in zip(samples, leaves, split(weights, HARD_PACK), strict=True):
        (reference_of(model, sample, state, images).logits * part).sum().backward()
    expected = {
        k: torch.zeros_like(state[k]) if state[k].grad is None else state[k].grad for k in found
    }
    assert_gradients_close(found, expected)
    flat = [y for images in leaves for y in images]
    expected_y = [torch.zeros_like(y) if y.grad is None else y.grad for y in flat]
    assert given.grad is not None
    assert_gradients_close({"y": given.grad}, {"y": torch.cat(expected_y)})


def random_weights(pack: list[Layout], seed: int = 0) -> Tensor:
    """(T, vocabulary) float64 weights that make a scalar of a pack's logits."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sum(layout.text for layout in pack), VOCABULARY)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def split(rows: Tensor, pack: list[Layout]) -> tuple[Tensor, ...]:
    """The rows of each sample of a pack."""
    return rows.split([layout.text for layout in pack])


def fusion_additions(model: CasaForConditionalGeneration, samples: list[Sample]) -> list[Tensor]:
    """(T, C) for every block with projections of its own for images: what it adds to the text."""
    additions: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...], out: Any) -> None:
        if isinstance(out, tuple):  # casa: reads of text and images before the output projection
            additions.append(project_out(module.o_proj, out[0], inputs[-1].plan.cross))
        else:  # gated: the text before and after its layer
            additions.append(out - inputs[0])

    layers = [layer.fusion for layer in model.model.layers if layer.fusion is not None]
    hooks = [fusion.register_forward_hook(keep) for fusion in layers]
    packed_logits(model, samples)
    for hook in hooks:
        hook.remove()
    return additions


@pytest.mark.parametrize(
    "variant",
    [case(n) for n in VARIANTS if n.startswith(("casa", "cross", "gated")) and "shared" not in n],
)
def test_fusion_adds_what_the_reference_adds(variant: str) -> None:
    """Block by block, and exactly nothing to text that has nothing to read."""
    model, samples = shared_model(variant), fill(HARD_PACK)
    with torch.no_grad():
        found = fusion_additions(model, samples)
        references = [reference_of(model, sample) for sample in samples]
    assert len(found) == len(references[0].fusion)
    for n, out in enumerate(found):
        expected = torch.cat([r.fusion[n] for r in references])
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-9)
        nothing = (expected == 0).all(1)
        assert (out[nothing] == 0).all() and (out[~nothing] != 0).any(1).all()
        assert nothing.any() or "replace-all" in variant


@every_mechanism
def test_an_adapter_joins_towers_of_another_width(mechanism: str) -> None:
    model = build(mechanism, vision_width=40, dtype=torch.float64)
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
@settings(PROPERTY, max_examples=3)
@given(pack=layouts(), seed=st.integers(0, 999))
@example(pack=HARD_PACK, seed=0)
def test_pack_equals_samples_alone(variant: str, pack: list[Layout], seed: int) -> None:
    """Logits, and the gradients of every parameter, the tower's included."""
    model, samples = shared_model(variant), fill(pack, seed)
    weights = random_weights(pack, seed)

    model.zero_grad(set_to_none=True)
    together = packed_logits(model, samples)
    (together * weights).sum().backward()
    packed_gradients = gradients_of(model)

    model.zero_grad(set_to_none=True)
    alone = []
    for sample, part in zip(samples, split(weights, pack), strict=True):
        logits = packed_logits(model, [sample])
        (logits * part).sum().backward()
        alone.append(logits)
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    assert_gradients_close(packed_gradients, gradients_of(model))


@every_variant
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padded_batch_equals_pack(variant: str, left: bool) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    batch = padded_batch(samples, left)
    with torch.no_grad():
        logits = model(**batch).logits
        expected = packed_logits(model, samples)
    torch.testing.assert_close(logits[batch["attention_mask"].bool()], expected, rtol=0, atol=1e-9)


@every_mechanism
def test_logits_index_picks_rows(mechanism: str) -> None:
    model, samples = shared_model(mechanism), fill(HARD_PACK)
    inputs = packed_inputs(samples)
    with torch.no_grad():
        every = model(packed=inputs).logits
        inputs.logits_index = torch.tensor([3, 0, 11])
        torch.testing.assert_close(model(packed=inputs).logits, every[[3, 0, 11]])


# Who influences whom


def readers(variant: str, layout: Layout, token: Token) -> list[int]:
    """The text tokens of a sample whose logits a token of it changes."""
    options = VARIANTS[variant]
    later = [t for t in text_tokens(layout) if t.place >= token.place]
    replaced = options.get("placement") == "replace" and options.get("every", 1) == 1
    if replaced and options.get("history") != "all":
        # No self-attention anywhere: nothing leaves a window, or the windows of a video.
        scope = "scope" if options.get("window_scope") == "all_frames" else "window"
        group = getattr(token, scope)
        later = [
            t
            for t in later
            if t.place == token.place or (group is not None and getattr(t, scope) == group)
        ]
    return [t.row for t in later]


@every_variant
def test_a_token_changes_what_follows_and_nothing_else(variant: str) -> None:
    """Nothing before it, nothing in another sample of the pack, and not one bit of them."""
    model, samples = shared_model(variant), fill(HARD_PACK)
    with torch.no_grad():
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            for token in text_tokens(sample.layout):
                after = packed_logits(model, with_token(samples, index, token.row))
                expected = readers(variant, sample.layout, token)
                assert changed_rows(after, before) == [start + row for row in expected]
            start += sample.layout.text


@every_variant
def test_an_image_changes_what_follows_and_nothing_else(variant: str) -> None:
    model, samples = shared_model(variant), fill(HARD_PACK)
    with torch.no_grad():
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            images = [t for t in tokens_of(sample.layout) if t.kind == "image"]
            first = 0
            for i, count in enumerate(sample.layout.image_tokens):
                after = packed_logits(model, with_image(samples, index, i))
                expected = readers(variant, sample.layout, images[first])
                assert changed_rows(after, before) == [start + row for row in expected]
                first += count
            start += sample.layout.text


@pytest.mark.parametrize("variant", ["casa", "cross_attention", "gated_cross_attention"])
def test_one_block_reads_images_of_its_own_window_only(variant: str) -> None:
    """Later windows see an earlier image through the self-attention of a later block alone."""
    model, samples = build(variant, blocks=1, dtype=torch.float64), fill(HARD_PACK)
    with torch.no_grad():
        # Flamingo's layer stands before its block; its self-attention passes the images on.
        for layer in model.model.layers if variant == "gated_cross_attention" else []:
            layer.self_attn.o_proj.weight.zero_()
        before = packed_logits(model, samples)
        start = 0
        for index, sample in enumerate(samples):
            text = text_tokens(sample.layout)
            for i, point in enumerate(sample.layout.points):
                changed = changed_rows(packed_logits(model, with_image(samples, index, i)), before)
                assert changed == [start + t.row for t in text if t.window == point]
            start += sample.layout.text


# Parameters and their first values


def expected_parameters(model: CasaForConditionalGeneration) -> set[str]:
    """Names under `model.layers` and `resampler` that the mechanism asks for."""
    text, fusion = model.config.text_config, model.config.fusion
    mechanism, bias = fusion["mechanism"], projection_biases(text)
    projections = {
        name + suffix
        for name, biased in bias.items()
        for suffix in [".weight", *([".bias"] if biased else [])]
    }
    # Norms of heads belong to the projections that they follow; a gated layer has none.
    bare = projections
    if text.model_type == "qwen3":
        projections = bare | {"q_norm.weight", "k_norm.weight"}
    mlp = {f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    block = {"input_layernorm.weight", "post_attention_layernorm.weight"} | mlp
    own = {f"self_attn.{name}" for name in projections}
    settings = reference_settings(model)
    names = set()
    for n in range(text.num_hidden_layers):
        layer = block | own
        if settings.fuses(n) and mechanism in ("casa", "cross_attention"):
            if not settings.share_parameters:
                if settings.placement == "replace":
                    layer = layer - own
                layer = layer | {f"fusion.{name}" for name in projections | {"norm.weight"}}
                if settings.placement in ("before", "after"):
                    layer = layer | {"fusion.text_norm.weight"}
        if settings.fuses(n) and mechanism == "gated_cross_attention":
            new = {"norm.weight", "image_norm.weight", "ffn_norm.weight"}
            new |= {"attention_gate", "ffn_gate"} | bare | mlp
            layer = layer | {f"fusion.{name}" for name in new}
        if settings.fuses(n) and mechanism == "hyper_attention":
            new = {name for name in projections if name[0] in "kv"} | {"gate.weight", "gate.bias"}
            layer = layer | {f"fusion.{name}" for name in new}
        names |= {f"model.layers.{n}.{name}" for name in layer}
    if mechanism == "qformer_insertion":
        both = ("weight", "bias")
        parts = ["self_norm", "cross_norm", "image_norm", "ffn_norm", "ffn.up", "ffn.down"]
        parts += [f"{a}_attn.{p}_proj" for a in ("self", "cross") for p in "qkvo"]
        names |= {"resampler.queries", "resampler.norm.weight", "resampler.norm.bias"}
        for n in range(settings.resampler_layers):
            new = {f"{part}.{kind}" for part in parts for kind in both}
            # A bias on keys adds the same to every score of a query: the softmax does not see it.
            new -= {"self_attn.k_proj.bias", "cross_attn.k_proj.bias"}
            names |= {f"resampler.layers.{n}.{name}" for name in new}
    return names


def projection_biases(text: PretrainedConfig) -> dict[str, bool]:
    """Which projections of a backbone's self-attention have a bias."""
    qwen = text.model_type.startswith("qwen2")
    biased = qwen or getattr(text, "attention_bias", False)  # Mistral has no such field
    return {f"{p}_proj": biased and not (qwen and p == "o") for p in "qkvo"}


@every_variant
def test_parameters_are_those_of_the_definition(variant: str) -> None:
    """What shares has no parameters of its own; what is replaced is gone."""
    model = shared_model(variant)
    found = {n for n in model.state_dict() if n.startswith(("model.layers.", "resampler."))}
    assert found == expected_parameters(model)


@pytest.mark.parametrize("placement", ["parallel", "before", "after"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("mechanism", ["casa", "cross_attention"])
def test_from_self_attention_copies_the_block(
    backbone: str, mechanism: str, placement: str
) -> None:
    """Projections with their biases, and the input norm; copies, not shared tensors."""
    config = tiny_text_config(backbone)
    model = tiny_model(mechanism, text_config=config, perturb=False, placement=placement)
    for layer in model.model.layers:
        pairs = [(layer.fusion.norm, layer.input_layernorm)]
        if placement != "parallel":
            pairs.append((layer.fusion.text_norm, layer.input_layernorm))
        assert backbone != "qwen3" or layer.self_attn.q_norm.weight.std() > 0.1
        for name, child in layer.self_attn.named_children():
            if name != "rotary_emb":  # of transformers 4.51, without parameters
                pairs.append((getattr(layer.fusion, name), child))
        for copy, source in pairs:
            assert copy.state_dict().keys() == source.state_dict().keys()
            for key, value in source.state_dict().items():
                assert torch.equal(copy.state_dict()[key], value)
                assert copy.state_dict()[key].data_ptr() != value.data_ptr()


@every_variant
def test_every_tensor_of_the_backbone_has_a_place(variant: str) -> None:
    """Where self-attention is replaced, fusion adopts its projections: of the same shape, once."""
    model = shared_model(variant)
    backbone = AutoModel.from_config(model.config.text_config)
    shapes = {f"model.{name}": value.shape for name, value in backbone.state_dict().items()}
    adopted = {model.mechanism.adopt(name): shape for name, shape in shapes.items()}
    own = {name: value.shape for name, value in model.state_dict().items()}
    assert len(adopted) == len(shapes)
    assert adopted.items() <= own.items()
    moved = {name for name in adopted if name not in shapes}
    assert all(".fusion." in name for name in moved)
    assert bool(moved) == ("replace" in variant and "shared" not in variant)


def test_a_random_start_adopts_nothing() -> None:
    mechanism = build("casa-replace-every2", init="random").mechanism
    assert mechanism.adopt("model.layers.1.self_attn.q_proj.weight") is None
    assert mechanism.adopt("model.layers.1.mlp.up_proj.weight") is not None
    name = "model.layers.0.self_attn.q_proj.weight"
    assert mechanism.adopt(name) == name


def test_hyper_attention_starts_with_copied_keys_and_a_nearly_closed_gate() -> None:
    model = build("hyper_attention", perturb=False)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            copy, source = getattr(layer.fusion, name), getattr(layer.self_attn, name)
            assert torch.equal(copy.weight, source.weight)
            assert copy.weight.data_ptr() != source.weight.data_ptr()
        assert (layer.fusion.gate.weight == 0).all() and layer.fusion.gate.bias.item() == -2


@pytest.mark.parametrize(
    ("mechanism", "options"),
    [
        ("casa", {"init": "zero_output"}),
        ("cross_attention", {"init": "zero_output"}),
        ("casa", {"init": "zero_output", "placement": "before", "history": "all"}),
    ],
)
def test_zero_output_starts_as_the_plain_backbone(mechanism: str, options: dict[str, Any]) -> None:
    """Images change nothing until the output projection has learned something."""
    config = tiny_text_config(attention_bias=True)
    model = tiny_model(mechanism, text_config=config, perturb=False, **options)
    samples = fill(HARD_PACK)
    blind = [Sample(Layout(s.layout.text), s.ids, []) for s in samples]
    with torch.no_grad():
        assert torch.equal(packed_logits(model, samples), packed_logits(model, blind))
        moved = tiny_model(mechanism, text_config=config, **options)
        assert not torch.equal(packed_logits(moved, samples), packed_logits(moved, blind))


def test_gated_cross_attention_starts_as_the_plain_backbone() -> None:
    """Both gates are closed, and images change nothing until one has opened."""
    model = CasaForConditionalGeneration(build("gated_cross_attention").config).eval()
    model.initialise_fusion()
    for layer in model.model.layers:
        for norm in (layer.fusion.norm, layer.fusion.image_norm, layer.fusion.ffn_norm):
            assert (norm.weight == 1).all()
    samples = fill(HARD_PACK)
    blind = [Sample(Layout(s.layout.text), s.ids, []) for s in samples]
    for gate in ("attention_gate", "ffn_gate"):
        with torch.no_grad():
            closed = packed_logits(model, blind)
            assert torch.equal(packed_logits(model, samples), closed)
            getattr(model.model.layers[0].fusion, gate).fill_(1.0)
            assert not torch.equal(packed_logits(model, samples), closed)
            getattr(model.model.layers[0].fusion, gate).zero_()


@pytest.mark.parametrize("mechanism", ["casa", "cross_attention", "hyper_attention"])
def test_random_start_is_no_copy(mechanism: str) -> None:
    model = tiny_model(mechanism, perturb=False, init="random")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.initialise_fusion()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for layer in model.model.layers:
        assert not torch.equal(layer.fusion.k_proj.weight, layer.self_attn.k_proj.weight)


# What is refused


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


CROSS = ("casa", "cross_attention")


@pytest.mark.parametrize(
    ("mechanism", "options", "named"),
    [
        *[
            (mechanism, {option: "nonsense"}, [option, "nonsense"])
            for mechanism in CROSS
            for option in (
                "share_parameters",
                "placement",
                "every",
                "update_image_tokens",
                "history",
                "window_scope",
                "init",
            )
        ],
        ("casa", {"text_in_window": "nonsense"}, ["text_in_window"]),
        ("casa", {"image_positions": "nonsense"}, ["image_positions", "nonsense"]),
        *[(m, {"every": every}, ["every", str(every)]) for m in CROSS for every in (0, -1, 3)],
        *[("gated_cross_attention", {"every": e}, ["every", str(e)]) for e in (0, 3)],
        *[
            ("casa", {"share_parameters": True, "init": init}, ["share_parameters", "init"])
            for init in ("zero_output", "random")
        ],
        *[
            ("casa", {"text_in_window": False, "image_positions": p}, ["image_positions"])
            for p in ("advance", "none")
        ],
        *[
            (m, {"history": "all", "window_scope": "all_frames"}, ["history", "window_scope"])
            for m in CROSS
        ],
        ("cross_attention", {"placement": "replace"}, ["placement", "every"]),
        ("casa", {"placement": "replace", "text_in_window": False}, ["placement", "every"]),
        ("cross_attention", {"text_in_window": True}, ["text_in_window"]),
        ("cross_attention", {"image_positions": "frozen"}, ["image_positions"]),
        ("insertion", {"every": 2}, ["every"]),
        ("qformer_insertion", {"queries": 0}, ["queries"]),
        ("qformer_insertion", {"layers": 0}, ["layers"]),
        ("qformer_insertion", {"heads": 3}, ["heads", "3"]),
        ("qformer_insertion", {"ffn_width": -1}, ["ffn_width", "-1", "from 0"]),
        ("gated_cross_attention", {"ffn_width": 2.5}, ["ffn_width", "2.5", "whole number"]),
        ("gated_cross_attention", {"init": "random"}, ["init"]),
        ("hyper_attention", {"init": "zero_output"}, ["init", "zero_output"]),
        ("hyper_attention", {"layers": [0, 2]}, ["layers", "2"]),
        ("hyper_attention", {"layers": [-1]}, ["layers", "-1"]),
        ("nonsense", {}, ["nonsense", "casa"]),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_refused_by_name(
    mechanism: str, options: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_model(mechanism, **options)
    for words in named:
        assert words in str(caught.value)
