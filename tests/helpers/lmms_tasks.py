"""Tasks of lmms-eval on a tiny data set, in a folder for `--include_path`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image, ImageDraw

from tests.helpers.published import video

COLOURS = ("red", "navy", "green", "white", "orange", "purple", "black")
SIZES = ((84, 56), (60, 90), (120, 40), (30, 30), (84, 84), (70, 56), (56, 56))
CHOICES = ["red square", "navy", "two green circles", "11"]
MAX_NEW_TOKENS = 8
# What makes a request's messages and scores; lmms-eval imports it by `!function`.
UTILS = '''
from PIL import Image

PROMPT = "Look. "


def visuals(doc):
    return [doc["image"].convert("RGB")]


def no_visuals(doc):
    return []


def films(doc):
    return [doc["film"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    """Text, pictures between, one of them a file; every third document has none."""
    words = [{"type": "text", "text": doc["question"]}]
    if doc["number"] % 3 == 2:
        return [{"role": "user", "content": words}]
    first = {"type": "image", "url": doc["image"]}
    second = {"type": "image", "url": doc["file"]}
    look = {"type": "text", "text": PROMPT}
    shown = [first, look, second] if doc["number"] % 3 == 1 else [look, first]
    return [{"role": "user", "content": [*shown, *words]}]


def rounds(doc, previous_output=None, round_idx=None, previous_round_info=None, **kwargs):
    """As many rounds as the document's number says, each with the answer before."""
    if round_idx is None:
        return doc["question"]
    info = (previous_round_info or 0) + 1
    assert info == round_idx == len(previous_output)
    if round_idx >= 1 + doc["number"] % 3:
        return None, None, True, previous_output, info
    shown = visuals(doc) if round_idx == 2 else []
    return shown, f"{previous_output[-1]} and then?", False, previous_output, info


def said(doc, results):
    return {"said": float(results[0] == doc["answer"])}


def counted(doc, results):
    return {"said": float(len(results[0]))}
'''
SCORE = [{"metric": "said", "aggregation": "mean", "higher_is_better": True}]
ACCURACY = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
GREEDY = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1, "top_p": None}


class Function(str):
    """A function of the module beside the tasks."""


def picture(number: int) -> Image.Image:
    """A picture of its own, of a size of its own."""
    image = Image.new("RGB", SIZES[number % len(SIZES)], COLOURS[number % len(COLOURS)])
    ImageDraw.Draw(image).ellipse((4, 4, 14 + 3 * number, 20), fill="yellow")
    return image


def write_tasks(folder: Path, answers: Sequence[str]) -> Path:
    """Writes tiny_colours, tiny_messages, tiny_rounds, tiny_films and tiny_choices.

    :param answers: the references, one a document; of tiny_choices numbers of `CHOICES`, in turn.
    :return: `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "film.mp4").write_bytes(video(3, fps=4))
    rows = []
    for number, answer in enumerate(answers):
        picture(number + 3).save(folder / f"{number}.png")
        held = io.BytesIO()
        picture(number).save(held, "PNG")
        rows.append(
            {
                "number": number,
                "image": {"bytes": held.getvalue(), "path": None},
                "file": str(folder / f"{number}.png"),
                "film": str(folder / "film.mp4"),
                "question": "What is" + " really" * (number % 4) + " there?",
                "answer": answer,
                "right": number % len(CHOICES),
            }
        )
    features = datasets.Features(
        {
            "number": datasets.Value("int64"),
            "image": datasets.Image(),
            **{name: datasets.Value("string") for name in ("file", "film", "question", "answer")},
            "right": datasets.Value("int64"),
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "test.parquet")
    (folder / "utils.py").write_text(UTILS)
    generated = {"generation_kwargs": GREEDY, "metric_list": SCORE}
    shown = {"doc_to_visual": Function("visuals"), "doc_to_text": Function("text")}
    asked = {**shown, **generated, "process_results": Function("said")}
    _write(folder, "tiny_colours", "generate_until", asked)
    films = {**asked, "doc_to_visual": Function("films")}
    _write(folder, "tiny_films", "generate_until", films)
    messages = {**asked, "doc_to_messages": Function("messages")}
    _write(folder, "tiny_messages", "generate_until", messages)
    rounds = {**asked, "doc_to_text": Function("rounds"), "process_results": Function("counted")}
    _write(folder, "tiny_rounds", "generate_until_multi_round", rounds)
    choices = {**shown, "doc_to_target": "right", "doc_to_choice": CHOICES, "metric_list": ACCURACY}
    _write(folder, "tiny_choices", "multiple_choice", choices)
    return folder


def _write(folder: Path, name: str, kind: str, more: dict[str, Any]) -> None:
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "test.parquet")}},
        "test_split": "test",
        "output_type": kind,
        "doc_to_target": "answer",
        "metadata": [{"version": 0.0}],
        **more,
    }
    (folder / f"{name}.yaml").write_text(yaml.dump(task, Dumper=_Dumper, sort_keys=False))


class _Dumper(yaml.SafeDumper):
    """Writes functions as lmms-eval reads them."""


_Dumper.add_representer(
    Function, lambda dumper, name: dumper.represent_scalar("!function", f"utils.{name}")
)
