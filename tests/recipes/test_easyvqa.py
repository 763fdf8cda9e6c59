"""The recipe of easy-VQA: the published set, its answers as sentences, balance, disjoint splits."""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from casa_train.data.prepared.shards import Split
from casa_train.data.tokens import load_tokenizer
from data_recipes import easyvqa
from data_recipes.__main__ import main
from data_recipes.easyvqa import blind_guesses, conversations, cut
from data_recipes.easyvqa_questions import FAMILIES, RULES, Asked, read_question
from data_recipes.synthetic import build_tokenizer

easy_vqa = pytest.importorskip("easy_vqa", reason="the extra `real` has the package easy-vqa")

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SAMPLES, VALIDATION, SEED = 240, 48, 7
OPEN = ("colour", "shape")


def recipe(out: Path, *options: str) -> int:
    given = ["--out", str(out), "--seed", str(SEED), "--workers", "1"]
    sizes = ["--samples", str(SAMPLES), "--validation", str(VALIDATION)]
    return main(["easyvqa", *given, *sizes, *options])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("easyvqa") / "data"
    options = ("--tasks", "shape,colour", "--answers", "sentences", "--turns", "2")
    assert recipe(out, *options) == 0
    return out


def published(split: str) -> list[tuple[str, str, int]]:
    """(question, answer, picture) of the package itself."""
    read = easy_vqa.get_train_questions if split == "train" else easy_vqa.get_test_questions
    return list(zip(*read(), strict=True))


def pictures(split: str) -> dict[int, bytes]:
    read = easy_vqa.get_train_image_paths if split == "train" else easy_vqa.get_test_image_paths
    return {number: Path(path).read_bytes() for number, path in read().items()}


def truth(question: str, shape: str, colour: str) -> str | None:
    """The answer of someone who sees the picture; None to a question about what is not there."""
    words = set(re.findall(r"\w+", question))
    named = words & {*SHAPES, *COLOURS}
    if question.startswith("what"):
        if named - {shape, colour}:
            return None
        return colour if "color" in words else shape
    there = named <= {shape, colour}
    return "yes" if there != bool(words & {"no", "not"}) else "no"


# -------------------------------------------------------------------------------- the published set


@pytest.mark.parametrize(
    ("split", "questions", "yes_no", "shown"),
    [("train", 38_575, 28_407, 4_000), ("validation", 9_673, 7_136, 1_000)],
)
def test_every_published_question_is_asked_once(
    split: easyvqa.SplitName, questions: int, yes_no: int, shown: int
) -> None:
    """The counts are those of its authors' README."""
    alone = conversations(split, SEED, FAMILIES, 1)
    asked = [(talk[0].text, talk[0].answer, picture) for picture, talk in alone]
    assert sorted(asked) == sorted(published(split)) and len(asked) == questions
    assert sum(talk[0].family == "yes_no" for _, talk in alone) == yes_no
    assert len({picture for picture, _ in alone}) == shown
    together = conversations(split, SEED, FAMILIES, 3)
    asked = [(turn.text, turn.answer, picture) for picture, talk in together for turn in talk]
    assert sorted(asked) == sorted(published(split))
    assert {len(talk) for _, talk in together} == {1, 2, 3}


def test_there_are_thirteen_answers() -> None:
    assert {answer for _, answer, _ in published("train")} == {*SHAPES, *COLOURS, "yes", "no"}
    assert sorted(easy_vqa.get_answers()) == sorted({*SHAPES, *COLOURS, "yes", "no"})


def test_a_picture_has_one_shape_and_one_colour_and_answers_say_so() -> None:
    by_picture: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for question, answer, picture in published("validation"):
        by_picture[picture].append((question, answer))
    for asked in by_picture.values():
        assert any(
            all(truth(question, *world) == answer for question, answer in asked)
            for world in product(SHAPES, COLOURS)
        ), asked


# ---------------------------------------------------------------------------------------- sentences

SENTENCES = [
    ("what color is the circle?", "red", "The circle is red."),
    ("what is the color of the shape?", "teal", "The color of the shape is teal."),
    ("what shape is in the image?", "circle", "The shape in the image is a circle."),
    ("what shape does the image contain?", "triangle", "The image contains a triangle."),
    ("what shape is present?", "rectangle", "The shape is a rectangle."),
    ("what is the gray shape?", "circle", "The gray shape is a circle."),
    ("is there a red shape?", "yes", "Yes, there is a red shape."),
    ("is there a circle?", "no", "No, there is no circle."),
    ("is there not a circle?", "yes", "Yes, there is no circle."),
    ("is there not a blue shape?", "no", "No, there is a blue shape."),
    ("is there a circle in the image?", "yes", "Yes, there is a circle in the image."),
    ("is there not a circle in the image?", "no", "No, there is a circle in the image."),
    ("does the image contain a circle?", "no", "No, the image does not contain a circle."),
    ("does the image not contain a circle?", "no", "No, the image contains a circle."),
    ("is a black shape present?", "yes", "Yes, a black shape is present."),
    ("is no black shape present?", "yes", "Yes, no black shape is present."),
]


@pytest.mark.parametrize(("question", "answer", "sentence"), SENTENCES)
def test_an_answer_is_a_sentence(question: str, answer: str, sentence: str) -> None:
    asked = read_question(question, answer)
    assert asked.words() == (question, answer)
    assert asked.sentences() == (question[0].upper() + question[1:], sentence)


def test_sentences_stand_for_published_answers_one_to_one() -> None:
    """So that a score on sentences is a score on the thirteen answers."""
    assert {read_question(q, a).rule for q, a, _ in SENTENCES} == set(RULES)
    answers: dict[str, set[str]] = defaultdict(set)
    sentences: dict[tuple[str, str], set[str]] = defaultdict(set)
    for question, answer, _ in published("train"):
        said = read_question(question, answer).sentences()[1]
        answers[question].add(answer)
        sentences[question, answer].add(said)
        assert re.fullmatch(r"[A-Z][a-z, ]+\.", said) and "{" not in said
    assert len(answers) == 107
    for question, possible in answers.items():
        said = [sentences[question, answer] for answer in possible]
        assert all(len(s) == 1 for s in said) and len(set().union(*said)) == len(possible)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("what color is the square?", "red"),
        ("is there a purple shape?", "no"),
        ("what color is the circle?", "circle"),
        ("how many shapes are there?", "one"),
    ],
)
def test_other_data_are_refused(question: str, answer: str) -> None:
    with pytest.raises(easyvqa.UserError, match=r"easy-vqa==1\.0") as error:
        read_question(question, answer)
    assert repr(question) in str(error.value) and repr(answer) in str(error.value)


# ------------------------------------------------------------------------------------ conversations

TEXTS = sorted({question for question, _, _ in published("validation")})


@given(
    st.sampled_from(list(product(SHAPES, COLOURS))),
    st.lists(st.sampled_from(TEXTS), unique=True, max_size=12),
    st.integers(1, 4),
)
def test_no_turn_gives_a_later_answer_away(
    world: tuple[str, str], texts: list[str], turns: int
) -> None:
    asked = [read_question(t, a) for t in texts if (a := truth(t, *world)) is not None]
    talks = cut(asked, turns)
    assert Counter(turn for talk in talks for turn in talk) == Counter(asked)
    for talk in talks:
        assert 1 <= len(talk) <= turns
        for i in range(1, len(talk)):
            possible = [
                other
                for other in product(SHAPES, COLOURS)
                if all(truth(turn.text, *other) == turn.answer for turn in talk[:i])
            ]
            assert world in possible
            answers = {truth(talk[i].text, *other) for other in possible} - {None}
            assert len(answers) > 1, [turn.text for turn in talk]


def test_what_is_said_before_counts() -> None:
    first = read_question("what color is the circle?", "red")
    given_away = [("what shape is present?", "circle"), ("is there a red shape?", "yes")]
    others = [read_question(*turn) for turn in given_away]
    assert cut([first, *others], 3) == [(first,), (others[0], others[1])]
    assert cut([others[0], first], 2) == [(others[0], first)]


# ------------------------------------------------------------------------------------------ balance


def test_fewer_samples_have_even_shares_of_families_and_answers() -> None:
    talks = [talk for _, talk in conversations("train", SEED, FAMILIES, 1)[:720]]
    counts = Counter((talk[0].family, talk[0].answer) for talk in talks)
    assert {counts["colour", colour] for colour in COLOURS} == {30}
    assert {counts["shape", shape] for shape in SHAPES} == {80}
    assert {counts["yes_no", answer] for answer in ("yes", "no")} == {120}
    there = [truth(t[0].text, "?", "?") == t[0].answer for t in talks if t[0].family == "yes_no"]
    assert sum(there) == 120  # half of them about what is there


def test_a_seed_is_an_order_and_splits_have_orders_of_their_own() -> None:
    one, other = (conversations("train", seed, OPEN, 1) for seed in (SEED, SEED + 1))
    assert one != other and set(one) == set(other)
    assert one == conversations("train", SEED, OPEN, 1)


def test_what_is_right_without_a_picture() -> None:
    known = [("what color is the shape?", "red")] * 3 + [("what color is the shape?", "blue")]
    asked = [
        *([("what color is the shape?", "red")] * 2),
        *([("what color is the shape?", "teal")] * 3),
        ("what is the color of the shape?", "red"),
        ("is there a circle?", "no"),
    ]
    found = blind_guesses(*([read_question(*turn) for turn in turns] for turns in (asked, known)))
    assert found == {
        "colour": {"questions": 6, "answer": "red", "share": 3 / 6, "by_question": 2 / 6},
        "yes_no": {"questions": 1, "answer": "no", "share": 1.0, "by_question": 0.0},
    }


# -------------------------------------------------------------------------------------- the command


def test_samples_are_read_as_training_reads_them(dataset: Path) -> None:
    summary = json.loads((dataset / "summary.json").read_text())
    for name, size in (("train", SAMPLES), ("validation", VALIDATION)):
        split, found = Split(dataset / name), summary[name]
        assert len(split) == size == found["samples"] == found["images"]
        assert found["per_task"] == {"colour": size // 2, "shape": size // 2}
        assert found["blind_guess"]["colour"]["share"] == 1 / 8
        assert found["blind_guess"]["shape"]["share"] == 1 / 3
        shown = set(pictures(name).values())
        for sample in split:
            assert sample.images[0] in shown and len(sample.images) == 1
            assert sample.turns[0].images == (0,) and len(sample.turns) <= 2
            first = sample.turns[0].user[-1]
            assert isinstance(first, str) and first[0].isupper()
            assert sample.source == f"easyvqa_{'colour' if 'color' in first else 'shape'}"
        assert any(len(sample.turns) == 2 for sample in split)


def test_several_pictures_stand_each_before_their_own_questions(
    dataset: Path, tmp_path: Path
) -> None:
    options = ("--tasks", "shape,colour", "--answers", "sentences", "--turns", "2")
    assert recipe(tmp_path / "out", *options, "--pictures", "3", "--samples", "70") == 0
    single = list(Split(dataset / "train"))
    samples = list(Split(tmp_path / "out" / "train"))
    assert len(samples) == 70
    for i, sample in enumerate(samples):
        alone = single[3 * i : 3 * i + 3]  # the same ones, in the same order
        assert sample.images == tuple(image for one in alone for image in one.images)
        turns = [turn for one in alone for turn in one.turns]
        assert [turn.assistant for turn in sample.turns] == [turn.assistant for turn in turns]
        assert [turn.user[-1] for turn in sample.turns] == [turn.user[-1] for turn in turns]
        shown = [image for turn in sample.turns for image in turn.images]
        assert shown == [0, 1, 2]
        starts = [bool(turn.images) for turn in sample.turns]
        assert starts == [bool(turn.images) for turn in turns]
        assert sample.source == "easyvqa"
    assert all(len(sample.images) == 1 for sample in Split(tmp_path / "out" / "validation"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    blind = summary["train"]["blind_guess"]
    assert blind["colour"]["questions"] + blind["shape"]["questions"] == 210


def test_a_colour_that_is_answered_is_the_pictures(dataset: Path) -> None:
    """One colour word, one colour of pixels: read from the pictures alone."""
    seen: dict[str, Counter[object]] = defaultdict(Counter)
    for sample in Split(dataset / "train"):
        for turn in sample.turns:
            if match := re.search(r" is (\w+)\.$", turn.assistant):
                with Image.open(io.BytesIO(sample.images[0])) as image:
                    pixels = Counter(image.convert("RGB").getdata())
                (_, (shape, _)) = pixels.most_common(2)  # the most frequent is the background
                seen[match[1]][shape] += 1
    assert sorted(seen) == sorted(COLOURS)
    assert all(len(found) == 1 for found in seen.values())
    assert len({pixel for found in seen.values() for pixel in found}) == len(COLOURS)


def test_no_picture_stands_in_both_splits() -> None:
    """Of the whole published set, by its pixels."""
    shown = {
        split: {Image.open(io.BytesIO(data)).convert("RGB").tobytes() for data in found.values()}
        for split, found in ((s, pictures(s)) for s in ("train", "validation"))
    }
    assert len(shown["train"]) == 4_000 and len(shown["validation"]) == 1_000
    assert not shown["train"] & shown["validation"]


def test_processes_and_order_of_tasks_change_no_byte(dataset: Path, tmp_path: Path) -> None:
    options = ("--tasks", "colour,shape", "--answers", "sentences", "--turns", "2")
    assert recipe(tmp_path / "again", *options, "--workers", "2") == 0
    files = [
        {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        for out in (dataset, tmp_path / "again")
    ]
    assert files[0] == files[1] and len(files[0]) > 8


def test_published_words_are_the_default_and_a_model_counts_its_own_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["rectangle triangle teal gray brown"] * 50, ["<|im_start|>"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "data"
    assert recipe(out, "--tokenizer", str(tmp_path / "model"), "--template", "auto") == 0
    split = Split(out / "train")
    own = load_tokenizer(str(out / "tokenizer"))
    users, answers = (split.list_column(f"{who}_tokens")[0] for who in ("user", "assistant"))
    pairs = {(question, answer) for question, answer, _ in published("train")}
    for i, sample in enumerate(split):
        (turn,) = sample.turns
        text = turn.user[-1]
        assert (text, turn.assistant) in pairs
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
        messages[1]["content"] = turn.assistant
        rendered = own.apply_chat_template(messages, tokenize=False)
        whole = own.encode(rendered, add_special_tokens=False)
        assert users[i] + answers[i] == len(whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--tasks", "colour,size"],
            "--tasks names 'size'; expected a comma-separated list out of",
        ),
        (["--tasks", ""], "--tasks names nothing"),
        (["--samples", "5167", "--tasks", "colour"], "gives 5166 samples of colour with --turns 1"),
        (["--validation", "9674"], "--validation is 9674, but easy-VQA gives 9673 samples"),
        (["--samples", "0"], "--samples is 0; expected a whole number of at least 1"),
        (["--validation", "-1"], "--validation is -1"),
        (["--turns", "0"], "--turns is 0"),
        (["--pictures", "0"], "--pictures is 0"),
        (["--samples", "7000", "--pictures", "6"], "gives 6429 samples"),
        (["--seed", "-1"], "--seed is -1"),
        (["--workers", "0"], "--workers is 0"),
        (["--tokenizer", "./nowhere"], "neither a directory nor a hub id"),
        (["--template", "smollm2"], "special token '<|im_start|>', which the tokenizer"),
    ],
)
def test_bad_input_is_one_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_directory_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert recipe(tmp_path / "out", "--tokenizer", str(tmp_path / "empty")) == 2
    assert f"tokenizer '{tmp_path / 'empty'}' cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_message_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    for cached in (easyvqa._published, easyvqa._conversations):
        cached.cache_clear()
    assert recipe(tmp_path / "out") == 2
    assert "pip install easy-vqa==1.0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_package_without_all_pictures_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = easy_vqa.get_test_image_paths()
    del paths[5], paths[17]
    monkeypatch.setattr(easy_vqa, "get_test_image_paths", lambda: paths)
    for cached in (easyvqa._published, easyvqa._conversations):
        cached.cache_clear()
    assert recipe(tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "lacks 2 pictures that it asks about, such as 5.png of validation" in error
    assert not (tmp_path / "out").exists()


def test_another_choice_is_another_dataset(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tasks", "shape,colour", "--answers", "sentences")
    assert recipe(dataset, *options, "--turns", "2") == 0
    assert "nothing to do" in capsys.readouterr().out
    assert recipe(dataset, *options) == 2
    assert "turns is 2 there and 1 here" in capsys.readouterr().err


def test_a_mixture_takes_it(dataset: Path, tmp_path: Path) -> None:
    assert main(["mixture", "--data", str(dataset.parent), "--out", str(tmp_path / "m.yaml")]) == 0
    written = yaml.safe_load((tmp_path / "m.yaml").read_text())
    assert written["sources"] == {"easyvqa": {"path": str(dataset / "train")}}
    assert written["validation"] == {"easyvqa": {"path": str(dataset / "validation")}}


def test_held_out_samples_can_be_left_out(tmp_path: Path) -> None:
    assert recipe(tmp_path / "out", "--validation", "0", "--samples", "9") == 0
    assert len(Split(tmp_path / "out" / "train")) == 9
    assert not (tmp_path / "out" / "validation").exists()


def test_a_question_knows_what_it_leaves_possible() -> None:
    for text in TEXTS:
        for answer in {truth(text, *world) for world in product(SHAPES, COLOURS)} - {None}:
            assert answer is not None
            asked: Asked = read_question(text, answer)
            expected = {w for w in product(SHAPES, COLOURS) if truth(text, *w) == answer}
            assert asked.possible == expected
