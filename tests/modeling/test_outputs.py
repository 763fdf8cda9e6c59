"""What calls return beside logits, and the two names of the cache."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from tests.helpers.stranger import GREEDY
from tests.helpers.tiny import (
    CONFIGS,
    HARD_PACK,
    VOCABULARY,
    fill,
    packed_inputs,
    tiny_model,
    tiny_text_config,
)
from tests.helpers.variants import every_mechanism, padded_batch, shared_model

RETURN = {"return_dict_in_generate": True, **GREEDY}
NAMES = ("past_key_values", "cache")


@pytest.mark.parametrize("backbone", CONFIGS)
@torch.no_grad()
def test_hidden_states_of_text_are_the_plain_backbones(backbone: str) -> None:
    config = tiny_text_config(backbone, layers=3)
    model = tiny_model("casa", text_config=config)
    plain = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    own = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(own)
    ids = torch.arange(12).reshape(2, 6) * 7 % VOCABULARY
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    expected = plain(input_ids=ids, output_hidden_states=True).hidden_states
    assert len(found) == len(expected) == 4
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    options = {"input_ids": ids, "output_hidden_states": True, "output_scores": True, **RETURN}
    options |= {"attention_mask": torch.ones_like(ids), "repetition_penalty": 1.5}
    ours, theirs = model.generate(**options), plain.generate(**options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for one, other in zip(ours.scores, theirs.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    for step, expected_step in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        for one, other in zip(step, expected_step, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@every_mechanism
@torch.no_grad()
def test_hidden_states_beside_images(mechanism: str) -> None:
    """The last ones give the logits, those of a pack and of steps with a cache are the same."""
    model, samples = shared_model(mechanism), fill(HARD_PACK)
    batch = padded_batch(samples)
    whole = model(**batch, output_hidden_states=True)
    mask = batch["attention_mask"].bool()
    assert torch.equal(model.lm_head(whole.hidden_states[-1]), whole.logits)
    packed = model(packed=packed_inputs(samples), output_hidden_states=True).hidden_states
    assert len(packed) == len(whole.hidden_states) == len(model.model.layers) + 1
    for one, other in zip(packed, whole.hidden_states, strict=True):
        torch.testing.assert_close(other[mask], one, rtol=0, atol=1e-9)
        assert not other[~mask].any()
    assert torch.equal(
        whole.hidden_states[0][mask], model.model.embed_tokens(batch["input_ids"])[mask]
    )
    out = model.generate(**batch, output_hidden_states=True, **RETURN)
    longer = torch.cat([mask.long(), torch.ones(len(mask), 6, dtype=torch.long)], 1)
    again = {**batch, "input_ids": out.sequences, "attention_mask": longer}
    expected = model(**again, output_hidden_states=True).hidden_states
    for layer, states in enumerate(expected):
        steps = torch.cat([step[layer] for step in out.hidden_states], 1)
        torch.testing.assert_close(steps, states[:, :-1], rtol=0, atol=1e-9)


def test_the_configuration_asks_as_a_call_does() -> None:
    model, batch = tiny_model(), padded_batch(fill(HARD_PACK))
    logits = model(**batch).logits
    assert model(**batch).hidden_states is None
    given = model(**batch, use_cache=False, return_dict=False)
    assert isinstance(given, tuple) and len(given) == 1 and torch.equal(given[0], logits)
    model.config.return_dict = False
    logits_and_cache = model(**batch, use_cache=True)
    assert isinstance(logits_and_cache, tuple) and len(logits_and_cache) == 2
    assert model(**batch, return_dict=True).logits is not None
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + 6
    model.config.return_dict = True
    model.config.output_hidden_states = True
    assert len(model(**batch).hidden_states) == 3
    assert model(**batch, output_hidden_states=False).hidden_states is None


@every_mechanism
@torch.no_grad()
def test_a_call_begins_a_cache_unless_told_otherwise(mechanism: str) -> None:
    """A step on the cache of a plain call equals the whole; who learns has no use for one."""
    model, samples = tiny_model(mechanism), fill(HARD_PACK)
    batch = padded_batch(samples)
    out = model(**batch)
    following = out.logits[:, -1:].argmax(-1)
    step = model(input_ids=following, past_key_values=out.past_key_values).logits[:, -1]
    ids = torch.cat([batch["input_ids"], following], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(following)], 1)
    whole = {**batch, "input_ids": ids, "attention_mask": mask, "use_cache": False}
    torch.testing.assert_close(step, model(**whole).logits[:, -1], rtol=0, atol=1e-5)

    assert model(**batch, use_cache=False).past_key_values is None
    assert model(**batch, labels=batch["input_ids"]).past_key_values is None
    assert model(**batch, labels=batch["input_ids"], use_cache=True).past_key_values is not None
    assert model.train()(**batch).past_key_values is None
    model.eval().config.text_config.use_cache = False
    assert model(**batch).past_key_values is None
    model.config.use_cache = True
    assert model(**batch).past_key_values is not None


def test_attention_weights_are_refused_by_name() -> None:
    model, batch = tiny_model(), padded_batch(fill(HARD_PACK))
    assert model(**batch, output_attentions=False).attentions is None
    for call in (
        lambda: model(**batch, output_attentions=True),
        lambda: model.generate(**batch, output_attentions=True, **RETURN),
    ):
        with pytest.raises(TypeError, match="output_attentions=True .*image_attention"):
            call()
    model.config._attn_implementation = "eager"
    model.config.output_attentions = True
    with pytest.raises(TypeError, match="output_attentions=True .*image_attention"):
        model(**batch)


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_has_two_names(name: str) -> None:
    """In calls and in outputs, and no release warns of ours."""
    model, batch = shared_model("casa", torch.float32), padded_batch(fill(HARD_PACK))
    expected = model.generate(**batch, **GREEDY)
    following = {"input_ids": batch["input_ids"][:, :1]}
    cache = DynamicCache()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model.generate(**batch, **{name: cache}, **RETURN)
    assert out.cache is out.past_key_values is cache
    assert torch.equal(out.sequences, expected)
    held = cache.get_seq_length()
    step = model(**following, **{name: cache})
    assert step.cache is step.past_key_values is cache and cache.get_seq_length() == held + 1
    inputs = model.prepare_inputs_for_generation(expected, **{name: cache})
    assert [v for v in inputs.values() if v is cache]
    assert inputs["input_ids"].shape[1] == expected.shape[1] - cache.casa.columns

    stream = DynamicCache()
    first = model.generate_from_image(**batch, **{name: stream}, **GREEDY)
    assert torch.equal(first, expected) and stream.casa.columns == expected.shape[1] - 1
    more = model.generate_from_image(
        batch["input_ids"], None, None, reset_streaming=False, **{name: stream}, **RETURN
    )
    assert torch.equal(more.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert more.sequences.shape == expected.shape and more.cache is stream
    with pytest.raises(ValueError, match="holds a stream, but reset_streaming"):
        model.generate_from_image(**batch, **{name: stream}, **GREEDY)


@pytest.mark.parametrize(
    "call",
    [
        lambda m, b, caches: m(**b, **caches),
        lambda m, b, caches: m.generate(**b, **caches, **GREEDY),
        lambda m, b, caches: m.generate_from_image(**b, **caches, **GREEDY),
        lambda m, b, caches: m.prepare_inputs_for_generation(b["input_ids"], **caches),
    ],
)
def test_two_caches_are_refused(call: Callable[..., Any]) -> None:
    model, batch = shared_model("casa", torch.float32), padded_batch(fill(HARD_PACK))
    with pytest.raises(ValueError, match="past_key_values and cache .* two different caches"):
        call(model, batch, {name: DynamicCache() for name in NAMES})
    cache = DynamicCache()
    call(model, batch, {name: cache for name in NAMES})


def test_a_stream_never_runs_a_step_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5 does on mps, then crops the cache, whose stream would not go back."""
    utils = pytest.importorskip("transformers.generation.utils")
    if not hasattr(utils, "DeferredStopCheck"):
        pytest.skip("this release decides every step at once")
    asked = []
    original = utils.DeferredStopCheck.is_supported

    def on_mps(device: Any, *arguments: Any, **options: Any) -> bool:
        asked.append(original(torch.device("mps"), *arguments, **options))
        return bool(asked[-1])

    monkeypatch.setattr(utils.DeferredStopCheck, "is_supported", staticmethod(on_mps))
    model, batch = shared_model("casa", torch.float32), padded_batch(fill(HARD_PACK))
    cache = DynamicCache()
    out = model.generate_from_image(**batch, cache=cache, **GREEDY)
    assert asked == [False] and cache.casa.columns == out.shape[1] - 1


def test_a_place_for_every_generation_config() -> None:
    """A configuration given by place is checked like one given by name."""
    from transformers import GenerationConfig

    model = shared_model("casa", torch.float32)
    with pytest.raises(ValueError, match="num_beams=2 is not supported"):
        model.generate(torch.zeros(1, 2, dtype=torch.long), GenerationConfig(num_beams=2))


@torch.no_grad()
def test_inputs_of_another_form_are_taken_or_named() -> None:
    model, batch = tiny_model(), padded_batch(fill(HARD_PACK[:1]))
    ids, images = batch["input_ids"], batch["pixel_values"]
    expected = model(**batch).logits
    for given in ([i.numpy() for i in images], [i.float() for i in images], tuple(images)):
        assert torch.equal(model(**{**batch, "pixel_values": given}).logits, expected)
    dark = [0 * images[0], 0 * images[1] + 1, *images[2:]]
    of_bytes = model(**{**batch, "pixel_values": dark}).logits
    assert torch.equal(
        model(**{**batch, "pixel_values": [i.float() for i in dark]}).logits, of_bytes
    )

    points = batch["image_embeds_insertion_points"]
    for changed, error, message in (
        ({"input_ids": ids[0]}, ValueError, r"input_ids has shape \(7,\); expected \(B, T\)"),
        ({"input_ids": ids.tolist()}, TypeError, "input_ids is a list; expected"),
        ({"pixel_values": ["a.png"]}, TypeError, r"pixel_values\[0\] is a str; expected"),
        (
            {"pixel_values": [images[0], *(i / 255 for i in images[1:])]},
            ValueError,
            r"pixel_values\[1\] holds values from .* expected 0..255",
        ),
        (
            {"pixel_values": [i / 127.5 - 1 for i in images]},
            ValueError,
            r"pixel_values\[0\] holds values from -\S+ to .* expected 0..255",
        ),
        (
            {"image_embeds_insertion_points": points[0]},
            ValueError,
            "expected one list of columns for each sample",
        ),
        (
            {"past_key_values": ((ids, ids), (ids, ids))},
            TypeError,
            r"past_key_values is a tuple, .* pass DynamicCache\(\)",
        ),
    ):
        for call in (model, model.generate, model.generate_from_image):
            with pytest.raises(error, match=message):
                call(**{**batch, **changed})
