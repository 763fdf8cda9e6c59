"""Conversations that ask for one ability: the pixels, read by other means, show the answer."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from casa_train.data.prepared.shards import Split
from data_recipes import synthetic_abilities, synthetic_scenes
from data_recipes.__main__ import main
from data_recipes.synthetic import IMAGE_END
from data_recipes.synthetic_abilities import FAMILIES, LETTERS, NAMES, ability_example
from data_recipes.synthetic_drawing import COLOURS, KINDS, Canvas, Region, print_text
from data_recipes.synthetic_scenes import NUMBERS, Example, SplitName

PALETTE = np.array(list(COLOURS.values()))
ABILITIES = (
    "newest earlier_2 earlier_4 earlier_8 compare counting spelling relation bars_value bars_order "
    "text_between when stream_32 stream_64 stream_128 stream_256"
).split()
OPTIONS = {  # answers among which each ability's are uniform
    "counting": [str(n) for n in range(1, 10)],
    "relation": ["left", "right", "above", "below"],
    "bars_value": [str(n) for n in range(1, 6)],
    "when": list(NUMBERS[:6]),
}
NAMING = [a for a in ABILITIES if a[:4] in ("newe", "earl", "rela", "when", "stre")] + [
    "bars_value"
]
COLOURED = [a for a in ABILITIES if a not in (*OPTIONS, "spelling", "text_between")]
OPTIONS |= {ability: list(COLOURS) for ability in COLOURED}


def examples(count: int, split: SplitName = "validation", seed: int = 5) -> list[Example]:
    return [ability_example(seed, split, list(FAMILIES), i) for i in range(count)]


@pytest.fixture(scope="module")
def held_out() -> list[Example]:
    return examples(16 * 6)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn: thousands of samples a second, for statistics of their words."""
    monkeypatch.setattr(Canvas, "shape", lambda *_: None)
    monkeypatch.setattr(Canvas, "finish", lambda *_: None)
    monkeypatch.setattr(synthetic_abilities, "png", lambda *_: b"")
    monkeypatch.setattr(synthetic_abilities, "print_capital", lambda *_: None)
    monkeypatch.setattr(synthetic_abilities, "draw_bars", lambda *_: None)
    monkeypatch.setattr(synthetic_abilities, "_empty", lambda *_: (None, "nothing"))


# ------------------------------------------------------------------------------ reading the pixels


def pixels(data: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def shapes_of(data: bytes) -> list[tuple[str, str, float, float]]:
    """Kind, colour and centre (x, y) of every shape: connected pixels of strong colour."""
    picture = pixels(data)
    strong = picture.max(2) - picture.min(2) > 60
    found = []
    marked, count = ndimage.label(strong)
    for i in range(1, count + 1):
        rows, columns = np.nonzero(marked == i)
        if len(rows) < 60:
            continue
        colour = np.median(picture[rows, columns], axis=0)
        name = list(COLOURS)[int(np.abs(PALETTE - colour).sum(1).argmin())]
        box = ndimage.find_objects(marked)[i - 1]
        found.append((kind_of(marked[box] == i), name, columns.mean(), rows.mean()))
    return found


def kind_of(mask: np.ndarray[Any, Any]) -> str:
    """By how full the box around a shape is, and its corners."""
    height, width = mask.shape
    corner = max(2, height // 8)
    top = mask[:corner, :corner].mean() + mask[:corner, -corner:].mean()
    bottom = mask[-corner:, :corner].mean() + mask[-corner:, -corner:].mean()
    if mask.mean() > 0.9:
        return "square"
    if mask.mean() > 0.7:
        return "circle"
    return "triangle" if bottom - top > 0.3 else "cross"


def bars_of(data: bytes) -> dict[str, int]:
    """Heights of the bars by colour: against the lines that mark the levels."""
    picture = pixels(data)
    strong = picture.max(2) - picture.min(2) > 60
    marked, count = ndimage.label(strong)
    boxes = [box for box in ndimage.find_objects(marked)]
    found = {}
    for i, box in enumerate(boxes[:count], 1):
        area = marked[box] == i
        if area.sum() < 40:
            continue
        colour = np.median(picture[box][area], axis=0)
        name = list(COLOURS)[int(np.abs(PALETTE - colour).sum(1).argmin())]
        found[name] = max(found.get(name, 0), box[0].stop - box[0].start)
    return found


@cache
def glyph(letter: str) -> np.ndarray[Any, Any]:
    """A letter alone, as it is printed, cut out and scaled to 16 x 16."""
    from PIL import ImageDraw

    image = Image.new("RGB", (60, 60), (240, 240, 240))
    rng = np.random.default_rng(0)
    print_text(rng, ImageDraw.Draw(image), letter, (0, 0, 0), Region(5, 5, 40, 40))
    dark = np.asarray(image.convert("L")) < 120
    return scaled(dark[ndimage.find_objects(dark.astype(int))[0]])


def scaled(mask: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.fromarray((255 * mask).astype(np.uint8)).resize((16, 16))) / 255.0


def letters_of(data: bytes) -> str:
    """The word of a picture, letter by letter from the left."""
    picture = pixels(data)
    far = np.abs(picture - np.median(picture, axis=(0, 1))).sum(2)
    dark = far > 0.35 * far.max()
    row = int(np.nonzero(dark)[0].min()) // 28 * 28
    read = ""
    for left in (0, 28, 56):
        cell = dark[row : row + 28, left : left + 28]
        cut = scaled(cell[ndimage.find_objects(cell.astype(int))[0]])
        read += min(LETTERS, key=lambda letter: float(np.abs(glyph(letter) - cut).sum()))
    return read


# ---------------------------------------------------------------------------------- what they say


def ending(sample: Example) -> tuple[str, str]:
    """The last question, and its answer without the word of the question that it begins with."""
    question, answer = sample.texts[-1]
    first, _, rest = answer.partition(" ")
    if sample.task in NAMING:
        assert first in question.split(">")[-1]
        return question, rest
    return question, answer


def test_each_ability_is_held_out_equally_often_and_trained_by_family() -> None:
    assert Counter(e.task for e in examples(48)) == dict.fromkeys(ABILITIES, 3)
    trained = Counter(e.task for e in examples(180, "train"))
    assert {t.split("_")[0] for t in trained} == {family.split("_")[0] for family in FAMILIES}
    assert trained["earlier"] == trained["relation"] == 30
    assert trained["stream"] == trained["when"] == 20
    assert trained["newest"] == trained["counting"] == 10


def test_the_answer_is_what_the_pixels_show(held_out: list[Example]) -> None:
    checked: Counter[str] = Counter()
    for sample in held_out:
        question, answer = ending(sample)
        if sample.task.startswith(("newest", "earlier")):
            named = re.findall(r"<image>([a-z]+)", question)
            name = question.split(":")[0].split()[-1]
            back = len(named) - 1 - named.index(name)
            assert sample.task == ("newest" if back == 0 else f"earlier_{back}")
            assert len(named) == len(sample.images) == 10
            ((_, colour, _, _),) = shapes_of(sample.images[named.index(name)])
            assert colour == answer
        elif sample.task == "compare":
            first, second = ({s[1] for s in shapes_of(image)} for image in sample.images)
            assert first & second == {answer} and len(first) == len(second) > 1
        elif sample.task == "counting":
            assert len(shapes_of(sample.images[0])) == int(answer)
        elif sample.task == "spelling":
            assert letters_of(sample.images[0]) == answer.replace(" ", "")
        elif sample.task == "relation":
            asked = re.search(r"Where is the (\w+), seen from the (\w+)\?", question)
            assert asked
            at = {kind: (x, y) for kind, _, x, y in shapes_of(sample.images[0])}
            (x, y), (from_x, from_y) = at[asked[1]], at[asked[2]]
            if abs(x - from_x) > abs(y - from_y):
                assert answer == ("left" if x < from_x else "right")
            else:
                assert answer == ("above" if y < from_y else "below")
        elif sample.task.startswith("bars"):
            heights = bars_of(sample.images[0])
            assert len(heights) == 3
            if sample.task == "bars_order":
                order = re.search(r"the (.+)\?", question)
                assert order
                rank = ["tallest", "middle", "shortest"].index(order[1])
                assert sorted(heights, key=lambda c: -heights[c])[rank] == answer
            else:
                colour = question.split(" the ")[1].split()[0]
                # 84 pixels less margins and half a line of text, in five steps
                step = (84 - 4 - 0.6 * 11) / 5
                assert round(heights[colour] / step) == int(answer)
        elif sample.task == "when":
            frames = [shapes_of(image)[0][1] for image in sample.images]
            colour = question.split()[-1].removesuffix("?")
            assert frames.count(colour) == 1 and len(frames) == 6
            assert re.findall(r"(\w+) <image>", question) == [*NUMBERS[:6]]
            assert NUMBERS[frames.index(colour)] == answer
        elif sample.task.startswith("stream"):
            kind = question.split()[-1].removesuffix("?")
            seen = list(itertools.chain(*map(shapes_of, sample.images)))
            assert len(seen) == 3 and len(sample.images) == int(sample.task.split("_")[1])
            assert [colour for k, colour, _, _ in seen if k == kind] == [answer]
        else:
            assert sample.task == "text_between" and "<image>" not in question
            continue
        checked[sample.task] += 1
    assert set(checked) == {*ABILITIES} - {"text_between"} and min(checked.values()) == 6


def test_answers_are_uniform_whatever_is_asked(undrawn: None) -> None:
    """A guess from the words alone, the history included, is right as often as by chance."""
    by_ability: dict[str, Counter[str]] = defaultdict(Counter)
    by_words: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in examples(16 * 900):
        question, answer = ending(sample)
        by_ability[sample.task][answer] += 1
        if sample.task in OPTIONS:
            words = re.sub(r"<image>([a-z]+ )?", "", question)
            by_words[sample.task, words][answer] += 1
    p_values = []
    for ability, options in OPTIONS.items():
        counts = by_ability[ability]
        assert set(counts) == {*options}, ability
        p_values.append(stats.chisquare([counts[o] for o in options]).pvalue)
    for (ability, _), counts in by_words.items():
        if ability == "bars_order" or counts.total() < 60:
            continue
        options = OPTIONS[ability]
        p_values.append(stats.chisquare([counts[o] for o in options]).pvalue)
    assert len(p_values) > 40
    assert min(p_values) * len(p_values) > 0.001
    spelled = Counter(c for word in by_ability["spelling"].elements() for c in word.split())
    assert set(spelled) == {*LETTERS}
    assert stats.chisquare(list(spelled.values())).pvalue > 0.0005


def test_the_history_says_nothing_of_what_is_asked(undrawn: None) -> None:
    for sample in examples(16 * 40):
        if sample.task == "text_between":
            assert len(sample.texts) == 6 and len(sample.images) == 3
        else:
            assert len(sample.texts) == 1
        question, _ = sample.texts[-1]
        shown = re.findall(r"<image>([a-z]*)", question)
        assert not {*shown} & {*COLOURS, *KINDS}
        if sample.task.startswith(("newest", "earlier")):
            assert len({*shown}) == 10 and {*shown} <= {*NAMES}
            assert not {*COLOURS} & {*re.findall(r"\w+", question)}


def test_training_asks_several_questions_of_different_things(undrawn: None) -> None:
    asked: dict[str, set[int]] = defaultdict(set)
    for sample in examples(1000, "train"):
        questions = [re.sub(r"<image>([a-z]+ )?", "", question) for question, _ in sample.texts]
        asked[sample.task].add(len(questions))
        if sample.task != "text_between":
            assert len({*questions}) == len(questions) <= 5
    assert asked["stream"] == asked["bars_value"] == {3} and asked["earlier"] == {2, 3, 4, 5}
    assert asked["when"] == asked["newest"] == asked["counting"] == asked["bars_order"] == {1}


def test_words_say_what_pictures_would_show() -> None:
    checked: Counter[str] = Counter()
    for i in range(14 * 4):
        told = ability_example(5, "validation", list(FAMILIES), i, described=True)
        assert not told.images and "<image>" not in str(told.texts)
        question, answer = ending(told)
        words = re.findall(r"\[ ([^]]*) \]", question)
        checked[told.task] += 1
        if told.task == "counting":
            assert len(words[0].split()) == 2 * int(answer)
        elif told.task == "spelling":
            assert words == [answer]
        elif told.task == "compare":
            first, second = ({*w.split()} & {*COLOURS} for w in words)
            assert first & second == {answer}
        elif told.task == "when":
            frame = words[list(NUMBERS).index(answer)]
            assert frame.split()[0] == question.split()[-1].removesuffix("?")
        elif told.task.startswith("stream"):
            assert f"{answer} {question.split()[-1].removesuffix('?')}" in words
            assert len(words) == int(told.task.split("_")[1])
        elif told.task.startswith(("newest", "earlier")):
            name = question.split(":")[0].split()[-1]
            assert re.search(rf"\[ {answer} \w+ \] {name} ", question)
        elif told.task == "relation":
            places = words[0].split()
            asked = re.search(r"Where is the (\w+), seen from the (\w+)\?", question)
            assert asked and len(places) == 4
            at, other = places.index(asked[1]), places.index(asked[2])
            if at // 2 == other // 2:
                assert answer == ("left" if at < other else "right")
            else:
                assert at % 2 == other % 2 and answer == ("above" if at < other else "below")
        elif told.task == "bars_value":
            assert f"{answer} {question.split(' the ')[1].split()[0]}" in words[0]
    assert set(checked) == {*ABILITIES} - {"stream_128", "stream_256"}
    for i in range(200):
        assert len(str(ability_example(5, "train", ["stream"], i, described=True).texts)) < 1200


def test_lists_are_recited_as_they_were_told(undrawn: None) -> None:
    lengths = set()
    for i in range(100):
        sample = ability_example(5, "train", ["recite"], i, described=True)
        ((question, answer),) = sample.texts
        assert sample.task == "recite"
        told = {name: c for c, name in re.findall(r"\[ (\w+) \w+ \] (\w+)", question)}
        lengths.add(len(told))
        asked = question.split("have ")[1].removesuffix("?").split()
        assert len(asked) == 12
        assert answer.split() == [word for name in asked for word in (name, told[name])]
    assert lengths == {*range(2, 11)}


# ----------------------------------------------------------------------------------- the dataset


def recipe(out: Path, *options: str) -> int:
    sizes = ("--samples", "60", "--validation", "32", "--seed", "3", "--workers", "1")
    return main(["synthetic", "--out", str(out), *sizes, *options])


def test_a_dataset_of_abilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe(tmp_path / "a", "--tasks", "abilities") == 0
    assert "stream_256 2" in capsys.readouterr().out
    # However the word for all is written, it leaves out what asks for no ability.
    assert recipe(tmp_path / "a", "--tasks", "abilities,") == 0
    assert "already holds this dataset" in capsys.readouterr().out
    train, validation = Split(tmp_path / "a/train"), Split(tmp_path / "a/validation")
    assert {validation.source(i) for i in range(32)} == {f"synthetic_{a}" for a in ABILITIES}
    digests = [
        {synthetic_scenes.digest(image) for sample in split for image in sample.images}
        for split in (train, validation)
    ]
    assert not digests[0] & digests[1]
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["arguments"]["template"] == "demo_live"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a/tokenizer")
    assert tokenizer.tokenize(IMAGE_END) == [IMAGE_END]
    for word in (*NAMES, *COLOURS, *NUMBERS[:6], *"123456789"):
        assert len(tokenizer.tokenize(word)) == 1, word
        assert tokenizer.tokenize(f"{word} {word}") == 2 * tokenizer.tokenize(word), word


def test_some_abilities_alone_and_none_beside_other_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "b", "--tasks", "when,bars") == 0
    split = Split(tmp_path / "b/train")
    assert {split.source(i).split("_")[1] for i in range(60)} == {"bars", "when"}
    capsys.readouterr()
    assert recipe(tmp_path / "c", "--tasks", "when,colour") == 2
    assert "'colour'" in capsys.readouterr().err
    assert recipe(tmp_path / "d", "--tasks", "abilities", "--wording", "free") == 2
    assert "--wording" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["abilities", "--scale", "2"], "--scale is 2.0 with --tasks newest"),
        (["stream,when", "--wording", "free"], "no wordings for when, stream"),
        (["shape,word", "--described"], "--described without abilities"),
        (["newest,shape"], "--tasks names 'shape'; expected .*newest, .*or 'abilities' alone"),
        (["recite,shape"], "--tasks names 'shape'; expected .*stream, recite, or 'abilities'"),
        (["abilities,newest"], "--tasks names 'abilities'; expected .*or 'abilities' alone"),
        (["colour,smell"], "--tasks names 'smell'; expected .*or 'all' alone"),
    ],
)
def test_what_does_not_go_with_abilities_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["synthetic", "--out", str(tmp_path / "x"), "--samples", "4", "--validation", "2"]
    assert main([*command, "--seed", "1", "--workers", "1", "--tasks", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "x").exists()
