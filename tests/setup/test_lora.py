"""LoRA on the backbone: what adapters stand beside, where they begin, what they compute."""

from __future__ import annotations

import copy
import re
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config, fingerprint
from casa_train.cost.sizes import size_model
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.setup.lora import adapter_ranks, is_adapter, merge_adapters, plain_parameters
from casa_train.setup.model import meta_model
from casa_train.setup.optim import build_groups
from casa_train.setup.pretrained import Stored
from casa_train.setup.weights import Start, start_weights
from casa_train.training.memory_probe import MemoryProbe
from tests.helpers.adapted import adapt, add_by_hand, factors
from tests.helpers.commands import ROOT, TINY
from tests.helpers.counted_models import FUSIONS, names
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs, tiny_model, tiny_text_config

LORA = "model.backbone.trainable=lora"


def composed(*more: str) -> Config:
    return compose_config(["+experiment=demo", *TINY, "dry_run=true", *more])


def built(*more: str) -> tuple[Config, CasaForConditionalGeneration]:
    """As a run builds it, on the meta device."""
    config = composed(*more)
    return config, meta_model(config, size_model(config, []))


def started(*more: str) -> CasaForConditionalGeneration:
    """With a run's first values, drawn from its seed."""
    config, model = built(*more)
    start = Start(Stored(), [], copies=True)
    start_weights(model, start, config.seed, torch.device("cpu"), torch.float32, lambda _: None)
    return model.eval()


def adapted_linears(model: nn.Module) -> list[str]:
    return [name.removeprefix("model.").removesuffix(".weight") for name in factors(model)]


# ------------------------------------------------------------------------------ what gets adapters


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("null", 14),
        ("[q_proj]", 2),
        ("[self_attn.v_proj,mlp.up_proj]", 4),
        ("[layers.1.*]", 7),
        ("['layers\\.0\\.self_attn\\.[qk]_proj',down_proj]", 4),
        ("['.*']", 14),
        ("['(?i)Q_PROJ']", 2),
        ("['^layers\\.1\\..*q_proj']", 1),
    ],
)
def test_targets_are_linears_of_the_decoders_layers_alone(targets: str, expected: int) -> None:
    config, model = built(LORA, f"model.backbone.lora.targets={targets}")
    found = adapted_linears(model)
    assert len(found) == expected
    assert all(name.startswith("layers.") and ".fusion." not in name for name in found)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    of_backbone = [n for n in trained if n.startswith(("model.", "lm_head")) and "fusion" not in n]
    assert sorted(of_backbone) == sorted(n for n in trained if is_adapter(n))
    assert len(of_backbone) == 2 * expected
    # What else trained goes on training: the fusion, and all of the tower.
    frozen = {n for n, p in built("model.backbone.trainable=false")[1].named_parameters()}
    assert {n for n in frozen if ".fusion." in n or n.startswith("visual.")} <= trained


def test_the_manuals_example_means_the_layers_that_it_names() -> None:
    """Layers 0 to 3 of eleven: `layers.1.*` would be layer 10, too."""
    found = re.search(r"`\['(layers[^']*)'\]`", (ROOT / "conf" / "README.md").read_text())
    assert found is not None
    targets = f"model.backbone.lora.targets=['{found[1]}']"
    _, model = built(LORA, "model.backbone.config.num_hidden_layers=11", targets)
    assert {name.split(".")[1] for name in adapted_linears(model)} == {"0", "1", "2", "3"}


def test_blocks_that_dropped_self_attention_have_none_there() -> None:
    _, model = built(LORA, "fusion.placement=replace", "fusion.every=2")
    assert sum("layers.0." in name for name in adapted_linears(model)) == 7
    assert sum("layers.1." in name for name in adapted_linears(model)) == 3
    with pytest.raises(UserError, match="'q_proj' matches no linear .*gate_proj"):
        built(LORA, "fusion.placement=replace", "model.backbone.lora.targets=[up_proj,q_proj]")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (
            "query",
            [
                "'query' matches no linear of the text decoder's layers;",
                "mlp.gate_proj, mlp.up_proj",
            ],
        ),
        ("proj", ["'proj' matches no linear"]),
        ("embed_tokens", ["layers, but embed_tokens (Embedding);"]),
        ("input_layernorm", ["layers, but layers.0.input_layernorm (LlamaRMSNorm);"]),
        ("lm_head", ["matches no linear", "embeddings and head take no adapters"]),
        ("fusion.q_proj", ["layers, but layers.0.fusion.q_proj (Linear);", "Fusion, vision tower"]),
        ("visual.*", ["matches no linear"]),
    ],
)
def test_a_target_that_is_none_is_named(target: str, words: list[str]) -> None:
    with pytest.raises(UserError, match="lora.targets") as caught:
        built(LORA, f"model.backbone.lora.targets=['{target}']")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.backbone.trainable=lore"], ["'lore'", "true, false or lora"]),
        (["model.backbone.trainable=null"], ["model.backbone.trainable is None"]),
        (["model.backbone.lora.rank=8"], ["lora.rank is 8", "trainable=lora beside it"]),
        (["model.backbone.lora.targets=[q_proj]"], ["lora.targets is ['q_proj']", "beside it"]),
        (["export.lora=keep"], ["export.lora is 'keep'", "trainable=lora"]),
        ([LORA, "export.lora=drop"], ["export.lora is 'drop'", "merge or keep"]),
        ([LORA, "model.backbone.lora.rank=0"], ["lora.rank is 0", "at least 1"]),
        ([LORA, "model.backbone.lora.alpha=-4"], ["lora.alpha is -4", "a positive number"]),
        ([LORA, "model.backbone.lora.dropout=1"], ["lora.dropout is 1", "below 1"]),
        ([LORA, "model.backbone.lora.dropout=-0.1"], ["lora.dropout is -0.1"]),
        ([LORA, "model.backbone.lora.targets=[]"], ["lora.targets is []", "null for all"]),
        ([LORA, "model.backbone.lora.targets=['q(']"], ["holds 'q('", "regular expression"]),
        ([LORA, "model.backbone.lora.r=4"], ["model.backbone.lora.r", "rank, targets"]),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(
    overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        composed(*overrides)
    for word in words:
        assert word in str(caught.value)


def test_without_peft_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="need the package peft.*pip install"):
        built(LORA)


# ------------------------------------------------------------------------------------- the group


def test_adapters_are_a_group_with_the_rate_of_new_parameters() -> None:
    config, model = built(LORA, "optim.groups.fusion.lr=0.0123", "optim.groups.backbone.lr=7")
    groups = {g["name"]: g for g in build_groups(model.named_parameters(), config.optim.groups)}
    assert sorted(groups["lora"]["names"]) == sorted(
        name for name, _ in model.named_parameters() if ".lora_" in name
    )
    assert groups["lora"]["base_lr"] == groups["fusion"]["base_lr"] == 0.0123
    assert "backbone" not in groups
    own, model = built(LORA, "optim.groups.lora.lr=0.3", "optim.groups.lora.weight_decay=0.2")
    groups = {g["name"]: g for g in build_groups(model.named_parameters(), own.optim.groups)}
    assert (groups["lora"]["base_lr"], groups["lora"]["weight_decay"]) == (0.3, 0.2)
    with pytest.raises(UserError, match=r"parameter 'lora\.model\.layers.*matches no group"):
        without = {k: v for k, v in own.optim.groups.items() if k != "lora"}
        build_groups(model.named_parameters(), without)


def test_runs_without_adapters_go_on_whatever_their_group_says() -> None:
    rate = "optim.groups.lora.lr=0.77"
    assert fingerprint(composed(rate)) == fingerprint(composed())
    assert fingerprint(composed(LORA, rate)) != fingerprint(composed(LORA))
    assert fingerprint(composed(LORA, "model.backbone.lora.rank=7")) != fingerprint(composed(LORA))


# ------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("fusion", [["fusion=casa"], ["fusion=hyper_attention"]], ids=["c", "h"])
def test_a_run_begins_as_the_frozen_one_does(fusion: list[str]) -> None:
    frozen = started("model.backbone.trainable=false", *fusion)
    adapted = started(LORA, "model.backbone.lora.rank=5", *fusion)
    expected = dict(frozen.named_parameters())
    found = plain_parameters(adapted)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    downs, ups = zip(*factors(adapted).values(), strict=True)
    assert all(down.shape[0] == 5 and bool(down.any()) for down in downs)
    assert not any(bool(up.any()) for up in ups)
    # No two begin alike, and none as the linears of the model do.
    assert len({float(down.detach().sum()) for down in downs}) == len(downs)
    bound = 1 / downs[0].shape[1] ** 0.5  # of torch's linears, and of peft's adapters
    assert 0.9 * bound < float(downs[0].detach().abs().max()) <= bound
    inputs = packed_inputs(fill(HARD_PACK))
    with torch.no_grad():
        assert torch.equal(adapted(packed=inputs).logits, frozen(packed=inputs).logits)


# ------------------------------------------------------------------------------ what is computed


def twins(
    fusion: dict[str, Any], targets: list[str] | None = None, backbone: str = "llama"
) -> tuple[CasaForConditionalGeneration, CasaForConditionalGeneration]:
    """A model with adapters, and one whose weights hold them, in float64."""
    made = []
    for _ in range(2):
        text = tiny_text_config(backbone, layers=3)
        made.append(tiny_model(**fusion, text_config=text, dtype=torch.float64))
    adapted, plain = made
    adapt(adapted, targets)
    add_by_hand(plain, adapted)
    return adapted, plain


def gradients(model: nn.Module, blocks: str = "none", compiler: str | None = None) -> Tensor:
    """Of a loss that weighs all logits; the logits are returned."""
    model.train()
    model.checkpoint_activations(blocks)  # type: ignore[operator]
    model.compile_regions(compiler)  # type: ignore[operator]
    logits: Tensor = model(packed=packed_inputs(fill(HARD_PACK))).logits
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    (logits * weights).sum().backward()
    return logits.detach()


@pytest.mark.parametrize("fusion", FUSIONS, ids=names)
def test_logits_and_gradients_are_those_of_weights_that_hold_the_adapters(
    fusion: dict[str, Any],
) -> None:
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, by the chain rule: shared projections (D1) are
    the adapted ones, for text and for images.
    """
    adapted, plain = twins(fusion)
    plain.requires_grad_(True)
    torch.testing.assert_close(gradients(adapted), gradients(plain), rtol=1e-10, atol=1e-10)
    of_plain = {name: p.grad for name, p in plain.named_parameters()}
    scale = 5.0 / 3
    checked = factors(adapted)
    assert len(checked) == 21 - 4 * sum(layer.self_attn is None for layer in plain.model.layers)
    for name, (down, up) in checked.items():
        of_weight = of_plain[name]
        assert of_weight is not None and down.grad is not None and up.grad is not None
        torch.testing.assert_close(up.grad, scale * of_weight @ down.T, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(down.grad, scale * up.T @ of_weight, rtol=1e-8, atol=1e-10)
    for name, parameter in plain_parameters(adapted).items():
        if ".fusion." in name:
            torch.testing.assert_close(parameter.grad, of_plain[name], rtol=1e-8, atol=1e-10)
        elif not name.startswith(("visual.", "adapter.", "resampler.")):
            assert parameter.grad is None, name


@pytest.mark.parametrize("backbone", ["helium", "qwen2", "qwen2_5_vl", "qwen3"])
def test_adapters_of_other_backbones(backbone: str) -> None:
    """Biases, and positions of three axes."""
    adapted, plain = twins({"mechanism": "casa"}, ["q_proj", "v_proj", "down_proj"], backbone)
    logits = gradients(adapted)
    torch.testing.assert_close(logits, gradients(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("blocks", "compiler"), [("all", None), ("none", "aot_eager"), ("decoder", "aot_eager")]
)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_checkpointed_and_compiled_blocks_run_the_adapters(
    blocks: str, compiler: str | None, shared: bool
) -> None:
    model = adapt(tiny_model("casa", share_parameters=shared))
    expected = gradients(model)
    before = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.testing.assert_close(gradients(model, blocks, compiler), expected)
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", ["decoder", "all"])
def test_a_checkpointed_block_leaves_out_the_same_numbers_again(blocks: str) -> None:
    model = adapt(tiny_model("casa"), dropout=0.4)
    found = []
    for chosen in ("none", blocks, blocks):
        torch.manual_seed(8 if len(found) < 2 else 9)
        model.zero_grad()
        logits = gradients(model, chosen)
        of = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits, copy.deepcopy(of)))
    (kept, expected), (again, repeated), (other, _) = found
    assert torch.equal(kept, again) and not torch.equal(kept, other)
    assert all(torch.equal(repeated[name], expected[name]) for name in expected)


def test_dropout_is_of_training_alone() -> None:
    model, without = (adapt(tiny_model("casa"), dropout=p) for p in (0.4, 0.0))
    inputs = packed_inputs(fill(HARD_PACK))
    with torch.no_grad():
        assert torch.equal(model(packed=inputs).logits, without(packed=inputs).logits)
        assert not torch.equal(model.train()(packed=inputs).logits, without(packed=inputs).logits)


@pytest.mark.parametrize("fusion", FUSIONS[:3], ids=names)
def test_streams_and_answers_are_those_of_merged_weights(fusion: dict[str, Any]) -> None:
    """Decode steps, joint image keys and lean linears read weights by themselves."""
    adapted, plain = twins(fusion)
    sample = fill(HARD_PACK)[2]
    batch = {
        "input_ids": sample.ids[None],
        "pixel_values": sample.images,
        "image_embeds_insertion_points": [list(sample.layout.points)],
    }
    answers = []
    for model in (adapted, plain):
        cache = DynamicCache()
        options = {"past_key_values": cache, "max_new_tokens": 9, "do_sample": False}
        out = model.generate_from_image(**batch, **options, output_logits=True)
        answers.append((out, [layer.keys for layer in cache.layers]))
    assert torch.equal(answers[0][0], answers[1][0])
    for one, other in zip(answers[0][1], answers[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_a_merge_is_the_sum_by_hand_and_leaves_plain_linears() -> None:
    adapted, plain = twins({"mechanism": "casa"}, ["o_proj", "layers.1.mlp.*"])
    merge_adapters(adapted)
    assert not any("lora" in name for name, _ in adapted.named_modules())
    expected = dict(plain.named_parameters())
    found = dict(adapted.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], rtol=1e-14, atol=1e-14)
    broken = adapt(tiny_model("casa"), ["o_proj"])
    next(iter(factors(broken).values()))[0].data.fill_(float("nan"))
    with pytest.raises(UserError, match="cannot be merged.*NaN"):
        merge_adapters(broken)


# ------------------------------------------------------------------------------------- the costs


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["layers.1.*"]], ids=str)
def test_ranks_are_found_by_layer_and_linear(targets: list[str] | None) -> None:
    model = adapt(tiny_model("casa"), targets)
    ranks = adapter_ranks(model)
    assert set(ranks.values()) == {3}
    assert len(ranks) == len(factors(model))
    assert all(int(key.split(".")[0]) in (0, 1) for key in ranks)
    assert ("0.q_proj" in ranks) == (targets != ["layers.1.*"])


class Draws:
    """An engine whose passes draw random numbers, as a dropout does."""

    def __init__(self) -> None:
        config = size_model(composed(), [])
        self.module = SimpleNamespace(config=config)
        self.drawn: list[Tensor] = []

    def forward(self, **inputs: Any) -> Any:
        self.drawn.append(torch.rand(3))
        rows = len(inputs["packed"].input_ids)
        return SimpleNamespace(logits=torch.zeros(rows, 1024, requires_grad=True))

    def backward(self, loss: Tensor) -> None:
        self.drawn.append(torch.rand(3))

    def forget_gradients(self) -> None: ...

    def make_moments(self) -> None: ...


def test_the_worst_case_of_a_start_takes_no_random_numbers_from_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, engine = composed("trainer.worst_case=true"), Draws()
    probe = "casa_train.training.memory_probe"
    monkeypatch.setattr(f"{probe}.exchange", lambda ranks, report, patient: [report])
    before = torch.get_rng_state()
    MemoryProbe(config, Ranks(), engine, fresh=True).begin(SimpleNamespace(step=0))  # type: ignore[arg-type]
    assert len(engine.drawn) == 4
    assert torch.equal(torch.get_rng_state(), before)
