"""What decode steps call in place of modules, beside those modules."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from casa_train.modeling import attention, lean
from casa_train.modeling.decoder import backbone_rope
from casa_train.modeling.lean import RMS_NORMS, Lean, linear, rms_norm
from casa_train.modeling.regions import normed
from casa_train.modeling.rope import BY_PRODUCT, as_products, rope_frequencies, rope_table
from tests.helpers.tiny import BACKBONES, random_image, tiny_model, tiny_text_config

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def norm_of(backbone: str, dtype: torch.dtype) -> Any:
    config = tiny_text_config(backbone=backbone, layers=1)
    norm = tiny_model("casa", text_config=config).model.layers[0].input_layernorm
    assert type(norm) in RMS_NORMS
    generator = torch.Generator().manual_seed(1)
    norm.weight.data = 0.5 + torch.rand(norm.weight.shape, generator=generator)
    return norm.to(dtype).requires_grad_(False)


@every_backbone
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_norm_in_a_step_is_about_as_near_the_truth_as_its_module(
    backbone: str, dtype: torch.dtype
) -> None:
    norm = norm_of(backbone, dtype)
    x = 3 * torch.randn(50, len(norm.weight), generator=torch.Generator().manual_seed(2)).to(dtype)
    assert rms_norm(norm, x) is None
    with Lean(True):
        found = rms_norm(norm, x)
        rows = [rms_norm(norm, row[None]) for row in x]
    assert found is not None and found.dtype == dtype
    one_by_one = torch.cat([row for row in rows if row is not None])
    wide = x.double()
    scale = (wide.square().mean(1, keepdim=True) + norm.variance_epsilon).sqrt()
    truth = wide / scale * norm.weight.double()
    allowed = (norm(x).double() - truth).abs().mean()
    for result in (found, one_by_one):
        assert (result.double() - truth).abs().mean() <= 1.5 * allowed


def test_a_norm_of_another_precision_than_its_input_is_called() -> None:
    """As where norms are kept in float32: it says in which precision the rest goes on."""
    norm, x = norm_of("llama", torch.float32), torch.randn(2, 64).bfloat16()
    with Lean(True):
        found = normed(norm, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm(x), rtol=0, atol=0)


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return 2 * out


def with_a_hook(module: nn.Module) -> Any:
    return module.register_forward_hook(doubled).remove


def with_a_hook_before(module: nn.Module) -> Any:
    def twice(module: nn.Module, given: tuple[Tensor]) -> Tensor:
        return 2 * given[0]

    return module.register_forward_pre_hook(twice).remove


def with_another_forward(module: nn.Module) -> Any:
    own = module.forward
    module.forward = lambda x: 2 * own(x)
    return lambda: delattr(module, "forward")


def with_a_hook_on_all(module: nn.Module) -> Any:
    return nn.modules.module.register_module_forward_hook(doubled).remove


@pytest.mark.parametrize(
    "change", [with_a_hook, with_a_hook_before, with_another_forward, with_a_hook_on_all]
)
def test_a_module_that_does_more_is_called(change: Callable[[nn.Module], Any]) -> None:
    module, x = nn.Linear(6, 4, bias=False), torch.arange(12.0).view(2, 6)
    norm = norm_of("llama", torch.float32)
    with torch.no_grad(), Lean(True):
        plain = linear(module, x)
        for changed in (module, norm):
            undo = change(changed)
            try:
                if changed is module:
                    torch.testing.assert_close(linear(module, x), 2 * plain)
                else:
                    assert rms_norm(norm, torch.ones(1, len(norm.weight))) is None
            finally:
                undo()
        torch.testing.assert_close(linear(module, x), plain)


@pytest.mark.parametrize(
    "watch", ["register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_that_somebody_watches_go_through_the_module(
    watch: str, everywhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU a norm is cut short in training, too."""
    monkeypatch.setattr(lean, "one_kernel_pays", lambda x: True)
    norm, seen = norm_of("llama", torch.float32).requires_grad_(True), []
    register = getattr(norm, watch)
    if everywhere:
        name = watch.replace("register_", "register_module_")
        register = getattr(nn.modules.module, name)
    x = torch.ones(2, len(norm.weight), requires_grad=True)
    normed(norm, x).sum().backward()
    handle = register(lambda module, *given: seen.append(module))
    try:
        normed(norm, x).sum().backward()
    finally:
        handle.remove()
    assert seen == [norm]


def test_a_step_leaves_nothing_of_another_default_device_behind() -> None:
    """What is kept for all steps lies where the models lie that take them."""
    for kept in (lean._scalar, attention._nothing):
        kept.cache_clear()
    model, cache = tiny_model("casa"), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[4, 5, 6]]), past_key_values=cache)
        token = torch.tensor([[9]])
        with torch.device("meta"):
            found = model(token, past_key_values=cache).logits
        expected = model(torch.tensor([[4, 5, 6, 9]])).logits[:, -1:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_hook_between_two_tokens_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """No forward pass lies between them that would look at the modules again."""
    model = tiny_model("casa", dtype=torch.float64)
    found: dict[bool, list[Tensor]] = {}
    for steps in (True, False):
        monkeypatch.setattr(model, "decode_steps", steps)
        cache, logits, undo = DynamicCache(), [], []
        frame = random_image(torch.Generator().manual_seed(3), 2, 2)
        points = [[2]]
        with torch.no_grad():
            given = dict(past_key_values=cache, image_embeds_insertion_points=points)
            model(torch.tensor([[4, 5, 6]]), [frame], **given)
            for token in range(4):
                if token == 2:
                    layer = model.model.layers[1]
                    changed = [layer.self_attn.q_proj, layer.fusion.o_proj, layer.input_layernorm]
                    undo = [with_a_hook(module) for module in changed]
                ids = torch.tensor([[7 + token]])
                logits.append(model(ids, past_key_values=cache).logits)
        for remove in undo:
            remove()
        assert (cache.casa.step is not None) == steps
        found[steps] = logits
    for one, expected in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-10)


def test_what_a_hook_keeps_of_a_step_may_be_learned_from() -> None:
    model, cache, kept = tiny_model("casa"), DynamicCache(), []
    model.model.layers[1].mlp.register_forward_hook(lambda module, given, out: kept.append(out))
    with torch.no_grad():
        for ids in ([[4, 5, 6]], [[9]]):
            model(torch.tensor(ids), past_key_values=cache)
    assert cache.casa.step.is_open and [len(out) for out in kept] == [3, 1]
    assert not any(out.is_inference() for out in kept)


def test_a_single_row_does_not_read_the_column_of_a_token_that_is_none() -> None:
    model, cache = tiny_model("casa"), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[4, 5, 6]]), past_key_values=cache)
        model(torch.tensor([[7]]), past_key_values=cache)
        model(torch.tensor([[8]]), past_key_values=cache, finished=[True])
        found = model(torch.tensor([[9]]), past_key_values=cache).logits
        expected = model(torch.tensor([[4, 5, 6, 7, 9]])).logits[:, -1:]
    assert cache.casa.step.is_open
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The model folder once more under another name, as an export brings it."""
    name = "modeling_of_an_export"
    shutil.copytree(Path(lean.__file__).parent, tmp_path / name)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda file: importlib.import_module(f"{name}.{file}")
    for module in [x for x in sys.modules if x.startswith(name)]:
        del sys.modules[module]


def test_an_export_goes_on_with_a_stream_and_the_other_way_round(exported: Any) -> None:
    model = tiny_model("casa")
    config = exported("configuration_casa").CasaConfig(**model.config.to_diff_dict())
    other = exported("modeling_casa").CasaForConditionalGeneration(config).eval()
    other.load_state_dict(model.state_dict())
    ids, frame = torch.tensor([[4, 5, 6, 7, 8]]), random_image(torch.Generator(), 2, 3)
    first = dict(pixel_values=[frame], image_embeds_insertion_points=[[2]])
    with torch.no_grad():
        expected = model(ids, **first).logits[:, 3:]
        for one, two in ((model, other), (other, model)):
            cache = DynamicCache()
            one(ids[:, :3], **first, past_key_values=cache)
            found = [
                each(ids[:, column : column + 1], past_key_values=cache).logits
                for each, column in ((one, 3), (two, 4))
            ]
            torch.testing.assert_close(torch.cat(found, 1), expected, rtol=0, atol=1e-5)


def test_what_a_step_returns_may_be_learned_from() -> None:
    """A step runs in inference mode, whose tensors no backward pass may need."""
    model, cache = tiny_model("casa"), DynamicCache()
    with torch.no_grad():
        model(torch.tensor([[4, 5, 6]]), past_key_values=cache)
        out = model(torch.tensor([[9]]), past_key_values=cache)
    assert cache.casa.step.is_open
    kept = [out.logits, out.last_hidden_state, *cache.casa.step.text.tensors()]
    assert not any(tensor.is_inference() for tensor in kept)
    probe = nn.Linear(out.last_hidden_state.shape[-1], 1)
    probe(out.last_hidden_state).sum().backward()
    torch.testing.assert_close(probe.weight.grad[0], out.last_hidden_state[0, 0])


@every_backbone
def test_rotations_as_products_are_those_of_the_backbone(backbone: str) -> None:
    config = tiny_text_config(backbone=backbone)
    rope, frequencies = backbone_rope(config), rope_frequencies(config, torch.device("cpu"))
    table = rope_table(rope, torch.tensor([0, 7, 301]), frequencies, torch.float64)
    size = (3, 5, config.head_dim if backbone != "qwen2_5_vl" else 16)
    x = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    found = BY_PRODUCT(x, as_products(rope, table))
    torch.testing.assert_close(found, rope(x, table), rtol=0, atol=1e-14)
    narrow = BY_PRODUCT(x.float(), as_products(rope, table))
    assert narrow.dtype == torch.float64  # as the backbone's own
