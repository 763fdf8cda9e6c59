"""`python -m casa_train.caption` on files: what it prints, writes and refuses."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from casa_train.caption import run_captions
from casa_train.caption.__main__ import main
from casa_train.caption.captioner import Captioner, CaptionStreams
from casa_train.caption.cues import SPACED
from casa_train.caption.run_captions import Telling
from casa_train.io.log import LineFile
from tests.helpers import videos
from tests.helpers.tiny_export import write_tiny_export

GO = ["--max-new-tokens", "4"]


def write_video(path: Path, seconds: float, seed: int = 0, fps: int = 8) -> Path:
    """Noise that changes twice a second."""
    pixels = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.time_base = Fraction(1, fps)
        for i in range(round(seconds * fps)):
            if i % (fps // 2) == 0:
                small = pixels.integers(0, 256, (8, 12, 3), dtype=np.uint8)
            image = np.kron(small, np.ones((8, 8, 1), np.uint8))
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def write(mechanism: str) -> Path:
        return write_tiny_export(tmp_path_factory.mktemp("exports") / mechanism, mechanism)

    return write


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4", 3.0)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def timeless(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(line["time"], line["text"], line["tokens"], line["cache_tokens"]) for line in lines]


def test_a_video_is_captioned_and_written(
    exports: Any, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    burnt = tmp_path / "burnt.mp4"
    out = ["--out", str(tmp_path / "out"), "--burn", str(burnt), "--fps", "4"]
    assert main([str(video), "--export", str(exports("casa")), *out, *GO]) == 0
    lines = lines_of(tmp_path / "out" / "clip.jsonl")
    assert [line["time"] for line in lines] == [i / 4 for i in range(12)]
    assert all(line["first_token_seconds"] > 0 and line["memory_bytes"] > 2**20 for line in lines)
    printed = capsys.readouterr().out
    said = [line for line in lines if line["text"]]
    words = [line["text"].translate(SPACED).split() for line in said]
    assert words and all(word in printed for line in words for word in line)
    assert "12 frames in" in printed and "cache tokens" in printed
    srt = (tmp_path / "out" / "clip.srt").read_text()
    assert srt.count(" --> ") == len(said)
    assert (tmp_path / "out" / "clip.vtt").read_text().startswith("WEBVTT\n")
    with av.open(str(burnt)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(video)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == len(plain)
    assert max(np.abs(a.astype(int) - b).max() for a, b in zip(frames, plain, strict=True)) > 100


def test_subtitles_wait_for_a_picture_that_begins_after_its_sound(
    exports: Any, tmp_path: Path
) -> None:
    late = tmp_path / "late.mkv"
    videos.copied(videos.real("bigbuckbunny"), late, delay=1.0, picture_delay=2.0)
    with av.open(str(late)) as opened:
        begins = [s.start_time * s.time_base for s in opened.streams]
        ahead = float(begins[0] - begins[1])
    assert ahead > 1.5
    out = ["--out", str(tmp_path / "out"), "--fps", "3", "--end", "1.9"]
    assert main([str(late), "--export", str(exports("casa")), *out, *GO]) == 0
    lines = lines_of(tmp_path / "out" / "late.jsonl")
    assert [line["time"] for line in lines] == pytest.approx([n / 3 for n in range(6)], abs=1e-3)
    said = [line["time"] for line in lines if line["text"].strip()]
    srt = (tmp_path / "out" / "late.srt").read_text()
    first = re.findall(r"00:00:(\S+) -->", srt)[0].replace(",", ".")
    assert said and float(first) == pytest.approx(said[0] + ahead, abs=2e-3)


def test_several_videos_play_side_by_side_as_each_alone(
    exports: Any, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one name, of other lengths, and one that is none: the others go on."""
    folder = tmp_path / "more"
    folder.mkdir()
    longer = write_video(folder / "clip.mp4", 4.5, seed=7)
    broken = tmp_path / "broken.mp4"
    broken.write_text("no video")
    export = ["--export", str(exports("casa")), *GO]
    both = tmp_path / "both"
    assert main([str(video), str(broken), str(longer), *export, "--out", str(both)]) == 1
    captured = capsys.readouterr()
    assert "broken.mp4" in captured.err and captured.err.count("error:") == 1
    for path, name in ((video, "clip"), (longer, "clip-2")):
        assert main([str(path), *export, "--out", str(tmp_path / "alone")]) == 0
        alone = lines_of(tmp_path / "alone" / "clip.jsonl")
        assert timeless(lines_of(both / f"{name}.jsonl")) == timeless(alone)
    assert len(lines_of(both / "clip-2.jsonl")) == 9


def test_two_exports_side_by_side(
    exports: Any, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["--export", str(exports("casa")), "--compare", str(exports("insertion")), *GO]
    assert main([str(video), *export, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    grown = {
        name: [line["cache_tokens"] for line in lines_of(tmp_path / f"clip.{name}.jsonl")]
        for name in ("casa", "insertion")
    }
    assert all(len(tokens) == 6 and name in printed for name, tokens in grown.items())
    assert grown["insertion"][-1] - grown["casa"][-1] == 6 * 6  # tokens of a frame of 84x56
    same = ["--export", str(exports("casa")), "--compare", str(exports("casa")), *GO]
    assert main([str(video), *same]) == 0
    assert "(2)" in capsys.readouterr().out


def test_keeping_to_the_clock_takes_as_long_as_the_video(
    exports: Any, video: Path, tmp_path: Path
) -> None:
    export = ["--export", str(exports("casa")), *GO, "--realtime", "--fps", "2"]
    assert main([str(video), *export, "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path / "clip.jsonl")
    seen = len(lines) + sum(line["dropped_frames"] for line in lines)
    assert seen >= 5 and lines[-1]["time"] >= 2
    # Ahead of a frame is nobody who waits for it.
    assert all(line["lag_seconds"] > 0 for line in lines)


def test_the_released_captioners_values_and_single_ones_on_top(
    exports: Any, video: Path, tmp_path: Path
) -> None:
    export = ["--export", str(exports("casa")), "--published"]
    found = []
    for seed in ("3", "3", "4"):
        options = ["--max-new-tokens", "6", "--seed", seed, "--out", str(tmp_path)]
        assert main([str(video), *export, *options]) == 0
        found.append(timeless(lines_of(tmp_path / "clip.jsonl")))
    assert found[0] == found[1] != found[2]
    assert all(text.startswith("In this video") == (time == 0) for time, text, *_ in found[0])
    assert max(tokens for _, _, tokens, _ in found[0]) <= 6


def test_frames_are_as_large_as_the_larger_of_two_exports_takes_them(
    exports: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(exports("casa"), larger)
    config = json.loads((larger / "processor_config.json").read_text())
    config["max_pixels"] *= 4
    (larger / "processor_config.json").write_text(json.dumps(config))
    opened: list[int] = []
    plain = run_captions.open_source

    def noting(*given: Any, max_pixels: int, **options: Any) -> Any:
        opened.append(max_pixels)
        return plain(*given, max_pixels=max_pixels, **options)

    monkeypatch.setattr(run_captions, "open_source", noting)
    both = ["--export", str(exports("casa")), "--compare", str(larger), "--end", "1"]
    assert main([str(video), *both, *GO]) == 0
    assert opened == [config["max_pixels"]]


@pytest.fixture
def listening() -> Iterator[None]:
    """Ctrl-C is heard, also in a test run that began in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("clock", [[], ["--realtime", "--fps", "8"]], ids=["file", "realtime"])
def test_an_interruption_waits_until_a_frame_is_in_all_files(
    exports: Any, video: Path, tmp_path: Path, clock: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes right after a line was written, before the next file has its part of the frame."""
    add, came = LineFile.add, []

    def interrupted(self: LineFile, lines: list[str]) -> None:
        add(self, lines)
        if self.path.suffix == ".jsonl" and lines and json.loads(lines[0])["time"] >= 1:
            came.append(signal.raise_signal(signal.SIGINT))

    monkeypatch.setattr(LineFile, "add", interrupted)
    out = ["--out", str(tmp_path), *clock]
    assert main([str(video), "--export", str(exports("casa")), *GO, *out]) == 130
    lines = lines_of(tmp_path / "clip.jsonl")
    assert len(came) == 1 and len({line["time"] for line in lines}) == len(lines)
    said = [line["time"] for line in lines if line["text"]]
    for suffix in ("srt", "vtt"):
        assert (tmp_path / f"clip.{suffix}").read_text().count(" --> ") == len(said) > 0


@pytest.mark.usefixtures("listening")
def test_an_interruption_before_anything_plays_is_one_line(
    exports: Any, video: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Captioner, "load", load)
    assert main([str(video), "--export", str(exports("casa"))]) == 130
    assert capsys.readouterr().err == "interrupted\n"


class Gone(io.TextIOWrapper):
    """A pipe whose reader leaves after so many lines."""

    def __init__(self, lines: int) -> None:
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.lines = lines

    def write(self, text: str) -> int:
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise BrokenPipeError
        return super().write(text)


def test_nobody_who_reads_ends_it_unless_files_are_written(
    exports: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioned: list[float] = []
    plain = Telling.captioned

    def counted(self: Telling, model: int, number: int, spoken: Any) -> None:
        captioned.append(spoken.time)
        plain(self, model, number, spoken)

    monkeypatch.setattr(Telling, "captioned", counted)
    monkeypatch.setattr(sys, "stdout", Gone(1))
    arguments = [str(video), "--export", str(exports("casa")), *GO]
    assert main(arguments) == 128 + signal.SIGPIPE
    assert len(captioned) < 6
    captioned.clear()
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    assert len(captioned) == len(lines_of(tmp_path / "clip.jsonl")) == 6


def test_a_console_of_few_characters_and_captions_that_would_steer_it(
    exports: Any, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CaptionStreams._caption

    def told(self: Any, frames: Any, heard: Any, deadline: Any) -> Any:
        said = "日本\x1b[2J\nred\r"
        heard(0, said)
        return [replace(caption, text=said) for caption in plain(self, frames, None, deadline)]

    monkeypatch.setattr(CaptionStreams, "_caption", told)
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", console)
    named = tmp_path / "a\nb.mp4"
    named.write_bytes(video.read_bytes())
    out = ["--out", str(tmp_path), "--end", "1"]
    assert main([str(named), "--export", str(exports("casa")), *GO, *out]) == 0
    console.seek(0)
    printed = console.read()
    assert printed.count("?? [2J red") == 2 and "\x1b" not in printed and "a b.mp4" in printed
    srt = (tmp_path / "a\nb.srt").read_text()
    assert "日本 [2J red" in srt and "\x1b" not in srt
    assert lines_of(tmp_path / "a\nb.jsonl")[0]["text"] == "日本\x1b[2J\nred\r"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.mp4"], ["missing.mp4"]),
        ([], ["nothing to caption", "--camera 0"]),
        (["--camera", "77"], ["camera", "77"]),
        (["VIDEO", "--camera", "0"], ["--camera 0", "one or the other"]),
        (["-", "VIDEO"], ["standard input"]),
        (["VIDEO", "--start", "2", "--end", "1"], ["--end is 1"]),
        (["VIDEO", "--burn", "x.avi"], ["--burn x.avi", ".mp4"]),
        (["VIDEO", "--burn", "VIDEO"], ["is the video itself"]),
        (["VIDEO", "--burn", "LINK"], ["is the video itself"]),
        (["VIDEO", "--burn", "FOLDER"], ["is a directory"]),
        (["VIDEO", "--burn", "/proc/x.mp4"], ["--burn /proc/x.mp4", "cannot be written"]),
        (["VIDEO", "--out", "VIDEO"], ["--out", "cannot be written"]),
        (["VIDEO", "VIDEO", "--burn", "x.mp4"], ["--burn", "one video file"]),
        (["VIDEO", "--compare", "nowhere"], ["nowhere is no export"]),
        (["VIDEO", "--compare", "nowhere", "--realtime"], ["--compare beside --realtime"]),
        (["VIDEO", "--temperature", "-2"], ["--temperature is -2.0"]),
        (["VIDEO", "--ngram", "70"], ["--ngram-window is 60"]),
        (["--serve", "VIDEO", "--realtime"], ["--realtime", "beside --serve"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_arguments_are_one_message(
    exports: Any, video: Path, arguments: list[str], words: list[str], tmp_path: Path, capsys: Any
) -> None:
    named = {"VIDEO": video, "LINK": tmp_path / "link.mp4", "FOLDER": tmp_path / "folder.mp4"}
    named["LINK"].symlink_to(video)
    named["FOLDER"].mkdir()
    given = [str(named.get(word, word)) for word in arguments]
    assert main([*given, "--export", str(exports("casa"))]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1 and "Traceback" not in captured.err
    assert all(word in captured.err for word in words), captured.err


@pytest.mark.parametrize(
    ("option", "value"),
    [("--fps", "0"), ("--fps", "nan"), ("--start", "-1"), ("--image-size", "5")],
)
def test_numbers_out_of_range_are_refused(option: str, value: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["a.mp4", "--export", "x", option, value])
    assert f"argument {option}: it is" in capsys.readouterr().err


def test_no_export_is_one_message(video: Path, tmp_path: Path, capsys: Any) -> None:
    assert main([str(video), "--export", str(tmp_path)]) == 2
    assert "is no export of this project" in capsys.readouterr().err
