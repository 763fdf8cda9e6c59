"""Subtitles roll up, and their files are ones that other programs read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from casa_train.caption.caption_files import CaptionFiles, timestamp
from casa_train.caption.captioner import FrameCaption
from casa_train.caption.cues import HOLD, LINES, WIDTH, RollUp
from casa_train.caption.playing import Spoken
from casa_train.errors import UserError
from casa_train.video.burning import Cue
from tests.helpers.small_disk import Filler, small_disk


def rolled(*said: tuple[float, str], end: float = 100.0) -> list[Cue]:
    roll = RollUp()
    cues = [cue for time, words in said for cue in roll.add(time, words)]
    return [*cues, *roll.close(end)]


def spoken(time: float, text: str) -> Spoken:
    return Spoken(time, FrameCaption(text, 3, 0.25, None, 40, 10**6, cut=True), -0.5, 2)


def test_words_join_the_line_before_them_until_the_next_words_or_silence() -> None:
    assert rolled((0.5, "a red"), (1.0, ""), (1.5, "circle ")) == [
        Cue(0.5, 1.5, "a red"),
        Cue(1.5, 1.5 + HOLD, "a red circle"),
    ]
    silent = rolled((0.5, "red"), *((t / 2, "") for t in range(2, 14)), (7.0, "blue"), end=7.5)
    assert silent == [Cue(0.5, 0.5 + HOLD, "red"), Cue(7.0, 7.5, "blue")]
    assert rolled((0.0, "red"), (3.5, "blue"))[1].text == "blue"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.one_of(
            st.just(""), st.text("ab  é", max_size=60), st.text("x", min_size=50, max_size=90)
        ),
        max_size=40,
    )
)
def test_cues_are_in_order_and_narrow_and_show_every_word(said: list[str]) -> None:
    cues = rolled(*((i / 2, words) for i, words in enumerate(said)), end=len(said) / 2)
    for a, b in zip(cues, cues[1:], strict=False):
        assert a.start < a.end <= b.start
    for cue in cues:
        lines = cue.text.split("\n")
        assert len(lines) <= LINES
        assert all(len(line) <= WIDTH or " " not in line for line in lines)
    assert len(cues) == sum(bool(words.split()) for words in said)
    for cue in cues:
        last = " ".join(said[round(cue.start * 2)].split()).split(" ")[-1]
        assert cue.text.split()[-1] == last


def test_times_are_written_as_players_read_them() -> None:
    assert timestamp(0, ",") == "00:00:00,000"
    assert timestamp(3725.0625, ".") == "01:02:05.062"
    assert timestamp(59.9996, ",") == "00:01:00,000"


def test_files_hold_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "clip.srt").write_text("of an earlier call")
    files = CaptionFiles(tmp_path, "clip", print, keep=True)
    for time, text in ((0.5, "a <b> & c"), (1.0, ""), (1.5, "--> d")):
        files.add(spoken(time, text))
    assert files.close(2.0)
    srt = (tmp_path / "clip.srt").read_text()
    assert srt == (
        "1\n00:00:00,500 --> 00:00:01,500\na <b> & c\n\n"
        "2\n00:00:01,500 --> 00:00:02,000\na <b> & c --> d\n\n"
    )
    vtt = (tmp_path / "clip.vtt").read_text()
    assert vtt.startswith("WEBVTT\n\n00:00:00.500 --> 00:00:01.500\na &lt;b&gt; &amp; c\n\n")
    assert len(re.findall("-->", vtt)) == 2
    lines = [json.loads(line) for line in (tmp_path / "clip.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["a <b> & c", "", "--> d"]
    assert lines[0] == {
        "time": 0.5,
        "text": "a <b> & c",
        "tokens": 3,
        "first_token_seconds": 0.25,
        "tokens_per_second": None,
        "cache_tokens": 40,
        "memory_bytes": 10**6,
        "lag_seconds": -0.5,
        "cut": True,
        "dropped_frames": 2,
    }
    assert [cue.start for cue in files.cues] == [0.5, 1.5]


def test_subtitles_go_by_the_clock_of_a_player_and_the_jsonl_by_the_video(tmp_path: Path) -> None:
    files = CaptionFiles(tmp_path, "clip", print, keep=True, offset=1.25)
    files.add(spoken(0.5, "red"))
    assert files.close(1.0) and files.cues == [Cue(0.5, 1.0, "red")]
    assert "00:00:01,750 --> 00:00:02,250" in (tmp_path / "clip.srt").read_text()
    assert "00:00:01.750 --> 00:00:02.250" in (tmp_path / "clip.vtt").read_text()
    assert json.loads((tmp_path / "clip.jsonl").read_text())["time"] == 0.5


def test_cues_without_a_directory_are_kept_alone(tmp_path: Path) -> None:
    files = CaptionFiles(None, "clip", print, keep=True)
    files.add(spoken(0.0, "red"))
    assert files.close(0.5) and files.cues == [Cue(0.0, 0.5, "red")]
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="--out .*out cannot be written"):
        CaptionFiles(tmp_path / "out", "clip", print)


@pytest.fixture(name="disk")
def disk_of(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "512k") as disk:
        yield disk


def test_a_full_disk_is_told_once_and_captions_go_on(disk: Path) -> None:
    said: list[str] = []
    files = CaptionFiles(disk, "clip", said.append)
    full = Filler(disk)
    files.add(spoken(0.0, "red"))
    full.fill()
    for i in range(1, 200):
        files.add(spoken(i / 2, "blue " * 20))
    told = [line for line in said if "cannot be written" in line]
    assert len(told) == 3, said  # once for each file
    full.empty()
    assert files.close(100.0)
    lines = (disk / "clip.jsonl").read_text().splitlines()
    assert [json.loads(line)["time"] for line in lines] == [i / 2 for i in range(200)]


def test_what_stays_unwritten_is_said(disk: Path) -> None:
    files = CaptionFiles(disk, "clip", lambda line: None)
    Filler(disk).fill()
    for i in range(100):
        files.add(spoken(i / 2, "blue " * 20))
    assert not files.close(50.0)
