"""Text decoders one by one: transformers' logits, and what of theirs is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3TextConfig, LlamaConfig

from casa_train.modeling import backbones, configuration_casa
from casa_train.modeling.backbones import backbone_named
from casa_train.modeling.block import DecoderContext
from casa_train.modeling.configuration_casa import ROPE_IN_ONE_DICT, CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.rope import RotateHalves, rope_frequencies, rope_settings
from casa_train.modeling.windows import Chunk
from tests.helpers.tiny import CONFIGS, VOCABULARY, tiny_model, tiny_text_config

every_kind = pytest.mark.parametrize("kind", CONFIGS)
has_smollm3 = pytest.mark.skipif("smollm3" not in CONFIGS, reason="from transformers 4.53 on")


def twins(kind: str, **options: Any) -> tuple[CasaForConditionalGeneration, nn.Module]:
    """A model of ours, and transformers' own with the weights of its backbone."""
    text = tiny_text_config(kind, layers=4, **options)
    ours = tiny_model("casa", text_config=text)
    plain = AutoModelForCausalLM.from_config(text).eval()
    own = {name: value for name, value in ours.state_dict().items() if ".fusion." not in name}
    wrong = plain.load_state_dict({k: v for k, v in own.items() if "visual" not in k}, strict=False)
    assert not wrong.unexpected_keys and not [k for k in wrong.missing_keys if "inv_freq" not in k]
    return ours, plain


def text_ids(rows: int, tokens: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(3))


@every_kind
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_text_is_transformers_bit_for_bit(kind: str, tied: bool) -> None:
    """Past the original length of Llama 3.1's RoPE, too."""
    ours, plain = twins(kind, tie_word_embeddings=tied)
    ids = text_ids(2, 150)
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@every_kind
@pytest.mark.parametrize("stepped", [True, False])
@torch.no_grad()
def test_padded_and_cached_text_is_transformers(kind: str, stepped: bool) -> None:
    """But for the rounding of other kernels: transformers masks where we cut samples apart."""
    ours, plain = twins(kind)
    ours.decode_steps = stepped
    ids, mask = text_ids(3, 90), torch.ones(3, 90, dtype=torch.long)
    mask[1, :40] = mask[2, :81] = 0
    caches = DynamicCache(), DynamicCache()
    for columns in (slice(0, 84), *(slice(i, i + 1) for i in range(84, 90))):
        given = {"input_ids": ids[:, columns], "attention_mask": mask[:, : columns.stop]}
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, columns]
        found = ours(**given, past_key_values=caches[0]).logits
        wanted = plain(**given, past_key_values=caches[1], position_ids=places).logits
        real = mask[:, columns].bool()
        assert wanted[real].std() > 0.5  # the tolerance is small beside what is compared
        torch.testing.assert_close(found[real], wanted[real], rtol=0, atol=1e-5)
    assert (caches[0].casa.step is not None) == stepped


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_heads_wider_than_the_model_and_biases(bias: bool) -> None:
    """As Qwen3's sizes have them: 4 heads of 40 beside a width of 64."""
    ours, plain = twins("qwen3", head_dim=40, attention_bias=bias)
    attention = ours.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (160, 64)
    assert attention.q_norm.weight.shape == attention.k_norm.weight.shape == (40,)
    assert (attention.o_proj.bias is not None) == bias
    ids = text_ids(1, 50)
    assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_frequencies_of_llama_3_are_the_published_rule(factor: float) -> None:
    """Of Llama 3.1 (8) and 3.2 (32): each frequency, in float64 by the words of the rule."""
    rope = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=rope,
    )
    found = rope_frequencies(config, torch.device("cpu"))
    kinds = []
    for i, value in enumerate(found.values.tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        rounds = 8192 * plain / (2 * math.pi)  # in a text of the original length
        kept = min(max((rounds - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        wanted = kept * plain + (1 - kept) * plain / factor
        assert math.isclose(value, wanted, rel_tol=1e-5), i
        kinds.append("whole" if kept == 1 else "slow" if kept == 0 else "mixed")
    assert found.scale == 1.0 and {"whole", "slow", "mixed"} == set(kinds)


@has_smollm3
def test_every_fourth_layer_has_no_rope_unless_it_is_said() -> None:
    """transformers' own default, which published configurations write out."""
    text = CONFIGS["smollm3"](
        **{**tiny_text_config("smollm3", layers=5).to_dict(), "no_rope_layers": None}
    )
    model = tiny_model("casa", text_config=text)
    assert [layer.turned for layer in model.model.layers] == [True, True, True, False, True]


def test_layers_on_another_device_have_their_own_tables_without_rope() -> None:
    """Whichever context was asked first."""
    model = tiny_model("casa")
    chunks = [Chunk(3)]
    plan = model.mechanism.plan(chunks, None, None, torch.device("cpu"))
    table = (torch.zeros(3, 1, 16), torch.zeros(3, 1, 16))
    here = DecoderContext(model.mechanism, plan, RotateHalves(), table, table, table, "sdpa")
    x = torch.randn(3, 4, 16)
    assert here.without_rope().rope(x, table) is x and not here.rope(x, table).any()
    there = here.on(torch.device("meta"))
    for context in (there, there.without_rope()):
        assert context.stream_table[0].is_meta and context.plan.stream_positions.is_meta
    assert here.without_rope() is here.without_rope() and not here.still.stream_table[0].is_meta


@has_smollm3
def test_too_few_layers_are_named() -> None:
    values = {"model_type": "smollm3", "num_hidden_layers": 3, "no_rope_layers": [1, 0]}
    with pytest.raises(ValueError, match=r"no_rope_layers \[1, 0\]; expected a number for each of"):
        CasaConfig(text_config=values)


def test_rope_in_the_words_of_transformers_5_is_read_by_either_generation() -> None:
    """A directory that 5.x saved holds these alone; 4.51.3 would go on with its default theta."""
    stretched = {"rope_type": "linear", "factor": 4.0}
    for rope in ({"rope_type": "default"}, stretched):
        said = {"rope_theta": 70000.0, **rope}
        config = CasaConfig(text_config={"model_type": "llama", "rope_parameters": said})
        assert rope_settings(config.text_config) == said
        again = CasaConfig(**config.to_dict())
        assert rope_settings(again.text_config) == said


# What is refused


SLIDING = ["full_attention", "sliding_attention"]
WHOLE = "self-attention here always sees the whole sample"
REFUSED = [
    (
        ("mistral", {"sliding_window": 7}),
        "'mistral' with sliding_window=7 is not supported: .*Set it to null",
    ),
    (
        ("mistral", {"layer_types": SLIDING}),
        r"'mistral' with layer_types \['sliding_attention'\] is not",
    ),
    (("qwen2", {"use_sliding_window": True}), "'qwen2' with use_sliding_window=true is not"),
    (("qwen3", {"use_sliding_window": True}), "'qwen3' with use_sliding_window=true is not"),
    # Layers may have windows although the switch beside them is off.
    (("qwen2", {"layer_types": SLIDING}), r"'qwen2' with layer_types \['sliding_attention'\] is"),
    (("qwen3", {"layer_types": SLIDING}), r"'qwen3' with layer_types \['sliding_attention'\] is"),
]
REFUSED += [
    pytest.param(("smollm3", options), words, marks=has_smollm3)
    for options, words in [
        (
            {"use_sliding_window": True, "sliding_window": 8},
            "'smollm3' with use_sliding_window=true is not",
        ),
        ({"layer_types": SLIDING}, r"'smollm3' with layer_types \['sliding_attention'\] is"),
    ]
]


@pytest.mark.parametrize(("given", "words"), REFUSED)
def test_what_is_not_reproduced_is_refused_by_name(
    given: tuple[str, dict[str, Any]], words: str
) -> None:
    kind, options = given
    with pytest.raises(ValueError, match=words) as caught:
        tiny_model(text_config=tiny_text_config(kind, **options))
    assert WHOLE in str(caught.value)


def test_a_dropout_of_attention_is_refused() -> None:
    """Which transformers applies in training mode, and nothing here does."""
    with pytest.raises(ValueError, match=r"'qwen3' with attention_dropout=0\.2 is.*Set it to 0"):
        tiny_model(text_config=tiny_text_config("qwen3", attention_dropout=0.2))


@pytest.mark.skipif(not ROPE_IN_ONE_DICT, reason="transformers 4.51 has one RoPE a model")
def test_rope_settings_by_kind_of_layer_are_refused() -> None:
    config = tiny_text_config("qwen3")
    config.rope_parameters = {"full_attention": {"rope_theta": 9000.0, "rope_type": "default"}}
    with pytest.raises(
        ValueError, match=r"for each of \['full_attention'\] is not.*one rope_theta"
    ):
        tiny_model(text_config=config)


def test_other_families_are_refused_by_name() -> None:
    gemma = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=VOCABULARY,
    )
    with pytest.raises(ValueError, match="'gemma3_text' is not supported; choose one of .*'qwen3'"):
        tiny_model(text_config=gemma)


def test_a_backbone_of_a_later_release_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 4.51.3 meets an export that a newer one wrote."""
    known = {k: v for k, v in configuration_casa.CONFIG_MAPPING.items() if k != "smollm3"}
    monkeypatch.setattr(configuration_casa, "CONFIG_MAPPING", known)
    left = {k: v for k, v in backbones.BACKBONES.items() if k != "smollm3"}
    monkeypatch.setattr(backbones, "BACKBONES", left)
    needs = r"'smollm3' needs transformers 4\.53 or newer, this is \d"
    with pytest.raises(ValueError, match=needs):
        CasaConfig(text_config={"model_type": "smollm3", "hidden_size": 64})
    with pytest.raises(ValueError, match=needs):
        backbone_named("smollm3")
