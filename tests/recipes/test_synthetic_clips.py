"""Rendered films: what they show and say, and that the published recipes read them."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from casa_train.caption.options import CaptionOptions
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.video_rows import FRAME_END
from data_recipes.__main__ import main
from data_recipes.synthetic_clips import CAPTIONS, IMAGE_END, SUBSET, film_tokenizer, write_films
from data_recipes.synthetic_drawing import COLOURS
from data_recipes.synthetic_motion import FPS, GONE, PROMPT, State, film

CLIPS, HELD_OUT, SEED = 3, 2, 5
MOMENTS = 2  # a second


def recipe(out: Path, **changes: object) -> int:
    options = {"clips": CLIPS, "validation": HELD_OUT, "seed": SEED, "side": 72, "workers": 1}
    given = [f"--{name}={value}" for name, value in {**options, **changes}.items()]
    return main(["synthetic_clips", "--out", str(out), *given])


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clips") / "clips"
    assert recipe(out) == 0
    return out


def prepare(name: str, source: Path, out: Path, tokenizer: Path) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--tokenizer", str(tokenizer)]
    return main([name, *arguments, "--template", "demo_live", "--workers", "1"])


def due(seconds: float) -> int:
    """The first moment at which words that end then have ended."""
    return math.ceil(seconds * MOMENTS - 1e-6)


# ------------------------------------------------------------------------------------------ plans


def test_every_state_is_seen_and_its_words_have_ended_when_it_is_seen_first() -> None:
    for i in range(200):
        plan = film(SEED, "train", i)
        before, moments = None, []
        for event in plan.events:
            words = event.timed()
            assert [word for _, _, word in words] == list(event.words)
            assert event.time < words[0][0] and all(start < end for start, end, _ in words)
            assert due(words[-1][1]) == math.ceil(event.time * MOMENTS)  # seen first, and due
            assert event.time * MOMENTS % 1  # never at a moment itself
            moments.append(due(words[-1][1]))
            assert event.words == _said(before, event.state)
            before = event.state
        assert len(set(moments)) == len(moments)  # one event a moment
        assert moments[-1] < plan.seconds * MOMENTS


def _said(before: State | None, after: State | None) -> tuple[str, ...]:
    """What a listener has to be told."""
    if after is None:
        return (GONE,)
    if before is None:
        return after.colour, after.kind
    assert (before.colour == after.colour) != (before.kind == after.kind)
    return (after.kind,) if before.colour == after.colour else (after.colour,)


def test_some_films_are_silent_for_seconds_and_half_of_the_seconds_have_words() -> None:
    films = [film(SEED, "validation", i) for i in range(200)]
    longest = [
        max(b.time - a.time for a, b in zip(f.events, f.events[1:], strict=False)) for f in films
    ]
    assert 20 < sum(gap >= 4 for gap in longest) < 60
    worded = sum(len({int(e.time) for e in f.events}) for f in films)
    assert 0.45 < worded / sum(f.seconds for f in films) < 0.75


def test_answers_are_evenly_spread() -> None:
    asked: dict[str, Counter[str]] = {}
    for i in range(600):
        for question, answer in film(SEED, "train", i).questions():
            asked.setdefault(question, Counter())[answer] += 1
    assert {len(answers) for answers in asked.values()} == {4, 6}
    for question, answers in asked.items():
        assert max(answers.values()) < 1.5 * min(answers.values()), (question, answers)


def test_films_are_captioned_for_what_the_captioner_asks() -> None:
    assert CaptionOptions().prompt == PROMPT


def test_words_are_single_tokens() -> None:
    tokenizer = film_tokenizer()
    words = {word for i in range(50) for _, _, word in film(0, "train", i).words()}
    assert len(words) == 6 + 4 + 1
    for text in (FRAME_END, IMAGE_END, *(f" {word}" for word in words)):
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1, text


# --------------------------------------------------------------------------------------- pictures


def shown(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """(second, RGB) of the frames of a file, by PyAV alone."""
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            assert frame.time is not None
            yield frame.time, frame.to_ndarray(format="rgb24").astype(int)


def looked_at(picture: np.ndarray) -> State | None:
    """What a picture shows, told from its pixels."""
    inside = np.abs(picture - picture[0, 0]).max(-1) > 60
    inside &= ~_edge(inside)
    if inside.sum() < 50:
        return None
    rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
    box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    colour = np.median(picture[inside], axis=0)
    name = min(COLOURS, key=lambda c: np.abs(np.array(COLOURS[c]) - colour).sum())
    height, width = box.shape
    top, middle = box[height // 6].sum() / width, box[height // 2].sum() / width
    if box.mean() > 0.9:
        return State("square", name)
    if box.mean() > 0.7:
        return State("circle", name)
    return State("cross" if middle > 0.8 > top else "triangle", name)


def _edge(inside: np.ndarray) -> np.ndarray:
    """Pixels with a neighbour outside: codecs smear colours there."""
    padded = np.pad(inside, 1)
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return inside & ~np.logical_and.reduce(around)


@pytest.mark.parametrize("index", range(HELD_OUT))
def test_words_are_due_when_their_shape_is_there(clips: Path, index: int) -> None:
    """At 2 moments a second, as a player shows the file then."""
    path = clips / "validation" / "video" / f"{index:06d}.mp4"
    frames = list(shown(path))
    (line, *_) = (clips / "validation" / CAPTIONS).read_text().splitlines()[index:]
    user, assistant = json.loads(line)
    assert user["content"][0]["video"] == f"video/{index:06d}.mp4"
    assert len(frames) == user["content"][0]["video_end"] * FPS
    said: dict[int, tuple[str, ...]] = {}
    for _, end, word in assistant["content"][0]["text_stream"]:
        said[due(end)] = (*said.get(due(end), ()), word)
    before: State | None = None
    for moment in range(round(len(frames) / FPS * MOMENTS)):
        picture = [p for time, p in frames if time <= moment / MOMENTS + 1e-6][-1]
        state = looked_at(picture)
        expected = () if state == before else _said(before, state)
        assert said.get(moment, ()) == expected, moment
        before = state
    assert len(said) > 4


def test_shapes_move(clips: Path) -> None:
    path = clips / "train" / "video" / "000000.mp4"
    middles = [
        np.argwhere(np.abs(p - p[0, 0]).max(-1) > 60).mean(0)
        for _, p in shown(path)
        if looked_at(p)
    ]
    steps = np.abs(np.diff(middles, axis=0)).max(1)
    assert np.median(steps) > 0.3


def test_no_held_out_film_is_trained(clips: Path) -> None:
    files = [p for p in clips.rglob("*.mp4")]
    assert len({hashlib.sha256(p.read_bytes()).digest() for p in files}) == CLIPS + HELD_OUT


# ------------------------------------------------------------------------------------ the recipes


def test_live_whisperx_reads_the_captions(clips: Path, tmp_path: Path) -> None:
    assert prepare("live_whisperx", clips / "train", tmp_path / "out", clips / "tokenizer") == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["train"]
    assert (found["samples"], found["skipped"]) == (CLIPS, {})
    split = Split(tmp_path / "out" / "train")
    for i in range(CLIPS):
        plan, sample = film(SEED, "train", i), split.read(i)
        assert sample.turns[0].user == (PROMPT,)
        captions = [part for part in sample.turns[0].live if isinstance(part, str)]
        words = {
            math.ceil(e.time * MOMENTS): "".join(f" {w}" for w in e.words) for e in plan.events
        }
        last = max(words)
        expected = [words.get(m, "") + (FRAME_END if m < last else "") for m in range(last + 1)]
        assert captions == expected


def test_llava_video_reads_the_questions(clips: Path, tmp_path: Path) -> None:
    assert prepare("llava_video", clips / "validation", tmp_path, clips / "tokenizer") == 0
    found = json.loads((tmp_path / SUBSET / "summary.json").read_text())["train"]
    assert (found["samples"], found["skipped"]) == (HELD_OUT, {})
    for i, sample in enumerate(Split(tmp_path / SUBSET / "train")):
        plan = film(SEED, "validation", i)
        assert sample.video and len(sample.images) == plan.seconds * MOMENTS
        asked = [(str(turn.user[-1]).strip(), turn.assistant) for turn in sample.turns]
        assert asked == [*plan.questions()[i:], *plan.questions()[:i]]


# ------------------------------------------------------------------------------------- the command


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def test_the_same_command_does_nothing_and_an_ended_one_goes_on(
    clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "clips"
    assert recipe(out, seed=SEED) == 0
    whole = content(out)
    assert {k: v for k, v in whole.items() if "lock" not in k} == {
        k: v for k, v in content(clips).items() if "lock" not in k
    }
    capsys.readouterr()
    assert recipe(out) == 0
    assert "nothing to do" in capsys.readouterr().out

    summary = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps({**summary, "finished": False}))
    kept, lost = (out / "train" / "video" / f"00000{i}.mp4" for i in (0, 2))
    lost.unlink()
    stamp = kept.stat().st_mtime_ns
    assert recipe(out) == 0
    assert "going on" in capsys.readouterr().out
    assert content(out) == whole
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_processes_render_the_same_bytes(tmp_path: Path) -> None:
    for workers in (1, 2):
        (tmp_path / str(workers)).mkdir()
        write_films(tmp_path / str(workers), 9, "train", 27, 56, workers)
    one, two = (content(tmp_path / str(workers)) for workers in (1, 2))
    assert one == two and len(one) == 27 + 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clips": 0}, "--clips is 0; expected a whole number of at least 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"validation": -2}, "--validation is -2"),
        ({"workers": 0}, "--workers is 0"),
        ({"side": 71}, "--side is 71; expected an even number of 56 to 1024"),
        ({"side": 54}, "--side is 54"),
        ({"side": 84}, "side is 72 there and 84 here"),
    ],
)
def test_bad_arguments_are_one_message(
    changes: dict[str, object], message: str, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(clips, **changes) == 2
    assert message in capsys.readouterr().err
