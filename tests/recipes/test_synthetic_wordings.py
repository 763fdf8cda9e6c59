"""Freely worded questions of the synthetic recipe: they ask what short ones ask, in sentences."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from casa_train.data.prepared.shards import Split
from data_recipes import synthetic_scenes
from data_recipes.__main__ import main
from data_recipes.synthetic_drawing import COLOURS, KINDS, Canvas
from data_recipes.synthetic_scenes import TASK_NAMES, Example, SplitName, Style, example
from data_recipes.synthetic_wordings import WORDINGS, without_picture

TASKS = ("colour", "shape", "count")
NUMBERS = {"1": "one", "2": "two", "3": "three", "4": "four"}
UNNAMED = ("shape", "figure", "object", "thing")
FREE, HELD_OUT = Style(free=True), Style(free=True, hold_out=True)
WHERE = r"(?: in the (?:first|second) image)?"
SENTENCES = {
    "colour": rf"The (?P<subject>\w+){WHERE} is (?P<answer>\w+)\.",
    "shape": rf"The (?P<subject>\w+)(?: \w+)?{WHERE} is a (?P<answer>\w+)\.",
    "count": rf"There (?:is|are) (?P<answer>\w+) (?P<subject>\w+){WHERE}\.",
}


def recipe(out: Path, *options: str) -> int:
    sizes = ("--samples", "120", "--validation", "60", "--seed", "3", "--workers", "1")
    return main(["synthetic", "--out", str(out), *sizes, "--tasks", ",".join(TASKS), *options])


def samples(style: Style, count: int, split: SplitName = "train") -> list[Example]:
    return [example(9, split, TASKS, i, style=style) for i in range(count)]


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn: thousands of samples a second, for statistics of their words."""
    monkeypatch.setattr(Canvas, "shape", lambda *_: None)
    monkeypatch.setattr(synthetic_scenes, "png", lambda *_: b"")


@pytest.fixture(scope="module")
def free() -> list[Example]:
    return samples(FREE, 700)


@pytest.fixture(scope="module")
def short() -> list[Example]:
    return samples(Style(), 700)


def pattern(wording: str) -> re.Pattern[str]:
    """What is asked in a wording."""
    parts = re.split(r"\{thing\}|\{where\}", wording)
    assert len(parts) == 3 and wording.index("{thing}") < wording.index("{where}")
    first, second, third = map(re.escape, parts)
    return re.compile(rf"(<image>)?{first}(?P<thing>(\w+ )?\w+){second}{WHERE}{third}")


# ------------------------------------------------------------------------------ the short questions


def test_the_short_questions_are_those_of_before_there_were_others() -> None:
    """Texts and sizes by the recipe of version 3, before it could word questions otherwise."""
    found = [
        [
            sample.source,
            sample.texts,
            [Image.open(io.BytesIO(data)).size for data in sample.images],
        ]
        for split in ("train", "validation")
        for sample in (example(11, split, TASK_NAMES, i) for i in range(100))
    ]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    assert digest == "1997192966fddd3e3e31d944441e3fc976ca11e869aaa2b75aa0dfe65437b3f3"


def test_a_dataset_of_before_is_the_same_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "out") == 0
    arguments = json.loads((tmp_path / "out" / "summary.json").read_text())["arguments"]
    before = "version samples validation seed tasks tokenizer template"
    assert " ".join(arguments) == before
    capsys.readouterr()
    assert recipe(tmp_path / "out", "--wording", "short", "--scale", "1") == 0
    assert "nothing to do" in capsys.readouterr().out


# ---------------------------------------------------------------------------- questions and answers


def test_a_sentence_says_what_the_short_answer_says(
    free: list[Example], short: list[Example]
) -> None:
    """About the same pictures, in the same order; and it names what the question names."""
    unnamed = Counter[str]()
    for one, other in zip(free, short, strict=True):
        assert (one.task, one.images, len(one.texts)) == (
            other.task,
            other.images,
            len(other.texts),
        )
        if one.task == "text":
            continue
        for (question, sentence), (asked, word) in zip(one.texts, other.texts, strict=True):
            match = re.fullmatch(SENTENCES[one.task], sentence)
            assert match, sentence
            assert match["answer"] == NUMBERS.get(word, word)
            for where in (" in the first image", " in the second image", "<image>"):
                assert (where in question) == (where in asked)
                assert where == "<image>" or (where in question) == (where in sentence)
            subject = match["subject"]
            if subject in UNNAMED and one.task != "count":
                unnamed[one.task] += 1
                assert re.search(rf"\b{subject}\b", question) and len(one.texts) == 1
                assert not set(re.findall(r"\w+", question)) & {*COLOURS, *KINDS}
            elif word != "1":
                assert re.search(rf"\b{subject}\b", question) and subject in asked
    assert min(unnamed["colour"], unnamed["shape"]) > 30


def test_what_is_not_named_is_alone_in_its_picture(free: list[Example]) -> None:
    for sample in free[:300]:
        sentence = sample.texts[0][1]
        if not re.match(rf"The ({'|'.join(UNNAMED)}) is", sentence):
            continue
        (data,) = sample.images
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image, dtype=np.float32)
        shown = [np.linalg.norm(pixels - np.float32(rgb), axis=2) < 30 for rgb in COLOURS.values()]
        assert sum(mask.sum() > 15 for mask in shown) == 1


@pytest.mark.usefixtures("undrawn")
def test_counts_are_english() -> None:
    said = {
        sentence
        for sample in samples(FREE, 1200)
        if sample.task == "count" and len(sample.images) == 1
        for _, sentence in sample.texts
    }
    kinds = {**KINDS, "shape": "shapes"}
    expected = {f"There is one {kind}." for kind in kinds}
    expected |= {f"There are {n} {p}." for n in ("two", "three", "four") for p in kinds.values()}
    assert said == expected


@pytest.mark.parametrize(
    ("question", "answer", "sentence"),
    [
        ("What comes after three?", "four", "Four comes after three."),
        ("What comes before two?", "one", "One comes before two."),
        ("What is 7 + 5?", "12", "7 + 5 is 12."),
    ],
)
def test_what_needs_no_picture_is_answered_in_sentences(
    question: str, answer: str, sentence: str
) -> None:
    assert without_picture(question, answer) == (question, sentence)


def test_text_samples_are_sentences(free: list[Example]) -> None:
    answers = [a for sample in free if sample.task == "text" for _, a in sample.texts]
    assert len(answers) > 30
    assert all(re.fullmatch(r"[A-Z]\w+ comes \w+ \w+\.|\d \+ \d is \d+\.", a) for a in answers)


@pytest.mark.usefixtures("undrawn")
def test_answers_to_a_wording_are_uniform() -> None:
    """Whichever wording: it tells nothing of the answer."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in samples(FREE, 8000):
        if sample.task == "text":
            continue
        question, sentence = sample.texts[0]
        (wording,) = [w for w in WORDINGS[sample.task].every if pattern(w).fullmatch(question)]
        match = re.fullmatch(SENTENCES[sample.task], sentence)
        assert match
        answers[sample.task, wording][match["answer"]] += 1
    assert {(t, w) for t in TASKS for w in WORDINGS[t].every} == set(answers)
    for (task, wording), counts in answers.items():
        size = len(COLOURS) if task == "colour" else 4
        assert len(counts) == size
        expected = sum(counts.values()) / size
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        # Mean size - 1, variance 2 (size - 1): five standard deviations above.
        assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5, (wording, counts)


# -------------------------------------------------------------------------------- held-out wordings


def test_held_out_wordings_are_never_trained() -> None:
    for task, wordings in WORDINGS.items():
        assert len(set(wordings.every)) == 13 and not set(wordings.trained) & set(wordings.held_out)
        for one in wordings.held_out:
            asked = one.replace("{thing}", "red thing").replace("{where}", "")
            assert not any(pattern(w).fullmatch(asked) for w in wordings.trained), (task, one)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_second_held_out_sample_is_asked_in_them(split: SplitName) -> None:
    used: dict[str, set[str]] = defaultdict(set)
    for i, sample in enumerate(samples(HELD_OUT, 900, split)):
        reworded = split == "validation" and i % 2 == 1
        assert sample.reworded == reworded
        assert sample.source == f"synthetic_{sample.task}{'_reworded' if reworded else ''}"
        if sample.task == "text":
            continue
        known = WORDINGS[sample.task]
        for question, _ in sample.texts:
            found = [w for w in known.every if pattern(w).fullmatch(question)]
            assert len(found) == 1, question
            assert found[0] in (known.held_out if reworded else known.trained)
            used[sample.task].add(found[0])
    for task in TASKS:
        assert used[task] == set(
            WORDINGS[task].trained if split == "train" else WORDINGS[task].every
        )


# -------------------------------------------------------------------------------------- the command


def test_the_command_writes_sentences_and_their_families(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--wording", "free", "--hold-out-wordings")
    assert recipe(tmp_path / "one", *options) == 0
    assert recipe(tmp_path / "two", *options, "--workers", "2") == 0
    files = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1]
    found = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert set(found["validation"]["per_task"]) == {*TASKS, *(f"{t}_reworded" for t in TASKS)}
    assert set(found["train"]["per_task"]) == {*TASKS, "text"}
    for name in ("train", "validation"):
        for sample in Split(tmp_path / "one" / name):
            assert all(re.search(r"^\w.* .*\.$", turn.assistant) for turn in sample.turns)
    assert recipe(tmp_path / "one") == 2
    assert "wording is 'free' there and None here" in capsys.readouterr().err
    assert recipe(tmp_path / "one", *options, "--scale", "2") == 2
    assert "scale is None there and 2.0 here" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [0.5, 1.75])
def test_a_scale_is_of_the_sides_and_changes_no_word(scale: float, short: list[Example]) -> None:
    for one, other in zip(samples(Style(scale=scale), 60), short, strict=False):
        assert one.texts == other.texts
        for data, plain in zip(one.images, other.images, strict=True):
            image, usual = (Image.open(io.BytesIO(d)).convert("RGB") for d in (data, plain))
            assert image.size == tuple(round(side * scale) for side in usual.size)
            back = np.asarray(image.resize(usual.size), dtype=int)
            assert np.abs(back - np.asarray(usual, dtype=int)).mean() < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--wording", "free", "--tasks", "all"], "no wordings for position, digit, word, chart"),
        (["--wording", "free", "--tasks", "shape,word"], "no wordings for word; expected --tasks"),
        (["--hold-out-wordings"], "--hold-out-wordings without --wording free"),
        (["--scale", "0.4"], "--scale is 0.4; expected a number of 0.5 to 8.0"),
        (["--scale", "nan"], "--scale is nan"),
        (["--scale", "inf"], "--scale is inf"),
    ],
)
def test_bad_input_is_one_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (tmp_path / "out").exists()
