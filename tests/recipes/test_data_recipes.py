"""The synthetic recipe: determinism, balance, disjoint splits, answers found in the pixels."""

from __future__ import annotations

import io
import json
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot
from casa_train.data.schemas.rows import finevision
from casa_train.data.tokens import load_tokenizer, tokenizer_fingerprint
from data_recipes.__main__ import main
from data_recipes.synthetic import (
    ASSISTANT,
    BOS,
    END,
    PAD,
    USER,
    build_tokenizer,
    draw_apart,
)
from data_recipes.synthetic_drawing import COLOURS, GRIDS, KINDS, LARGEST_ASPECT, LONGEST_SIDE
from data_recipes.synthetic_scenes import (
    NUMBERS,
    QUADRANTS,
    TASK_NAMES,
    TASKS,
    WORDS,
    Example,
    corpus,
    example,
    task_of,
)

RATINGS = ("relevance", "image_correspondence", "visual_dependency", "formatting")
SAMPLES, VALIDATION = 150, 40


def _recipe(out: Path, *options: str) -> int:
    sizes = ("--samples", str(SAMPLES), "--validation", str(VALIDATION), "--seed", "3")
    return main(["synthetic", "--out", str(out), *sizes, "--workers", "1", *options])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "synthetic"
    assert _recipe(out) == 0
    return out


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Training samples of all tasks, enough for statistics."""
    return [example(11, "train", TASK_NAMES, i) for i in range(2500)]


def _files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------------------ determinism


def test_a_sample_is_a_function_of_seed_split_index_and_attempt() -> None:
    sample = example(5, "train", TASK_NAMES, 17)
    assert sample == example(5, "train", TASK_NAMES, 17)
    others = [
        example(6, "train", TASK_NAMES, 17),
        example(5, "validation", TASK_NAMES, 17),
        example(5, "train", TASK_NAMES, 18),
        example(5, "train", TASK_NAMES, 17, attempt=1),
    ]
    assert all(sample != other for other in others)
    assert others[-1].task == sample.task


def test_processes_and_order_of_tasks_change_no_byte(dataset: Path, tmp_path: Path) -> None:
    shuffled = ",".join(reversed(TASK_NAMES[:-1]))
    assert _recipe(tmp_path / "again", "--workers", "2", "--tasks", shuffled) == 0
    assert _files(tmp_path / "again") == _files(dataset)


def test_tasks_have_even_shares_and_text_is_for_training_only() -> None:
    train = Counter(task_of(0, "train", i, TASK_NAMES) for i in range(25 * 70))
    assert train.pop("text") == 70
    assert set(train) == set(TASKS) and set(train.values()) == {240}
    held_out = Counter(task_of(0, "validation", i, TASK_NAMES) for i in range(25 * 70))
    assert set(held_out) == set(TASKS) and set(held_out.values()) == {250}
    assert {task_of(0, "train", i, ["text"]) for i in range(30)} == {"text"}


# ------------------------------------------------------------------------------------ writing


def test_rows_have_finevisions_columns(dataset: Path) -> None:
    columns = {"texts", "source"}
    columns |= {f"{name}_{suffix}" for name in RATINGS for suffix in ("ratings", "min")}
    shards = sorted(str(path) for path in (dataset / "train").glob("shard-*.tar"))
    rows = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [row["__key__"] for row in rows] == [f"train-{i:07d}" for i in range(SAMPLES)]
    for raw in rows:
        row = json.loads(raw["json"])
        assert set(row) == columns
        assert 1 <= len(row["texts"]) <= 3
        assert all(set(turn) == {"user", "assistant"} for turn in row["texts"])
        assert row["source"].removeprefix("synthetic_") in TASK_NAMES
        for name in RATINGS:
            ratings = row[f"{name}_ratings"]
            assert len(ratings) == len(row["texts"]) and set(ratings) <= {1, 2, 3, 4, 5}
            assert row[f"{name}_min"] == min(ratings)
        images = sorted(name for name in raw if name.endswith(".png"))
        assert images == [f"{i}.png" for i in range(len(images))]
        assert bool(images) == (row["source"] != "synthetic_text")


def test_every_image_is_readable_and_within_bounds(examples: list[Example]) -> None:
    for sample in examples[:300]:
        for data in sample.images:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
            assert image.mode == "RGB" and image.format == "PNG"
            width, height = image.size
            if sample.task in ("colour", "shape", "count"):
                # Cells are about as large as what an image token sees: 28 x 28 pixels.
                sides = [(width / columns, height / rows) for columns, rows in GRIDS]
                assert any(25 <= min(side) and max(side) <= 36 for side in sides)
            else:
                assert 64 <= min(image.size) and max(image.size) <= LONGEST_SIDE
                assert max(image.size) <= LARGEST_ASPECT * min(image.size) + 1


def test_splits_share_no_picture(dataset: Path) -> None:
    pictures = {
        split: {image for sample in Split(dataset / split) for image in sample.images}
        for split in ("train", "validation")
    }
    assert len(pictures["validation"]) >= VALIDATION
    assert not pictures["train"] & pictures["validation"]


def test_a_held_out_picture_is_drawn_anew() -> None:
    draw = partial(example, 5, "train", ["colour"])
    samples = [draw(3, attempt) for attempt in range(3)]
    held_out = set().union(*(sample.digests for sample in samples[:2]))
    assert draw_apart(draw, 3, samples[0], held_out) == (samples[2], 2)
    assert draw_apart(draw, 3, samples[2], held_out) == (samples[2], 0)


def test_summary_counts_what_was_written(dataset: Path) -> None:
    summary = json.loads((dataset / "summary.json").read_text())
    tokenizer = load_tokenizer(str(dataset / "tokenizer"))
    assert summary["finished"]
    for name, size in (("train", SAMPLES), ("validation", VALIDATION)):
        found, split = summary[name], Split(dataset / name)
        assert found["samples"] == len(split) == size == sum(found["per_task"].values())
        assert found["images"] == sum(len(sample.images) for sample in split)
        texts = [
            text
            for sample in split
            for turn in sample.turns
            for text in (*turn.user, turn.assistant)
            if isinstance(text, str)
        ]
        tokens = [len(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        turns = sum(len(sample.turns) for sample in split)  # with start and end of both sides
        assert found["text_tokens"] == sum(tokens) + 4 * turns
        assert found["skipped"] == {}


def test_interleaved_pairs_show_each_picture_before_its_question(examples: list[Example]) -> None:
    layouts: Counter[str] = Counter()
    for sample in examples:
        if len(sample.images) < 2:
            continue
        turns = finevision("key", sample.row(), sample.images).turns
        slots = [[p.index for p in turn.user if isinstance(p, ImageSlot)] for turn in turns]
        questions = ["".join(p for p in turn.user if isinstance(p, str)) for turn in turns]
        assert all("in the first image" in q or "in the second image" in q for q in questions)
        if slots[0] == [0, 1]:
            layouts["in front"] += 1
        else:
            layouts["interleaved"] += 1
            assert slots == [[0], [1], []][: len(slots)]
            assert "first" in questions[0] and all("second" in q for q in questions[1:])
    assert min(layouts["in front"], layouts["interleaved"]) > 50
    pairs, pictured = sum(layouts.values()), sum(bool(sample.images) for sample in examples)
    assert 0.07 < pairs / pictured < 0.13


# ------------------------------------------------------------------------------------ balance


def _form(question: str) -> str:
    """The question without what varies in it."""
    for words in (COLOURS, KINDS.values(), KINDS):
        for word in words:
            question = question.replace(f"{word} ", "* ").replace(f"{word}?", "*?")
    for ordinal in ("first", "second"):
        question = question.replace(f" in the {ordinal} image", "")
    return question.replace("<image>", "")


def test_first_answers_are_uniform_for_each_form(examples: list[Example]) -> None:
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for sample in examples:
        question, answer = sample.texts[0]
        if sample.task != "text":
            answers[sample.task, _form(question)][answer] += 1
    sizes = {"colour": 6, "shape": 4, "count": 4, "position": 4, "digit": 10, "word": 40}
    for (task, form), counts in answers.items():
        size = sizes.get(task, 5 if form.startswith("How high") else 6)
        assert len(counts) <= size
        total = sum(counts.values())
        expected = total / size
        chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
        chi_square += expected * (size - len(counts))
        # Mean size - 1, variance 2 (size - 1): five standard deviations above.
        assert chi_square < size - 1 + 5 * (2 * (size - 1)) ** 0.5, (form, counts)


def test_guessing_without_pictures_fails(examples: list[Example]) -> None:
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in examples:
        for question, answer in sample.texts:
            seen[question][answer] += 1
    tasks = ("colour", "shape", "count", "position")
    asked = [turn for i in range(1600) for turn in example(11, "validation", tasks, i).texts[:1]]
    hits = sum(bool(seen[q]) and seen[q].most_common(1)[0][0] == answer for q, answer in asked)
    # Chance is (1/6 + 3/4) / 4 = 0.229; four standard deviations above.
    assert hits / len(asked) <= 0.271


def test_questions_of_a_sample_are_distinct(examples: list[Example]) -> None:
    for sample in examples:
        assert len({question for question, _ in sample.texts}) == len(sample.texts)


# ------------------------------------------------------------------------------------ pixels


def _blobs(data: bytes) -> list[tuple[str, np.ndarray]]:
    """(colour, mask) of every one-coloured, connected area: read from the pixels alone."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    blobs = []
    for colour, rgb in COLOURS.items():
        left = np.linalg.norm(pixels - np.array(rgb, dtype=np.float32), axis=2) < 30
        while left.any():
            mask = np.zeros_like(left)
            mask[np.unravel_index(left.argmax(), left.shape)] = True
            while True:  # grow to all connected pixels
                grown = mask.copy()
                grown[1:] |= mask[:-1]
                grown[:-1] |= mask[1:]
                grown[:, 1:] |= mask[:, :-1]
                grown[:, :-1] |= mask[:, 1:]
                grown &= left
                if (grown == mask).all():
                    break
                mask = grown
            left &= ~mask
            if mask.sum() > 15:  # edges blend into the background
                blobs.append((colour, mask))
    return blobs


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _kind(mask: np.ndarray) -> str:
    top, bottom, left, right = _box(mask)
    area = mask[top:bottom, left:right]
    fill = area.mean()
    if fill > 0.68:
        return "square" if fill > 0.92 else "circle"
    return "triangle" if area[-2:].mean() > 0.7 else "cross"  # a base, or the end of an arm


def _quadrant(mask: np.ndarray) -> str:
    top, bottom, left, right = _box(mask)
    vertical = "top" if top + bottom < mask.shape[0] else "bottom"
    return f"{vertical} {'left' if left + right < mask.shape[1] else 'right'}"


def _read(task: str, question: str, data: bytes) -> list[str]:
    """The answers that a picture gives to a question: exactly one, where it is unambiguous."""
    blobs = _blobs(data)
    words = question.replace("?", "").replace(".", "").replace("<image>", "").split()
    kind = next((k for k, plural in KINDS.items() if k in words or plural in words), None)
    colour = next((c for c in COLOURS if c in words), None)
    if task == "colour":
        return [c for c, mask in blobs if _kind(mask) == kind]
    if task == "shape":
        return [_kind(mask) for c, mask in blobs if c == colour]
    if task == "count":
        return [str(sum(kind is None or _kind(mask) == kind for _, mask in blobs))]
    if task == "position":
        return [_quadrant(mask) for _, mask in blobs if _kind(mask) == kind]
    heights = {c: _box(mask)[1] - _box(mask)[0] for c, mask in blobs}
    if "tallest" in words or "shortest" in words:
        extreme = max(heights.values()) if "tallest" in words else min(heights.values())
        return [c for c, height in heights.items() if height == extreme]
    assert colour is not None
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image, dtype=np.int32)
    # Lines at levels 5 to 1 and the axis: rows that differ from the one above at the right edge.
    changes = np.flatnonzero(np.abs(np.diff(pixels[:, -1], axis=0)).sum(axis=1) > 30)[::2] + 1
    return [str(int((changes >= _box(m)[0] - 1).sum()) - 1) for c, m in blobs if c == colour]


@pytest.mark.parametrize("task", ["colour", "shape", "count", "position", "chart"])
def test_answers_can_be_read_from_the_pixels(task: str) -> None:
    for i in range(40):
        sample = example(2, "validation", [task], i)
        for question, answer in sample.texts:
            image = sample.images[1 if "second image" in question else 0]
            assert _read(task, question, image) == [answer], (i, question)


def test_a_pair_in_front_needs_no_order() -> None:
    """What is asked about one picture does not occur in the other."""
    checked = 0
    for i in range(250):
        sample = example(4, "validation", ["colour"], i)
        if len(sample.images) == 1 or sample.texts[0][0].startswith("<image>"):
            continue
        for question, answer in sample.texts:
            answers = [_read("colour", question, image) for image in sample.images]
            assert sorted(answers) == [[], [answer]]
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("task", ["digit", "word"])
def test_printed_text_is_whole(task: str) -> None:
    for i in range(40):
        for data in example(2, "validation", [task], i).images:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image, dtype=np.int32)
            ink = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 0
            border = np.concatenate([ink[0], ink[-1], ink[:, 0], ink[:, -1]])
            assert ink.mean() > 0.02 and not border.any()


# ------------------------------------------------------------------------------------ tokenizer


def test_tokenizer_is_small_lossless_and_reproducible(dataset: Path) -> None:
    tokenizer = load_tokenizer(str(dataset / "tokenizer"))
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert fingerprint == tokenizer_fingerprint(build_tokenizer())
    assert fingerprint == Split(dataset / "train").tokenizer_fingerprint
    assert len(tokenizer) <= 512
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (PAD, BOS, END)
    for token in (PAD, BOS, USER, ASSISTANT, END):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    for text in ("Ärger über Öl; 東京 <b>x</b>\n", "the quick brown fox , 3.14"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for answer in [*COLOURS, *KINDS, *QUADRANTS, *WORDS, *NUMBERS]:
        assert len(tokenizer.encode(answer)) <= 2


def test_corpus_holds_every_text(examples: list[Example]) -> None:
    texts = set(corpus())
    for sample in examples:
        for question, answer in sample.texts:
            assert question.replace("<image>", "") in texts and answer in texts


def test_a_given_tokenizer_is_used_and_copied(dataset: Path, tmp_path: Path) -> None:
    options = ["--samples", "10", "--validation", "0", "--tokenizer", str(dataset / "tokenizer")]
    assert _recipe(tmp_path / "out", *options) == 0
    fingerprint = Split(dataset / "train").tokenizer_fingerprint
    assert Split(tmp_path / "out" / "train").tokenizer_fingerprint == fingerprint
    copy = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert tokenizer_fingerprint(copy) == fingerprint
    assert not (tmp_path / "out" / "validation").exists()


def test_a_given_template_is_counted(dataset: Path, tmp_path: Path) -> None:
    """The tokenizer keeps its own."""
    options = ["--template", '{user_end: "<|end|>\\n"}']
    assert _recipe(tmp_path / "out", *options) == 0
    copy = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    assert copy.chat_template == build_tokenizer().chat_template
    line = len(copy.encode("\n", add_special_tokens=False))
    for name in ("train", "validation"):
        own, given = Split(dataset / name), Split(tmp_path / "out" / name)
        assert list(own) == list(given)
        before, after = (split.list_column("user_tokens")[0] for split in (own, given))
        assert (after - before == line).all()
        assert own.turns_fingerprint != given.turns_fingerprint
        assert own.tokenizer_fingerprint == given.tokenizer_fingerprint


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tasks", "colour,smell"], "--tasks names 'smell'; expected"),
        (["--tasks", ","], "--tasks names nothing"),
        (["--tasks", "text"], "never held out"),
        (["--samples", "0"], "--samples is 0; expected a whole number of at least 1"),
        (["--validation", "-1"], "--validation is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--workers", "0"], "--workers is 0"),
        (["--tokenizer", "./nowhere"], "neither a directory nor a hub id"),
        (["--template", "nothing"], "--template is 'nothing', which cannot be read"),
        (["--template", "chatml"], "special token '<|im_start|>', which the tokenizer"),
    ],
)
def test_bad_input_is_one_message(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _recipe(tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_finished_dataset_is_left_alone(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    assert _recipe(dataset) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert _recipe(dataset, "--seed", "4") == 2
    assert "seed is 3 there and 4 here" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}


def test_foreign_directories_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert _recipe(tmp_path) == 2
    assert "is not empty" in capsys.readouterr().err
    assert _recipe(tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert _recipe(tmp_path / "file" / "below") == 2
    assert "cannot be written" in capsys.readouterr().err
    (tmp_path / "summary.json").write_text("[]")
    assert _recipe(tmp_path) == 2
    assert "is not the summary of a prepared dataset" in capsys.readouterr().err


def test_an_interrupted_run_starts_over(dataset: Path, tmp_path: Path) -> None:
    summary = json.loads((dataset / "summary.json").read_text())
    header = {name: summary[name] for name in ("recipe", "arguments")}
    (tmp_path / "summary.json").write_text(json.dumps({**header, "finished": False}))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "shard-000007.tar.tmp").write_text("half")
    assert _recipe(tmp_path) == 0
    assert _files(tmp_path) == _files(dataset)
