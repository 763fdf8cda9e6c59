"""What tokens read from images while a model trains: by layer and class, against the reference."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.data.materialize import encode_sample
from casa_train.data.processor import build_processor
from casa_train.data.sample import Sample
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate.attention_while_training import WatchedSamples, rows_by_class
from casa_train.evaluate.held_out import HeldOut, open_held_out
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.weights import find_weights, open_sources, start_weights
from data_recipes.__main__ import main as recipes
from tests.helpers import tiny
from tests.helpers.commands import TEMPLATE, TINY, on_data
from tests.helpers.told_ranks import Told
from tests.helpers.variants import reference_of

AROUND = "<|pad|>"  # a token that stands around images and nowhere else


@pytest.fixture(scope="module")
def data(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's data with a token before and behind every image."""
    out = tmp_path_factory.mktemp("around")
    fields = json.dumps({**TEMPLATE, "image_start": AROUND, "image_end": AROUND})
    command = ["retokenize", "--data", str(data_dir), "--out", str(out), "--workers", "1"]
    assert recipes([*command, "--tokenizer", f"{data_dir}/tokenizer", "--template", fields]) == 0
    return out


def open_world(data: Path, *more: str) -> tuple[Config, CasaProcessor, HeldOut]:
    settings = ["evaluation.every=4", "evaluation.loss_samples=40", "data.image_tokens=99"]
    config = compose_config(["+experiment=demo", *TINY, *on_data(data), *settings, *more])
    config.model.template.image_start = config.model.template.image_end = AROUND
    processor = build_processor(config)
    found = open_held_out(config, processor, 1)
    assert found is not None
    return config, processor, found


def build(config: Config, processor: CasaProcessor) -> CasaForConditionalGeneration:
    """The configuration's model with random weights in float64, as the reference computes."""
    sources = open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    start = find_weights(model, sources)
    start_weights(model, start, 0, torch.device("cpu"), torch.float64, lambda block: None)
    tiny.randomise(model, torch.Generator().manual_seed(0))
    return model.double().eval()


def places_of(sample: Sample, processor: CasaProcessor) -> dict[str, list[int]]:
    """The classes of tokens by the words alone."""
    messages = sample.messages()
    ids = processor.encode(messages).ids
    prompt = len(processor.encode(messages[:-1], generation_prompt=True).ids)
    answer = processor.tokenizer.encode(messages[-1]["content"][0]["text"])
    gist = [i for i, token in enumerate(ids) if token == processor.tokenizer.pad_token_id]
    begin = len(processor.encode(messages[:-2]).ids) if len(messages) > 2 else 1  # behind bos
    return {
        "question": [i for i in range(begin, prompt - 1) if i not in gist],
        "answer": [*range(prompt - 1, prompt + len(answer))],
        "gist": gist,
    }


def alone(sample: Sample, processor: CasaProcessor) -> tiny.Sample:
    """A sample as the reference takes it."""
    encoded = encode_sample(sample, processor)
    grids = [(i.shape[1] // encoded.side, i.shape[2] // encoded.side) for i in encoded.images]
    layout = tiny.Layout(len(encoded.ids), tuple(encoded.points), tuple(grids), encoded.follows)
    return tiny.Sample(layout, torch.tensor(encoded.ids), encoded.images)


@pytest.mark.parametrize(
    ("fusion", "quantity"),
    [
        ("casa", "image share"),
        ("insertion", "image share"),
        ("hyper_attention", "image gate"),
    ],
)
def test_means_by_layer_and_class_equal_the_reference(
    data: Path, fusion: str, quantity: str
) -> None:
    config, processor, found = open_world(data, f"fusion={fusion}")
    model = build(config, processor)
    watched = WatchedSamples(found, 2)
    measured = watched.measure(model, Ranks())
    assert measured is not None and list(measured) == [quantity]
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    whole = measured[quantity]
    assert len(whole["sources"]) == 7
    turns = 0
    for source, told in whole["sources"].items():
        items = [one.pack.items[0] for one in watched.samples if one.source == source]
        samples = [found.splits[name].read(row) for name, row, _, _ in items]
        assert told["samples"] == len(samples) == 2
        turns = max(turns, *(len(sample.turns) for sample in samples))
        reads = [reference_of(model, alone(sample, processor)).reads for sample in samples]
        for kind, means in told["classes"].items():
            rows = [places_of(sample, processor)[kind] for sample in samples]
            if not any(rows):
                assert means is None
                continue
            expected = [
                np.mean(
                    [float(of[layer][at].nanmean()) for of, at in zip(reads, rows, strict=True)]
                )
                for layer in range(len(reads[0]))
            ]
            np.testing.assert_allclose(means, expected, rtol=0, atol=1e-7)
            assert len({round(mean, 6) for mean in means}) == len(whole["layers"])
        if quantity == "image share":
            assert 0 < told["uniform"]["question"] < 1
        else:
            assert told["uniform"] == {"question": None, "answer": None, "gist": None}
    assert turns > 1  # of which the last one is asked
    assert (whole["uniform"] is None) == (quantity == "image gate")


def test_gates_are_those_of_every_token_and_other_mechanisms_tell_nothing(data: Path) -> None:
    config, processor, found = open_world(data, "fusion=gated_cross_attention")
    model = build(config, processor)
    with torch.no_grad():
        model.model.layers[1].fusion.attention_gate.fill_(0.5)
    measured = WatchedSamples(found, 1).measure(model, Ranks())
    assert measured is not None and set(measured) == {"attention gate", "feed-forward gate"}
    for told in measured["attention gate"]["sources"].values():
        for means in told["classes"].values():
            assert means[1] == pytest.approx(math.tanh(0.5), abs=1e-7)
    config, processor, found = open_world(data, "fusion=cross_attention")
    assert WatchedSamples(found, 1).measure(build(config, processor), Ranks()) is None


def test_any_number_of_ranks_measures_the_same_by_as_many_passes(data: Path) -> None:
    config, processor, found = open_world(data)
    model = build(config, processor)
    watched = WatchedSamples(found, 1)
    assert len(watched.samples) == 7
    whole = watched.measure(model, Ranks())
    parts: list[Any] = []
    passes = []
    for rank in range(4):
        beats: list[None] = []
        watched.measure(model, Told(rank, 4, parts), lambda beats=beats: beats.append(None))
        passes.append(len(beats))
    assert passes == [2, 2, 2, 2]  # 8 of 7 samples: one is the dummy's
    assert watched.measure(model, Told(3, 4, [], parts)) == whole


def test_a_sample_that_cannot_be_read_is_left_out(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, processor, found = open_world(data)
    model = build(config, processor)
    watched = WatchedSamples(found, 2)
    whole = watched.measure(model, Ranks())
    broken, other = watched.samples[2:4]
    split = found.splits["synthetic"]
    read = split.read

    def sometimes(row: int, with_images: bool = True) -> Sample:
        sample = read(row, with_images)
        if row == broken.pack.items[0][1]:
            object.__setattr__(sample, "images", tuple(b"no image" for _ in sample.images))
        return sample

    monkeypatch.setattr(split, "read", sometimes)
    measured = watched.measure(model, Ranks())
    assert whole is not None and measured is not None
    before, after = (m["image share"]["sources"] for m in (whole, measured))
    assert before[broken.source]["samples"] == 2 and after[broken.source]["samples"] == 1
    assert broken.source == other.source
    for source in set(before) - {broken.source}:
        assert before[source] == after[source]


def test_a_question_begins_behind_what_opens_a_conversation(data: Path) -> None:
    _, processor, found = open_world(data)
    samples = [found.splits["synthetic"].read(row) for row in range(24)]
    for sample in samples:
        assert rows_by_class(sample, processor) == places_of(sample, processor)
    assert {len(sample.turns) for sample in samples} > {1}


def test_without_held_out_samples_it_is_refused(data: Path) -> None:
    command = ["+experiment=demo", *TINY, *on_data(data), "evaluation.attention_while_training=3"]
    compose_config(command)  # evaluation.every=0: there are no validations at all
    command += ["evaluation.every=2", "data.validation=null"]
    with pytest.raises(UserError, match=r"attention_while_training is 3; expected 0 .*validation"):
        compose_config(command)
