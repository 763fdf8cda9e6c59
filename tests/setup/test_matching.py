"""Parameters matched by the configuration, counted by transformers' own models and by formulas."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from casa_train.config.compose import compose_config
from casa_train.config.matched import as_given
from casa_train.config.schema import Config, fingerprint
from casa_train.cost.sizes import size_model
from casa_train.errors import UserError
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.report.jobs import differing_fields, job_labels
from casa_train.setup.matching import Matching, match_parameters, new_parameters
from casa_train.setup.model import meta_model
from tests.helpers.tiny import PROPERTY

# The decoder of `demo`, whose vocabulary without a tokenizer is 1024; its tower is as wide.
WIDTH, KEYS, FFN, LAYERS = 128, 64, 384, 3
ATTENTION = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS
GATED = LAYERS * (ATTENTION + 3 * WIDTH * FFN + 3 * WIDTH + 2)
QFORMER_LAYER = (
    2 * (4 * WIDTH * WIDTH + 3 * WIDTH)  # no bias of the keys
    + (4 * WIDTH * WIDTH + 4 * WIDTH)
    + (4 * WIDTH * WIDTH + WIDTH)
    + 4 * 2 * WIDTH  # layer norms
)
# What a mechanism adds by itself; the decoder's own parameters that it drops are taken off.
ADDED = {
    "casa": LAYERS * (ATTENTION + WIDTH),
    "casa fusion.share_parameters=true": 0,
    "cross_attention": LAYERS * (ATTENTION + WIDTH),
    "cross_attention fusion.share_parameters=true": 0,
    "casa fusion.placement=replace fusion.every=2": WIDTH,  # in one block of three
    "casa fusion.placement=before": LAYERS * (ATTENTION + 2 * WIDTH),
    "casa fusion.update_image_tokens=ffn": LAYERS * (ATTENTION + WIDTH),
    "casa fusion.history=all": LAYERS * (ATTENTION + WIDTH),
    "insertion": 0,
    "qformer_insertion_4": 2 * QFORMER_LAYER + 4 * WIDTH + 2 * WIDTH,
    "gated_cross_attention": GATED,
    "hyper_attention": LAYERS * (2 * WIDTH * KEYS + WIDTH + 1),
}


@functools.cache  # a third of a second each
def described(*overrides: str) -> tuple[Config, CasaConfig]:
    given = ["+experiment=demo", "model.tokenizer=none", "dry_run=true", *overrides]
    config = compose_config(given)
    return config, size_model(config, [])


def composed(*overrides: str) -> Config:
    return copy.deepcopy(described(*overrides)[0])


def matched(*overrides: str, wanted: int | None = None) -> Matching:
    """:param wanted: `model.new_parameters`."""
    config, model_config = copy.deepcopy(described(*overrides))
    if wanted is not None:
        config.model.new_parameters = wanted
    return match_parameters(config, model_config)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def plain_parameters(ffn: int) -> int:
    """Those of the decoder and the tower of `demo` as transformers has them."""
    text = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=ffn,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        tie_word_embeddings=True,
    )
    vision = Qwen2_5_VLVisionConfig(
        depth=2, hidden_size=128, intermediate_size=344, num_heads=4, out_hidden_size=WIDTH
    )
    with torch.device("meta"):
        tower = Qwen2_5_VisionTransformerPretrainedModel(vision)
        return parameters(AutoModelForCausalLM.from_config(text)) + parameters(tower)


def built(found: Matching) -> int:
    return parameters(meta_model(found.config, found.model_config))


@pytest.mark.parametrize("mechanism", ADDED)
def test_every_mechanism_has_as_many_as_the_gated_one(mechanism: str) -> None:
    fusion = f"fusion={mechanism}".split()
    found = matched(*fusion, "model.match=gated_cross_attention")
    given = composed(*fusion, "model.match=gated_cross_attention")
    width = found.config.model.backbone.config["intermediate_size"]
    more = 3 * WIDTH * LAYERS * (width - FFN)
    if mechanism == "gated_cross_attention":
        assert width == FFN
    else:
        assert width % 8 == 0 and width > FFN
    new = ADDED[mechanism] + more
    assert abs(new - GATED) <= 0.01 * GATED
    assert built(found) == plain_parameters(FFN) + new == plain_parameters(width) + ADDED[mechanism]
    assert new_parameters(found.config, found.model_config) == new
    # Nothing else is another: the mechanism keeps its options.
    assert found.config.fusion == given.fusion
    assert fingerprint(as_given(found.config)) == fingerprint(given)
    written = found.config.model.matched
    assert written is not None and (written.wanted, written.reached) == (GATED, new)
    assert found.model_config.to_dict() == size_model(found.config, []).to_dict()
    (note,) = found.notes
    assert f"{new:,} new ones" in note and f"{GATED:,} of model.match=gated_cross" in note
    assert (f"{abs(new - GATED) / GATED:.2%}" in note) == (new != GATED)
    assert (f"intermediate_size={width} instead of {FFN}" in note) == (width != FFN)


@given(wanted=st.integers(60_000, 30_000_000), fusion=st.sampled_from(sorted(ADDED)))
@PROPERTY
def test_a_number_is_reached_or_refused(wanted: int, fusion: str) -> None:
    arguments = f"fusion={fusion}".split()
    if ADDED[fusion] > 1.02 * wanted:
        with pytest.raises(UserError, match=f"has {ADDED[fusion]:,} as it is"):
            matched(*arguments, wanted=wanted)
        return
    found = matched(*arguments, wanted=wanted)
    width = found.config.model.backbone.config["intermediate_size"]
    factor = 2 if fusion.startswith("gated") else 1  # its own networks are as wide
    new = ADDED[fusion] + factor * 3 * WIDTH * LAYERS * (width - FFN)
    assert abs(new - wanted) <= (0.01 if width > FFN else 0.02) * wanted
    assert built(found) == plain_parameters(FFN) + new


def test_widths_are_as_kernels_like_them_where_that_is_near_enough() -> None:
    def width(new: int) -> int:
        found: int = matched("fusion=insertion", wanted=new).config.model.backbone.config[
            "intermediate_size"
        ]
        return found - FFN

    column = 3 * WIDTH * LAYERS
    assert width(100 * 64 * column + 31 * column) == 100 * 64  # half a percent off
    assert width(10 * 64 * column + 29 * column) == 10 * 64 + 32  # 4 % off, a multiple of 8 is not
    assert width(51 * column) == 51  # the nearest of 4 would be 2 % off


def test_a_mechanism_is_named_in_one_word_a_file_or_its_fields(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    (tmp_path / "ground.yaml").write_text("mechanism: qformer_insertion\nqueries: 7\nlayers: 1\n")
    own.write_text("defaults: [ground]\nlayers: 3\n")
    asked = {
        "casa": ADDED["casa"],
        "qformer_insertion_4": ADDED["qformer_insertion_4"],
        "{mechanism: hyper_attention, layers: [0, 2]}": ADDED["hyper_attention"] // LAYERS * 2,
        str(own): 3 * QFORMER_LAYER + 7 * WIDTH + 2 * WIDTH,
    }
    for match, new in asked.items():
        written = matched("fusion=insertion", f"model.match={match}").config.model.matched
        assert written is not None and written.wanted == new, match
    assert not matched("model.match=null").notes


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.match=gatd"], "model.match is 'gatd', which cannot be read"),
        (["model.match={every: 2}"], "names no mechanism; expected one of casa, "),
        (
            ["model.match={mechanism: casa, evry: 2}"],
            "model.match is .* does not read \\['evry'\\]",
        ),
        (["model.match={mechanism: toy}"], "model.match is .*'toy' is unknown"),
        (["model.match=casa", "model.new_parameters=7"], "null beside model.match"),
        (
            ["model.match=casa", "model.init_from=e"],
            "model.match is .* none beside model.init_from",
        ),
        (["model.new_parameters=0", "model.init_from=e"], "model.new_parameters is 0; expected no"),
        (["model.new_parameters=-1"], "model.new_parameters is -1; expected a number of param"),
        (["fusion=gated_cross_attention", "model.match=casa"], "has 590,982 as it is"),
        (
            ["fusion=insertion", "model.new_parameters=500"],
            "nearest are 0 .*=384. and 1,152 .*=385",
        ),
        (["fusion=insertion", "model.new_parameters=10000000000000"], "expected at most 2,147"),
    ],
)
def test_what_cannot_be_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        matched(*overrides)


def test_a_stored_configuration_is_not_matched_again() -> None:
    found = matched("fusion=casa", "model.match=gated_cross_attention")
    again = match_parameters(found.config, found.model_config)
    assert (again.config, again.notes) == (found.config, found.notes)
    assert again.model_config is found.model_config
    other = composed("fusion=insertion")
    other.model = found.config.model
    with pytest.raises(UserError, match="model.matched says .* 590,208 new .* it has 442,368"):
        match_parameters(other, size_model(other, []))


def test_jobs_of_a_sweep_are_told_apart_by_what_was_typed() -> None:
    configs = {
        name: matched(f"fusion={name}", "model.match=gated_cross_attention").config
        for name in ("casa", "hyper_attention")
    }
    labels = job_labels(configs, differing_fields(configs))
    assert labels == {"casa": "casa", "hyper_attention": "hyper_attention"}
