"""Image keys of all layers at once: the layers' own numbers, gradients, and when it is done."""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from casa_train.cost.memory import saved_bytes
from casa_train.modeling.cross_attention import CrossAttention
from casa_train.modeling.joint_keys import JointKeys, KeySource
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs, random_image, use_exact_norms
from tests.helpers.variants import (
    VARIANTS,
    assert_gradients_close,
    build,
    case,
    every_mechanism,
    gradients_of,
    packed_logits,
    padded_batch,
)

OWN = ("casa", "cross_attention")


def joins(options: dict[str, Any]) -> bool:
    """Whether several layers of a variant make keys of their own from the same image tokens."""
    if options["mechanism"] not in OWN or options.get("share_parameters"):
        return False
    return options.get("update_image_tokens", "none") == "none"


JOINING = [name for name, options in VARIANTS.items() if joins(options)]


def trained(
    model: CasaForConditionalGeneration, joint: bool, dtype: torch.dtype
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a training step, and gradients of all parameters and of the image tokens "y"."""
    model.train().zero_grad()
    model.joint_image_keys = joint
    samples = fill(HARD_PACK)
    with torch.no_grad():
        y = model.visual([image for sample in samples for image in sample.images])
    y.requires_grad_()
    hook = model.visual.register_forward_hook(lambda module, args, out: y)
    logits = packed_logits(model, samples)
    hook.remove()
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(dtype)
    (logits * weights).sum().backward()
    assert y.grad is not None
    return logits.detach(), {**gradients_of(model), "y": y.grad}


@pytest.mark.parametrize("variant", [case(name) for name in JOINING])
def test_logits_and_every_gradient_are_those_of_layers_alone(variant: str) -> None:
    model = build(variant, dtype=torch.float64)
    expected, gradients = trained(model, False, torch.float64)
    runs: list[int] = []

    def watch(module: nn.Module, args: Any, out: Tensor) -> None:
        runs.append(len(out))

    vars(watch)["only_watches"] = True
    for layer in model.model.layers:
        if layer.fusion is not None:
            layer.fusion.k_proj.register_forward_hook(watch)
    logits, found = trained(model, True, torch.float64)
    # No image went through a layer's own projections: those are the text's.
    assert len(logits) != len(gradients["y"]) and set(runs) <= {len(logits)}
    assert gradients["y"].any() and gradients["model.layers.1.fusion.norm.weight"].any()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert_gradients_close(found, gradients)


@pytest.mark.parametrize("backbone", ["llama", "helium"])
def test_bf16_is_as_near_float64_as_layers_alone(backbone: str) -> None:
    """Rounding W g instead of g y costs nothing: norms and weights drawn at random."""
    model = build("casa", blocks=6, backbone=backbone).to(torch.bfloat16)
    exact = copy.deepcopy(model)
    use_exact_norms(exact)
    expected = trained(exact.double(), False, torch.float64)

    def errors(joint: bool) -> dict[str, float]:
        logits, gradients = trained(model, joint, torch.bfloat16)
        parts = {"logits": [(logits, expected[0])], "y": [(gradients["y"], expected[1]["y"])]}
        for part in ("fusion.norm.", "fusion.k_proj.", "fusion.v_proj."):
            parts[part] = [(g, expected[1][name]) for name, g in gradients.items() if part in name]
        return {
            part: sum(float((a.double() - b).norm() / b.norm()) for a, b in pairs) / len(pairs)
            for part, pairs in parts.items()
        }

    alone, joint = errors(False), errors(True)
    for part, error in joint.items():
        assert 0 < error < 1.3 * alone[part], (part, error, alone[part])


@every_mechanism
def test_only_layers_with_own_keys_of_unchanged_images_join(mechanism: str) -> None:
    for options in ({}, {"share_parameters": True}, {"update_image_tokens": "ffn"}):
        if options and mechanism not in OWN:
            continue
        model = build(mechanism, **options)
        model.joint_image_keys = True
        width = model.config.text_config.hidden_size
        heads = model._image_heads(torch.randn(40, width), checkpointed=False)
        wanted = mechanism in OWN and not options
        assert list(heads) == ([0, 1] if wanted else [])
        assert model._image_heads(torch.randn(40, width), checkpointed=True) == {}


class Shifted(CrossAttention):
    """Reads other image tokens than those that entered the decoder."""

    def run_layer(self, layer: Any, h: Tensor, images: Tensor, context: Any) -> Any:
        return super().run_layer(layer, h, 2 * images + 0.5, context)[0], images


class Scaled(CrossAttention):
    """Its layers' keys are not those of their projections alone."""

    def make_layer(self, layer: Any, layer_idx: int) -> nn.Module | None:
        made: Any = super().make_layer(layer, layer_idx)
        made.text_norm = nn.Identity()
        return cast(nn.Module, made)


class Declared(Scaled):
    """Says that its layers' keys are theirs all the same."""

    def image_keys(self, layer: Any) -> KeySource | None:
        return super().image_keys(layer)


@pytest.mark.parametrize(("own", "wanted"), [(Shifted, []), (Scaled, []), (Declared, [0, 1])])
def test_a_layer_of_ones_own_makes_its_own_keys(own: type, wanted: list[int]) -> None:
    """What a subclass does to image tokens or to projections, nobody can tell from outside."""
    model = build("cross_attention").train()
    model.mechanism.__class__ = own
    model.joint_image_keys = False
    expected = packed_logits(model, fill(HARD_PACK))
    model.joint_image_keys = True
    width = model.config.text_config.hidden_size
    assert list(model._image_heads(torch.randn(40, width), checkpointed=False)) == wanted
    torch.testing.assert_close(packed_logits(model, fill(HARD_PACK)), expected)


def test_left_alone_it_happens_without_gradients_on_many_tokens_and_untouched_weights() -> None:
    model = build("casa", backbone="biased")
    width = model.config.text_config.hidden_size
    layer = model.model.layers[1].fusion
    rows = layer.k_proj.out_features
    many, few = torch.randn(rows, width), torch.randn(rows - 1, width)
    assert model.joint_image_keys is None

    def joined(images: Tensor = many) -> bool:
        with torch.no_grad():
            return bool(model._image_heads(images, checkpointed=False))

    assert joined() and not joined(few) and not joined(many.double())
    assert not model._image_heads(many, checkpointed=False)  # with gradients
    model.joint_image_keys = False
    assert not joined()


class Doubling(nn.Linear):
    """As adapters that are linears themselves."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize("asked", [None, True])
def test_modules_that_do_more_than_their_weights_say_are_left_to_run(asked: bool | None) -> None:
    model = build("casa", backbone="biased")
    layer = model.model.layers[1].fusion
    images = torch.randn(layer.k_proj.out_features, model.config.text_config.hidden_size)
    model.joint_image_keys = asked

    def joined() -> bool:
        with torch.set_grad_enabled(asked is True):
            return bool(model._image_heads(images, checkpointed=False))

    def change(module: nn.Module, args: Any, out: Tensor | None = None) -> None:
        return None

    assert joined()
    for module in (layer.k_proj, layer.norm):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            hook = register(change)
            assert not joined()
            hook.remove()
    layer.v_proj.forward = layer.v_proj.forward  # as accelerate wraps it
    assert not joined()
    del layer.v_proj.forward
    whole = layer.v_proj.weight
    layer.v_proj.weight = nn.Parameter(whole[:0])  # as a sharding wrapper leaves it
    assert not joined()
    layer.v_proj.weight = whole
    layer.v_proj.__class__ = Doubling
    assert not joined()
    layer.v_proj.__class__ = nn.Linear
    assert joined()
    layer.k_proj = nn.Sequential(layer.k_proj)  # as an adapter wraps it
    assert not joined()


def test_an_adapter_of_the_image_keys_is_heard_in_training() -> None:
    model = build("casa", dtype=torch.float64)
    plain, _ = trained(model, True, torch.float64)
    model.model.layers[1].fusion.v_proj.__class__ = Doubling
    expected, gradients = trained(model, False, torch.float64)
    logits, found = trained(model, True, torch.float64)
    assert not torch.allclose(expected, plain)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert_gradients_close(found, gradients)


def test_threads_that_share_a_model_leave_its_weights_alone() -> None:
    model = build("casa", dtype=torch.float64)
    images = [random_image(torch.Generator().manual_seed(seed), 10, 12) for seed in (1, 2)]
    packs = [model.pack(torch.arange(8), [2], [image]) for image in images]
    norm = model.model.layers[0].fusion.norm
    with torch.no_grad():
        norm.weight.mul_(torch.linspace(-2, 2, len(norm.weight)))
        expected = [model(packed=pack).logits for pack in packs]
    weight, held = norm.weight, norm.weight.clone()
    wrong: list[Any] = []

    def ask(number: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(20):
                    logits = model(packed=packs[number]).logits
                    if not torch.equal(logits, expected[number]):
                        wrong.append(number)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=ask, args=(number % 2,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert norm.weight is weight and torch.equal(weight, held)


@pytest.mark.parametrize("variant", OWN)
def test_streams_and_what_listens_take_the_joint_keys(variant: str) -> None:
    model = build(variant, dtype=torch.float64)
    samples = fill(HARD_PACK)
    batch = padded_batch(samples)
    packed = packed_inputs(samples)

    def outcome(joint: bool) -> tuple[Tensor, dict[str, dict[int, Tensor]]]:
        model.joint_image_keys = joint
        options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True}
        result = model.generate(**batch, **options, return_dict_in_generate=True)
        return torch.stack(result.logits), model.image_attention(packed).values

    (alone, shares), (joint, joint_shares) = outcome(False), outcome(True)
    torch.testing.assert_close(joint, alone, rtol=0, atol=1e-6)  # `generate` keeps float32
    torch.testing.assert_close(joint_shares, shares, rtol=0, atol=1e-12, equal_nan=True)


def test_a_training_step_keeps_one_normalised_copy_instead_of_one_a_layer() -> None:
    model = build("cross_attention", blocks=6).train()
    image = random_image(torch.Generator().manual_seed(0), 10, 12)
    packed = model.pack(torch.arange(8), [2], [image])

    def held(joint: bool, blocks: str) -> int:
        model.joint_image_keys = joint
        model.checkpoint_activations(blocks)
        return sum(saved_bytes(model, lambda: model(packed=packed)).values())

    width = model.config.text_config.hidden_size
    copy_of_images = 120 * width * 4
    # The norm's input in float32, its root's factor and its result, in five layers of six; one
    # tensor of all layers' folded weights comes on top.
    assert held(True, "none") < held(False, "none") - 5 * copy_of_images
    assert held(True, "decoder") == held(False, "decoder")


def test_one_layers_heads_are_what_its_own_projections_give() -> None:
    model = build("casa", backbone="biased", dtype=torch.float64)
    layers = [layer.fusion for layer in model.model.layers]
    sources = [model.mechanism.image_keys(layer) for layer in model.model.layers]
    images = torch.randn(9, model.config.text_config.hidden_size, dtype=torch.float64)
    found = JointKeys()(images, *sources)
    linears = [(fusion, x) for fusion in layers for x in (fusion.k_proj, fusion.v_proj)]
    for (fusion, linear), heads in zip(linears, found, strict=True):
        expected = linear(fusion.norm(images)).unflatten(-1, (-1, fusion.head_dim))
        torch.testing.assert_close(heads, expected, rtol=0, atol=1e-12)
