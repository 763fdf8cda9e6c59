"""What answers read from images, as an evaluation measures it and as the page draws it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from casa_train.data.sample import ImageSlot, Turn
from casa_train.evaluate.attention_to_images import measure_image_attention
from casa_train.evaluate.exact_match import Question, swapped_images
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.report.attention_plots import draw_image_attention
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import TEMPLATE
from tests.helpers.report_pages import HOSTILE, fake_evaluation, fake_run, page_of
from tests.helpers.tiny import tiny_model, tiny_text_config
from tests.helpers.variants import every_mechanism

PROCESSOR = CasaProcessor(build_tokenizer(), 7056, dict(TEMPLATE))


def model_of(mechanism: str, **options: Any) -> CasaForConditionalGeneration:
    text = tiny_text_config(layers=3, vocab_size=len(PROCESSOR.tokenizer))
    return tiny_model(mechanism, text_config=text, **options)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def questions() -> list[Question]:
    """Six of two sources; the last one asks about two frames."""
    slot = ImageSlot(0)
    turn = Turn((slot, "what is it?"), "red")
    made = [
        Question(f"q{i}", "colour" if i % 2 else "shape", turn, (picture(i),)) for i in range(5)
    ]
    both = (picture(7), picture(8))
    turn = Turn((slot, ImageSlot(1), "and now?"), "a blue one")
    return [*made, Question("q5", "colour", turn, both)]


@every_mechanism
def test_every_mechanism_tells_what_it_has(mechanism: str) -> None:
    found = measure_image_attention(model_of(mechanism), PROCESSOR, questions(), limit=6)
    assert found is not None and found["questions"] == 6
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    names = {
        "cross_attention": set(),
        "gated_cross_attention": {"attention gate", "feed-forward gate"},
        "hyper_attention": {"image gate"},
    }
    assert found["quantities"].keys() == names.get(mechanism, {"image share"})
    for quantity in found["quantities"].values():
        assert quantity["layers"] == [0, 1, 2]
        mean, low, high = (np.array(quantity[key]) for key in ("mean", "low", "high"))
        assert (low <= mean).all() and (mean <= high).all()
        assert quantity["sources"].keys() == {"colour", "shape"}
        weighed = [np.array(s["mean"]) * s["questions"] for s in quantity["sources"].values()]
        np.testing.assert_allclose(sum(weighed) / 6, mean)
    if mechanism == "gated_cross_attention":  # a parameter: the image makes no difference
        gate = found["quantities"]["attention gate"]
        assert gate["mean"] == pytest.approx(gate["blind"])
    elif found["quantities"]:
        (quantity,) = found["quantities"].values()
        assert quantity["mean"] != pytest.approx(quantity["blind"], abs=1e-6)
        assert all(0 < share < 1 for share in quantity["mean"])


def test_it_is_the_mean_over_the_tokens_that_predict_the_answer() -> None:
    """Against the model's own account of one conversation, row by row."""
    model, one = model_of("casa"), questions()[:1]
    ids = PROCESSOR.encode(one[0].messages(one[0].images)).ids
    ids += PROCESSOR.asst_start_tokens
    answer = PROCESSOR.tokenizer.encode("red", add_special_tokens=False)
    answer += PROCESSOR.asst_end_tokens
    image = PROCESSOR.image_processor.load(one[0].images[0])
    packed = model.pack(torch.tensor([*ids, *answer]), [2], [image])
    listener = model.image_attention(packed)
    rows = slice(len(ids) - 1, len(ids) - 1 + len(answer))
    expected = [float(layer[rows].mean()) for layer in listener.values["image share"].values()]
    assert listener.uniform is not None
    found = measure_image_attention(model, PROCESSOR, one, limit=64)
    assert found is not None
    share = found["quantities"]["image share"]
    assert share["mean"] == pytest.approx(expected, abs=1e-6)
    assert share["uniform"] == pytest.approx(float(listener.uniform[rows].mean()), abs=1e-6)


def test_of_a_conversation_only_the_last_answer_counts() -> None:
    """Row by row again; turns before it, another answer among them, are there but do not count."""
    model, slot = model_of("casa"), ImageSlot(0)
    turns = [Turn((slot, "what is it?"), "red"), Turn(("and now?", ImageSlot(1)), "a blue one")]
    pictures = picture(3), picture(4)
    asked = Question("q", "colour", turns[1], pictures, history=(turns[0],))
    ids = PROCESSOR.encode(asked.messages(pictures), generation_prompt=True).ids
    answer = PROCESSOR.tokenizer.encode("a blue one", add_special_tokens=False)
    answer += PROCESSOR.asst_end_tokens
    images = [PROCESSOR.image_processor.load(image) for image in pictures]
    points = PROCESSOR.encode(asked.messages(pictures)).points
    listener = model.image_attention(model.pack(torch.tensor([*ids, *answer]), points, images))
    rows = slice(len(ids) - 1, len(ids) - 1 + len(answer))
    expected = [float(layer[rows].mean()) for layer in listener.values["image share"].values()]
    found = measure_image_attention(model, PROCESSOR, [asked], limit=64)
    assert found is not None
    assert found["quantities"]["image share"]["mean"] == pytest.approx(expected, abs=1e-6)


def test_questions_are_taken_from_all_over() -> None:
    found = measure_image_attention(model_of("casa"), PROCESSOR, questions(), limit=3)
    assert found is not None and found["questions"] == 3
    found = measure_image_attention(model_of("casa"), PROCESSOR, questions(), limit=2)
    sources = found["quantities"]["image share"]["sources"] if found else {}
    assert {name: s["questions"] for name, s in sources.items()} == {"shape": 1, "colour": 1}


def test_off_and_older_exports_tell_nothing() -> None:
    assert measure_image_attention(model_of("casa"), PROCESSOR, questions(), limit=0) is None
    assert measure_image_attention(torch.nn.Linear(1, 1), PROCESSOR, questions(), limit=9) is None


# The page


def attention(**quantities: Any) -> dict[str, Any]:
    quantity = {
        "layers": [0, 2, 4],
        "mean": [0.5, 0.7, 0.2],
        "low": [0.4, 0.5, 0.1],
        "high": [0.6, 0.9, 0.3],
        "blind": [0.5, 0.6, 0.2],
        "uniform": 0.55,
        "sources": {
            name: {"questions": 3, "mean": [0.5, 0.7, 0.2]} for name in ("colour", HOSTILE)
        },
    }
    return {"questions": 6, "quantities": {k: {**quantity, **v} for k, v in quantities.items()}}


def test_the_page_draws_image_attention(tmp_path: Path) -> None:
    measured = attention(**{"image share": {}, "attention gate": {"uniform": None}})
    run = fake_run(evaluation={**fake_evaluation([]), "attention": measured})
    html, page = page_of(run, tmp_path)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "Attention to the image by layer" in labels
    assert "Gate of cross-attention by layer" in labels
    assert "6 questions" in page.text and HOSTILE not in html
    assert page_of(run, tmp_path)[0] == html


def test_a_page_of_gates_alone(tmp_path: Path) -> None:
    measured = attention(**{"attention gate": {"uniform": None}})
    html, _ = page_of(fake_run(evaluation={**fake_evaluation([]), "attention": measured}), tmp_path)
    assert "Gate of cross-attention" in html and "the same for every question" in html


@pytest.mark.slow
def test_a_page_without_it_has_no_such_section(tmp_path: Path) -> None:
    for measured in ({}, {"attention": None}, {"attention": attention()}):
        run = fake_run(evaluation={**fake_evaluation([]), **measured})
        assert "Image attention" not in page_of(run, tmp_path)[0]
    assert draw_image_attention(None) == []


def test_one_layer_is_drawn() -> None:
    one = {key: [0.5] for key in ("mean", "low", "high", "blind")}
    sources = {"colour": {"questions": 6, "mean": [0.5]}}
    measured = attention(**{"image gate": {"layers": [3], "sources": sources, **one}})
    (plot,) = draw_image_attention({"attention": measured})
    assert plot.title == "Gate to the image"


def test_swapped_images_are_another_questions() -> None:
    assert all(a != q.images for a, q in zip(swapped_images(questions()), questions(), strict=True))
