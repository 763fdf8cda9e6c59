"""Parameters matched by the configuration, counted by transformers' own models and by formulas."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

from casa_train.config.compose import compose_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.matched import as_given
from casa_train.config.schema import Config, fingerprint
from casa_train.cost.dry_run import dry_run
from casa_train.cost.sizes import size_model
from casa_train.errors import UserError
from casa_train.export.from_run import export
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.report.jobs import differing_fields, job_labels
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.setup.equal_parameters import Matching, match_parameters, new_parameters
from casa_train.setup.model import meta_model
from tests.helpers.commands import run, train_command
from tests.helpers.runs import short_run
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
    "casa_shared": 0,
    "casa_replace": WIDTH,  # in one block of three
    "casa_ffn": LAYERS * (ATTENTION + WIDTH),
    "casa_history": LAYERS * (ATTENTION + WIDTH),
    "casa fusion.placement=before": LAYERS * (ATTENTION + 2 * WIDTH),
    "cross_attention": LAYERS * (ATTENTION + WIDTH),
    "cross_attention_shared": 0,
    "insertion": 0,
    "qformer_insertion_2": 2 * QFORMER_LAYER + 2 * WIDTH + 2 * WIDTH,
    "gated_cross_attention": GATED,
    "hyper_attention": LAYERS * (2 * WIDTH * KEYS + WIDTH + 1),
}
SWEEP = yaml.safe_load((CONF_DIR / "sweep" / "abilities.yaml").read_text())


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


def test_every_mechanism_of_the_comparison_is_tried() -> None:
    assert set(SWEEP["hydra"]["sweeper"]["params"]["fusion"].split(",")) < set(ADDED)


@given(wanted=st.integers(60_000, 30_000_000), fusion=st.sampled_from(sorted(ADDED)))
@settings(PROPERTY, max_examples=15)
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
        "qformer_insertion_2": ADDED["qformer_insertion_2"],
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


@pytest.mark.parametrize("name", ["gated_cross_attention", "qformer_insertion"])
def test_runs_go_on_that_began_before_own_widths(name: str) -> None:
    now = composed(f"fusion={name}")
    before, other = copy.deepcopy(now), copy.deepcopy(now)
    assert before.fusion.pop("ffn_width") == 0
    other.fusion["ffn_width"] = 7
    assert fingerprint(before) == fingerprint(now) != fingerprint(other)


def test_adapters_count_on_both_sides() -> None:
    """LoRA of rank 4 beside the wider networks, and none where self-attention was replaced."""
    lora = ["model.backbone.trainable=lora", "model.backbone.lora.rank=4"]
    found = matched("fusion=casa_replace", *lora, "model.match=gated_cross_attention")
    width = found.config.model.backbone.config["intermediate_size"]
    column = LAYERS * (3 * WIDTH + 3 * 4)
    dropped = 4 * (2 * (WIDTH + WIDTH) + 2 * (WIDTH + KEYS))  # q and o, k and v of one block
    new = WIDTH - dropped + column * (width - FFN)
    assert new_parameters(found.config, found.model_config) == new
    assert abs(new - GATED) <= 0.01 * GATED
    plain = matched("fusion=insertion", *lora)
    assert built(found) - built(plain) == new


def test_a_stored_configuration_is_not_matched_again() -> None:
    found = matched("fusion=casa", "model.match=gated_cross_attention")
    again = match_parameters(found.config, found.model_config)
    assert (again.config, again.notes) == (found.config, found.notes)
    assert again.model_config is found.model_config
    other = composed("fusion=insertion")
    other.model = found.config.model
    with pytest.raises(UserError, match="model.matched says .* 590,208 new .* it has 442,368"):
        match_parameters(other, size_model(other, []))


def test_a_dry_run_says_what_was_chosen() -> None:
    lines = dry_run(composed("fusion=hyper_attention", "model.match=gated_cross_attention"))
    text = " ".join(" ".join(lines).split())
    new = ADDED["hyper_attention"] + 3 * WIDTH * LAYERS * (856 - FFN)
    assert f"new {new:,} parameters more than with fusion=insertion parameters matched" in text
    assert "0.39% more than the 590,982 of model.match=gated_cross_attention: model.back" in text
    assert "model.backbone.config.intermediate_size=856 instead of 384 Parameters" in text
    decoder = plain_parameters(856) - plain_parameters(1) + LAYERS * (3 * WIDTH + ATTENTION)
    norms = (2 * LAYERS + 1) * WIDTH
    assert f"text backbone {decoder + 1024 * WIDTH + norms:,} 0" in text
    unmatched = dry_run(composed("fusion=casa"))
    assert f"  new        {ADDED['casa']:,} parameters more than with fusion=insertion" in unmatched


def test_jobs_of_a_sweep_are_told_apart_by_what_was_typed() -> None:
    configs = {
        name: matched(f"fusion={name}", "model.match=gated_cross_attention").config
        for name in ("casa", "hyper_attention")
    }
    labels = job_labels(configs, differing_fields(configs))
    assert labels == {"casa": "casa", "hyper_attention": "hyper_attention"}


# ------------------------------------------------------------------------ pretrained backbones

DEPTH = 7
SLIM = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": DEPTH}
SLIM |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 640}
SLIM_ATTENTION = 2 * 64 * 64 + 2 * 64 * 32
SLIM_CASA = SLIM_ATTENTION + 64  # in each block


def slim_gated(blocks: int, ffn: int) -> int:
    return blocks * (SLIM_ATTENTION + 3 * 64 * ffn + 3 * 64 + 2)


def slim_hyper(blocks: int) -> int:
    return blocks * (2 * 64 * 32 + 64 + 1)


def slim_qformer(layers: int, ffn: int) -> int:
    attentions, norms = 2 * (4 * 64 * 64 + 3 * 64), 4 * 2 * 64
    return layers * (attentions + norms + 2 * 64 * ffn + ffn + 64) + 3 * 64 + 2 * 64


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published Llama in miniature."""
    directory = tmp_path_factory.mktemp("slim")
    AutoModelForCausalLM.from_config(LlamaConfig(**SLIM)).save_pretrained(directory)
    return directory


def beside(slim: Path, *overrides: str) -> list[str]:
    """Overrides that put a mechanism beside it."""
    model = [
        "model=pretrained",
        f"model.backbone.pretrained={slim}",
        "model.vision.pretrained=null",
    ]
    tower = ["depth=1", "hidden_size=32", "intermediate_size=48", "num_heads=2"]
    tower += ["out_hidden_size=64", "fullatt_block_indexes=[0]"]
    sizes = ["model.vision.train_last_blocks=-1", *(f"+model.vision.config.{x}" for x in tower)]
    return [*model, *sizes, *overrides]


def chosen(found: Matching) -> dict[str, object]:
    """Options that are others than those that were given."""
    written = found.config.model.matched
    assert written is not None
    before = written.fusion or found.config.fusion
    return {k: v for k, v in found.config.fusion.items() if v != before.get(k)}


@pytest.mark.parametrize(
    ("overrides", "options", "new"),
    [
        (["fusion=casa", "model.match={mechanism: casa, every: 3}"], {"every": 3}, 2 * SLIM_CASA),
        (["fusion=casa", "fusion.every=2", "model.match=casa"], {"every": 1}, DEPTH * SLIM_CASA),
        # Four blocks and three are as many by `every`: 7 // 2.
        (["fusion=cross_attention", f"model.new_parameters={3 * SLIM_CASA - 700}"], {"every": 2},
         3 * SLIM_CASA),
        (["fusion=casa", "fusion.every=6", f"model.new_parameters={SLIM_CASA}"], {}, SLIM_CASA),
        (["fusion=gated_cross_attention", f"model.new_parameters={slim_gated(3, 160)}"],
         {"every": 2}, slim_gated(3, 160)),
        (["fusion=gated_cross_attention", f"model.new_parameters={slim_gated(2, 160) + 1600}"],
         {"every": 3, "ffn_width": 164}, slim_gated(2, 164)),
        (["fusion=gated_cross_attention", "fusion.every=7", "model.new_parameters=25000"],
         {"ffn_width": 64}, slim_gated(1, 64)),
        (["fusion=hyper_attention", f"model.new_parameters={slim_hyper(3) + 200}"],
         {"layers": [0, 3, 6]}, slim_hyper(3)),
        (["fusion=hyper_attention", f"model.new_parameters={slim_hyper(1)}"], {"layers": [3]},
         slim_hyper(1)),
        (["fusion=hyper_attention", f"model.new_parameters={slim_hyper(4)}"], {}, slim_hyper(4)),
        (["fusion=qformer_insertion", "fusion.queries=3",
          f"model.new_parameters={slim_qformer(5, 256)}"], {"layers": 5}, slim_qformer(5, 256)),
        (["fusion=qformer_insertion", "fusion.queries=3",
          f"model.new_parameters={slim_qformer(1, 320) + 60}"],
         {"layers": 1, "ffn_width": 320}, slim_qformer(1, 320)),
        (["fusion=insertion", "model.new_parameters=0"], {}, 0),
        (["fusion=insertion", "model.match={mechanism: casa, share_parameters: true}"], {}, 0),
    ],
)  # fmt: skip
def test_beside_a_pretrained_backbone_options_are_chosen(
    slim: Path, overrides: list[str], options: dict[str, object], new: int
) -> None:
    found = matched(*beside(slim, *overrides))
    assert chosen(found) == options
    assert found.config.model.backbone.config == {}
    assert new_parameters(found.config, found.model_config) == new
    plain = matched(*beside(slim, "fusion=insertion"))
    assert built(found) - built(plain) == new
    assert parameters(AutoModelForCausalLM.from_pretrained(slim)) < built(plain)
    (note,) = found.notes
    for name, value in options.items():
        assert f"fusion.{name}={value} instead of" in note
    assert as_given(found.config) == composed(*beside(slim, *overrides))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["fusion=insertion", "model.match=casa"], "insertion, whose backbone is pretrained, has no"
         ".*: the nearest are 0 .as it is."),
        (["fusion=casa", f"model.new_parameters={4 * SLIM_CASA}"],
         f"nearest are {3 * SLIM_CASA:,} .fusion.every=2. and {7 * SLIM_CASA:,} .as it is"),
        (["fusion=hyper_attention", f"model.new_parameters={slim_hyper(9)}"],
         f"nearest are {slim_hyper(7):,} .fusion.layers=.0, 1, 2, 3, 4, 5, 6."),
        (["fusion=qformer_insertion", "model.match=hyper_attention"], "fusion.layers=1, fus"),
    ],
)  # fmt: skip
def test_what_options_cannot_reach_is_refused_with_the_nearest(
    slim: Path, overrides: list[str], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        matched(*beside(slim, *overrides))


@given(wanted=st.integers(1, 3_000_000), data=st.data())
@settings(PROPERTY, max_examples=12)
def test_own_widths_come_near_any_number_beside_a_pretrained_backbone(
    slim: Path, wanted: int, data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(["gated_cross_attention", "qformer_insertion_2"]))
    least = slim_gated(1, 1) if name.startswith("gated") else slim_qformer(1, 1) - 64
    try:
        found = matched(*beside(slim, f"fusion={name}"), wanted=wanted)
    except UserError as error:
        assert "the nearest are" in str(error) and wanted < 1.01 * least
        return
    assert abs(new_parameters(found.config, found.model_config) - wanted) <= 0.02 * wanted


# ------------------------------------------------------------------------------------ real sizes


def test_widths_at_the_size_of_helium() -> None:
    """Random weights in Helium1-2B's layout, whose gated layers alone have 1.8 billion."""
    sizes = {"model_type": "helium", "hidden_size": 2048, "intermediate_size": 8192}
    sizes |= {"num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
    sizes |= {"head_dim": 128, "vocab_size": 64_000, "tie_word_embeddings": False}
    given = [f"++model.backbone.config.{name}={value}" for name, value in sizes.items()]
    given += ["model.vision.config.out_hidden_size=2048", "model.match=gated_cross_attention"]
    attention = 2 * 2048 * 2048 + 2 * 2048 * 1024
    gated = 28 * (attention + 3 * 2048 * 8192 + 3 * 2048 + 2)
    for name, own in (("casa", 28 * (attention + 2048)), ("insertion", 0)):
        found = matched(f"fusion={name}", *given)
        width = found.config.model.backbone.config["intermediate_size"]
        assert width % 64 == 0
        new = own + 28 * 3 * 2048 * (width - 8192)
        assert new == new_parameters(found.config, found.model_config)
        assert abs(new - gated) <= 0.01 * gated


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_keeps_its_numbers(data_dir: Path, tmp_path: Path) -> None:
    """Start, resume, export: config.yaml holds what was chosen, and another target is refused."""
    run_dir, match = tmp_path / "a", "model.match=gated_cross_attention"
    steps = ["trainer.steps=2", "checkpoint.every=1", "fusion.placement=replace", "fusion.every=2"]
    overrides = short_run(data_dir, run_dir, *steps)
    first = run(train_command([*overrides, match]))
    assert "parameters matched: " in first.stdout
    stored = load_run_config(run_dir)
    text = (run_dir / "config.yaml").read_text()
    width = stored.model.backbone.config["intermediate_size"]
    assert f"intermediate_size: {width}\n" in text and width > 48
    written = stored.model.matched
    assert written is not None and written.intermediate_size == 48
    # The gated layers of TINY against one norm, and what the networks were widened by.
    assert written.wanted == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 3 * 32 + 2)
    assert written.reached == 32 + 2 * 3 * 32 * (width - 48)
    assert new_parameters(stored, load_model_config(run_dir)) == written.reached

    again = run(train_command([*overrides, match]))
    assert "nothing to do" in again.stdout and text == (run_dir / "config.yaml").read_text()
    for changed in (["model.new_parameters=30000"], []):
        other = run(train_command([*overrides, *changed]), check=False)
        assert other.returncode == 2
        assert "model.match.mechanism: 'gated_cross_attention' there, 'absent' now" in other.stderr

    export(run_dir, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["text_config"]["intermediate_size"] == width
