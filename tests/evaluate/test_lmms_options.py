"""What the model `casa` of lmms-eval takes, and its log-likelihoods: what needs no lmms-eval."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from casa_train.errors import UserError
from casa_train.evaluate.lmms.asking import Asked
from casa_train.evaluate.lmms.keywords import Keywords, read_keywords
from casa_train.evaluate.lmms.model_options import ModelOptions, read_options
from casa_train.modeling.mechanisms import MECHANISMS
from tests.helpers.tiny_export import write_tiny_export

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {**GREEDY, "max_new_tokens": 77}),
        # As most stock tasks have them.
        (
            {"max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "num_beams": 1},
            {**GREEDY, "max_new_tokens": 16},
        ),
        ({"max_gen_toks": 9, "image_aspect_ratio": "pad"}, {**GREEDY, "max_new_tokens": 9}),
        ({"max_gen_toks": 9, "max_new_tokens": 8}, {**GREEDY, "max_new_tokens": 8}),
        ({"do_sample": False, "temperature": 0.7}, {**GREEDY, "max_new_tokens": 77}),
        ({"do_sample": True, "temperature": 0.0}, {**GREEDY, "max_new_tokens": 77}),
        (
            {"temperature": 0.7, "top_p": 0.9},
            {"max_new_tokens": 77, "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        ),
        ({"do_sample": True, "top_k": 5}, {"max_new_tokens": 77, "do_sample": True, "top_k": 5}),
        (
            {"repetition_penalty": 1.2, "min_new_tokens": None},
            {**GREEDY, "max_new_tokens": 77, "repetition_penalty": 1.2},
        ),
    ],
)
def test_what_a_task_asks_for(given: dict[str, Any], expected: dict[str, Any]) -> None:
    before = dict(given)
    assert read_keywords(given, 77) == Keywords(expected)
    assert given == before


@pytest.mark.parametrize("name", ["num_beams", "num_return_sequences", "n", "best_of"])
def test_several_sequences_are_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"generation_kwargs.{name}=4"):
        read_keywords({name: 4}, 77)


@pytest.mark.parametrize("name", ["return_dict_in_generate", "output_scores", "visual_cot"])
def test_what_makes_no_answer_is_refused_by_name(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}=True is unknown; expected until"):
        read_keywords({name: True}, 77)


def test_an_answer_ends_before_the_first_stop() -> None:
    keywords = read_keywords({"until": ["\n\n", "", "Q:"], "stop_sequences": "###"}, 77)
    assert keywords.stops == ("\n\n", "Q:", "###")
    assert keywords.cut(" four Q: and\n\nso on") == "four"
    assert keywords.cut("one ### two Q:") == "one"
    assert keywords.cut(" whole\n") == "whole"
    assert read_keywords({"until": "END"}, 77).stops == ("END",)


def test_arguments_come_as_numbers_and_as_text() -> None:
    found = read_options({"pretrained": "a/b", "batch_size": "3", "image_size": 896})
    assert found == ModelOptions(Path("a/b"), batch_size=3, image_size=896)
    assert read_options({"pretrained": 7, "dtype": "bf16"}).torch_dtype == torch.bfloat16


def test_an_unknown_argument_says_which_there_are() -> None:
    with pytest.raises(UserError) as refused:
        read_options({"pretrained": "a", "max_pixels": 5, "attn": "sdpa"})
    assert "max_pixels=5, attn=sdpa is unknown" in str(refused.value)
    assert "pretrained, batch_size, device, dtype, image_size" in str(refused.value)


@pytest.mark.parametrize("mechanism", sorted(MECHANISMS))
def test_log_likelihoods_are_sums_over_the_answers_beginning(
    mechanism: str, tmp_path: Path
) -> None:
    """One batch of unlike lengths, images and earlier answers, beside a pass in float64 each."""
    asked = Asked(write_tiny_export(tmp_path / "export", mechanism), torch.device("cpu"), "auto")
    picture = {"type": "image", "image": Image.new("RGB", (84, 60), "navy")}
    first = {"role": "user", "content": [picture, {"type": "text", "text": "What is it?"}]}
    more = {"role": "user", "content": [{"type": "text", "text": "And how many?"}, picture]}
    conversations: list[Any] = [
        [first],
        [first, {"role": "assistant", "content": "a square"}, more],
        [{"role": "user", "content": "Count to three."}],
    ]
    said = ["a navy square", "", "one two three"]
    found = asked.log_likelihoods(conversations, said)
    assert found[1] == (0.0, True)
    asked.model.double()
    for i in (0, 2):
        start = asked.processor.tokenize_messages(conversations[i])["input_ids"].shape[1]
        whole = [*conversations[i], {"role": "assistant", "content": said[i]}]
        batch = asked.processor.tokenize_messages(whole)
        with torch.no_grad():
            logits = asked.model(**batch).logits[0].log_softmax(-1)
        ids = batch["input_ids"][0]
        stop = len(ids) - 1  # the end token
        expected = sum(float(logits[t - 1, ids[t]]) for t in range(start, stop))
        assert stop - start > 2
        assert found[i][0] == pytest.approx(expected, rel=1e-5)
        assert not found[i][1]


def test_a_chat_template_of_ones_own_has_no_log_likelihoods(tmp_path: Path) -> None:
    asked = Asked(write_tiny_export(tmp_path / "export"), torch.device("cpu"), "auto")
    asked.processor.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    )
    with pytest.raises(ValueError, match="chat_template of its own"):
        asked.log_likelihoods([[{"role": "user", "content": "What is it?"}]], ["red"])
