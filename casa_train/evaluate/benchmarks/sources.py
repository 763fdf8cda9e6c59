"""Where each benchmark is published, and what its rows hold.

The columns are those of the data sets as the authors' protocol names them; lmms-eval 0.7 reads
copies of the same rows. A row is taken as it is or not at all: `BadQuestion` says what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from casa_train.evaluate.benchmarks.question import BenchmarkQuestion

Row = Mapping[str, Any]

CHARTQA_TYPES = ("human_test", "augmented_test")
OCRBENCH_TYPES = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    "Handwritten Mathematical Expression Recognition",
)
# The categories of MME (arXiv 2306.13394).
MME_PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
MME_COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)


class BadQuestion(ValueError):
    """A row that cannot be asked or scored; the message says why."""


@dataclass(frozen=True)
class Source:
    """A data set of the hub.

    :param rows: how many are published.
    :param columns: those that are read, and those by which it is known.
    :param question: (row, its number) -> the question; raises `BadQuestion`.
    :param picture: the column of the picture, or of what names it in `pictures`.
    :param pictures: the configuration that holds the pictures, where they are apart: `id`, `image`.
    """

    repo: str
    config: str | None
    split: str
    rows: int
    columns: tuple[str, ...]
    question: Callable[[Row, int], BenchmarkQuestion]
    picture: str = "image"
    pictures: str | None = None


def _chartqa(row: Row, index: int) -> BenchmarkQuestion:
    kind = _one_of(row, "type", CHARTQA_TYPES)
    return BenchmarkQuestion(str(index), _text(row, "question"), _answers(row, "answer"), (), kind)


def _docvqa(row: Row, index: int) -> BenchmarkQuestion:
    name = str(row["questionId"])
    return BenchmarkQuestion(name, _text(row, "question"), _answers(row, "answers"))


def _ocrbench(row: Row, index: int) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        str(index),
        _text(row, "question"),
        _answers(row, "answer"),
        category=_one_of(row, "question_type", OCRBENCH_TYPES),
        dataset=_text(row, "dataset"),
    )


def _textvqa(row: Row, index: int) -> BenchmarkQuestion:
    name = str(row["question_id"])
    return BenchmarkQuestion(name, _text(row, "question"), _answers(row, "answers"))


def _realworldqa(row: Row, index: int) -> BenchmarkQuestion:
    return BenchmarkQuestion(str(index), _text(row, "question"), _answers(row, "answer"))


def _ai2d(row: Row, index: int) -> BenchmarkQuestion:
    options = _answers(row, "options")
    if len(options) > len(ascii_uppercase):
        raise BadQuestion(f"there are {len(options)} options; expected one a letter, A to Z")
    right = str(row["answer"])
    if not (right.isdecimal() and int(right) < len(options)):
        raise BadQuestion(
            f"answer is {row['answer']!r}; expected the number of one of {len(options)} options"
        )
    return BenchmarkQuestion(str(index), _text(row, "question"), (right,), options)


def _gqa(row: Row, index: int) -> BenchmarkQuestion:
    return BenchmarkQuestion(str(row["id"]), _text(row, "question"), _answers(row, "answer"))


def _mme(row: Row, index: int) -> BenchmarkQuestion:
    pair = _text(row, "question_id")
    answer = _text(row, "answer")
    if answer.lower().strip().replace(".", "") not in ("yes", "no"):
        raise BadQuestion(f"answer is {answer!r}; expected Yes or No")
    return BenchmarkQuestion(
        f"{pair}/{index}",
        _text(row, "question"),
        (answer,),
        category=_one_of(row, "category", MME_PERCEPTION + MME_COGNITION),
        pair=pair,
    )


SOURCES = {
    "chartqa": Source(
        "lmms-lab/ChartQA", None, "test", 2_500, ("type", "question", "answer", "image"), _chartqa
    ),
    "docvqa": Source(
        "lmms-lab/DocVQA",
        "DocVQA",
        "validation",
        5_349,
        ("questionId", "question", "answers", "docId", "image"),
        _docvqa,
    ),
    "infovqa": Source(
        "lmms-lab/DocVQA",
        "InfographicVQA",
        "validation",
        2_801,
        ("questionId", "question", "answers", "answer_type", "image"),
        _docvqa,
    ),
    "ocrbench": Source(
        "echo840/OCRBench",
        None,
        "test",
        1_000,
        ("dataset", "question", "question_type", "answer", "image"),
        _ocrbench,
    ),
    "textvqa": Source(
        "lmms-lab/textvqa",
        None,
        "validation",
        5_000,
        ("question_id", "question", "answers", "image"),
        _textvqa,
    ),
    "realworldqa": Source(
        "lmms-lab/RealWorldQA",
        None,
        "test",
        765,
        ("question", "answer", "image"),
        _realworldqa,
    ),
    "ai2d": Source(
        "lmms-lab/ai2d", None, "test", 3_088, ("question", "options", "answer", "image"), _ai2d
    ),
    "gqa": Source(
        "lmms-lab/GQA",
        "testdev_balanced_instructions",
        "testdev",
        12_578,
        ("id", "imageId", "question", "answer"),
        _gqa,
        picture="imageId",
        pictures="testdev_balanced_images",
    ),
    "mme": Source(
        "lmms-lab/MME",
        None,
        "test",
        2_374,
        ("question_id", "question", "answer", "category", "image"),
        _mme,
    ),
}


def _text(row: Row, column: str) -> str:
    value = row[column]
    if not isinstance(value, str) or not value.strip():
        raise BadQuestion(f"{column} is {_short(value)}; expected a text")
    return value


def _answers(row: Row, column: str) -> tuple[str, ...]:
    """The texts of a column that holds one or a list of them; at least one that is not empty."""
    value = row[column]
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadQuestion(f"{column} is {_short(value)}; expected a text or a list of texts")
    if not any(text.strip() for text in texts):
        raise BadQuestion(f"{column} is {_short(value)}; expected at least one answer")
    return tuple(texts)


def _one_of(row: Row, column: str, known: tuple[str, ...]) -> str:
    value = row[column]
    if value not in known:
        raise BadQuestion(f"{column} is {_short(value)}; expected one of {', '.join(known)}")
    return str(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
