"""`python -m casa_train.caption` on files: what it prints, writes and refuses."""

from __future__ import annotations

import functools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from casa_train.caption.__main__ import main
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
    assert said and all(line["text"].split()[-1] in printed for line in said)
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
    exports: Any, video: Path, arguments: list[str], words: list[str], capsys: Any
) -> None:
    given = [str(video) if word == "VIDEO" else word for word in arguments]
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
