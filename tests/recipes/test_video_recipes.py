"""Frames out of videos, and the recipes of the two video datasets on local copies."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from casa_train.data.prepared.shard_writer import Shard
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot, Sample
from casa_train.data.schemas.rows import BadRow
from casa_train.data.schemas.video_rows import FRAME_END
from casa_train.video.showing import MAX_PIXELS
from data_recipes.__main__ import main
from data_recipes.video import decode_clip
from tests.helpers import published

SUBSET = "0_30_s_academic_v0_1"


def shown(images: list[bytes] | tuple[bytes, ...]) -> list[int]:
    """The number of the video's frame that each image shows: its grey is 4 times that."""
    return [round(float(np.asarray(Image.open(io.BytesIO(i))).mean()) / 4) for i in images]


# ------------------------------------------------------------------------------- decoding


def test_two_frames_a_second() -> None:
    frames = decode_clip(published.video(12, fps=4), longest=180)
    assert frames.times == [i / 2 for i in range(24)]
    assert shown(frames.images) == list(range(0, 48, 2))
    assert {Image.open(io.BytesIO(i)).format for i in frames.images} == {"JPEG"}


def test_a_short_clip_gives_twenty_frames_evenly() -> None:
    frames = decode_clip(published.video(5, fps=8), longest=180)
    assert frames.times == [i / 4 for i in range(20)]
    assert shown(frames.images) == list(range(0, 40, 2))


def test_fewer_frames_than_moments_are_shown_longer() -> None:
    frames = decode_clip(published.video(2, fps=4), longest=180)
    assert len(frames.images) == 20
    assert shown(frames.images) == [int(i * 0.1 * 4 + 1e-6) for i in range(20)]


def test_a_clip_of_a_video() -> None:
    frames = decode_clip(io.BytesIO(published.video(14, fps=4)), 240, start=3.5, end=6.0)
    assert frames.times == [3.5, 4.0, 4.5, 5.0, 5.5, 6.0]
    assert shown(frames.images) == [14, 16, 18, 20, 22, 24]


def test_large_frames_shrink_and_keep_their_aspect() -> None:
    frames = decode_clip(published.video(1, fps=2, size=(1280, 720)), longest=180)
    width, height = Image.open(io.BytesIO(frames.images[0])).size
    assert width * height <= MAX_PIXELS < (width + 2) * (height + 2)
    assert abs(width / height - 1280 / 720) < 0.01


@pytest.mark.parametrize(
    "video",
    [b"", b"no video at all" * 100, published.video(4, fps=2)[:-2000]],
    ids=["empty", "noise", "without its table"],
)
def test_unreadable_videos_have_a_reason(video: bytes) -> None:
    with pytest.raises(BadRow) as caught:
        decode_clip(video, longest=180)
    assert caught.value.reason == "unreadable_video"


def test_lengths_are_checked() -> None:
    video = published.video(6, fps=2)
    with pytest.raises(BadRow, match="video_too_long: 6 s, expected at most 5"):
        decode_clip(video, longest=5)
    with pytest.raises(BadRow, match="clip_outside_video"):
        decode_clip(video, longest=180, start=9, end=12)


def test_a_video_that_ends_early_is_refused() -> None:
    video = bytearray(published.video(20, fps=8))
    start, end = video.index(b"mdat") + 4, video.rindex(b"moov") - 4
    half = (start + end) // 2
    video[half:end] = b"\0" * (end - half)
    with pytest.raises(BadRow) as caught:
        decode_clip(bytes(video), longest=180)
    assert caught.value.reason == "cut_video"


# ------------------------------------------------------------------------------- LLaVA-Video


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> str:
    return str(data_dir / "tokenizer")


def recipe(name: str, source: Path, out: Path, tokenizer: str, *options: str) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--tokenizer", tokenizer]
    return main([name, *arguments, "--template", "auto", "--workers", "1", *options])


def test_llava_video_reads_tars_and_counts_what_is_missing(tmp_path: Path, tokenizer: str) -> None:
    videos = {f"academic_source/Charades/{i}.mp4": published.video(1 + i, fps=4) for i in range(4)}
    names = list(videos)
    rows = [
        published.video_row(0, names[2]),
        published.video_row(1, names[0]),
        published.video_row(2, names[2]),  # a second question about one video
        published.video_row(3, "academic_source/Charades/absent.mp4"),
        published.video_row(4, "../../../etc/passwd"),
        published.video_row(5, "academic_source/broken.mp4"),
        {**published.video_row(6, names[3]), "conversations": None},
        published.video_row(7, names[1]),
        published.video_row(8, names[3]),
    ]
    second = {"./" + names[3]: videos[names[3]], "academic_source/broken.mp4": b"noise" * 99}
    tars = [{name: videos[name] for name in names[:3]}, second]
    source = published.llava_video(tmp_path / "source", rows, tars)
    assert recipe("llava_video", source, tmp_path / "out", tokenizer) == 0

    found = json.loads((tmp_path / "out" / SUBSET / "summary.json").read_text())["train"]
    assert found["skipped"] == {
        "missing_video": 1,
        "no_turns": 1,
        "unreadable_video": 1,
        "unsafe_path": 1,
    }
    split = Split(tmp_path / "out" / SUBSET / "train")
    assert split.modality == "video"
    # In the order of the tars; questions about one video stand together.
    answers = [int(sample.turns[0].assistant.split()[-1].strip(".")) for sample in split]
    assert answers == [1, 7, 0, 2, 8]
    sample = split.read(2)
    assert sample.video and len(sample.images) == 20  # 3 seconds: 20 frames, evenly
    assert shown(sample.images) == [int(i * 0.15 * 4 + 1e-6) for i in range(20)]
    assert sample.turns[0].user == (*map(ImageSlot, range(20)), "Please describe the video.")
    assert sample.source == SUBSET


def test_a_cut_tar_costs_only_its_rest(tmp_path: Path, tokenizer: str) -> None:
    rng = np.random.default_rng(0)
    rows, tars = [], []
    for tar in range(2):
        members = {}
        for i in range(3):
            name = f"source/{tar}-{i}.mp4"
            rows.append(published.video_row(10 * tar + i, name))
            members[name] = published.video(1, fps=4)
            members[name + ".noise"] = rng.bytes(20_000)  # so that gzip cannot shrink it
        tars.append(members)
    source = published.llava_video(tmp_path / "source", rows, tars)
    first = source / SUBSET / f"{SUBSET}_videos_1.tar.gz"
    first.write_bytes(first.read_bytes()[:15_000])
    assert recipe("llava_video", source, tmp_path / "out", tokenizer) == 0
    found = json.loads((tmp_path / "out" / SUBSET / "summary.json").read_text())["train"]
    assert found["skipped"] == {"cut_tar": 1, "missing_video": 2}
    answers = [s.turns[0].assistant.split()[-1] for s in Split(tmp_path / "out" / SUBSET / "train")]
    assert answers == ["0.", "10.", "11.", "12."]


def test_extracted_videos_and_damaged_annotations(tmp_path: Path, tokenizer: str) -> None:
    source = published.llava_video(tmp_path / "source", [published.video_row(0, "a/b.mp4")], [])
    (source / SUBSET / "a").mkdir()
    (source / SUBSET / "a" / "b.mp4").write_bytes(published.video(1, fps=2))
    (source / SUBSET / "more_cap_processed.json").write_text('[{"id": "1", "conv')
    assert recipe("llava_video", source, tmp_path / "out", tokenizer) == 0
    found = json.loads((tmp_path / "out" / SUBSET / "summary.json").read_text())["train"]
    assert (found["samples"], found["images"]) == (1, 20)
    assert found["skipped"] == {"damaged_annotations": 1}


def clips(tmp_path: Path, count: int, questions: int) -> Path:
    """A source of clips in two tars, with so many questions about each; they come mixed."""
    paths = [f"v/{i}.mp4" for i in range(count)]
    rows = [published.video_row(i, path) for i, path in enumerate(paths * questions)]
    videos = [published.video(1 + i, fps=4) for i in range(count)]
    halves = (slice(0, count // 2), slice(count // 2, None))
    tars = [dict(zip(paths[half], videos[half], strict=True)) for half in halves]
    return published.llava_video(tmp_path / "source", rows, tars)


def members(train: Path) -> dict[str, list[str]]:
    """Names of the members of each shard."""
    found = {}
    for path in sorted(train.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            found[path.name] = tar.getnames()
    return found


def number_of(sample: Sample) -> int:
    """Of the row that a sample was made from."""
    return int(sample.turns[0].assistant.split()[-1].strip("."))


def check_frames(split: Split, count: int) -> None:
    """Every sample shows the frames of its own clip, i being 1 + i seconds long."""
    for sample in split:
        clip = number_of(sample) % count
        assert sample.images == tuple(decode_clip(published.video(1 + clip, fps=4), 180).images)


def test_frames_are_stored_once_for_all_questions_about_a_clip(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_recipes.llava_video.JOB_SAMPLES", 4)  # two clips a shard
    source = clips(tmp_path, 4, 3)
    assert recipe("llava_video", source, tmp_path / "out", tokenizer) == 0
    train = tmp_path / "out" / SUBSET / "train"
    split = Split(train)
    assert len(split) == 12 and split.meta["images"] == 12 * 20
    check_frames(split, 4)
    assert {number_of(sample) for sample in split} == set(range(12))
    names = members(train)
    assert len(names) == 2
    for stored in names.values():
        assert sum(name.endswith(".json") for name in stored) == 6
        assert sum(name.endswith(".jpg") for name in stored) == 2 * 20

    # Plain webdataset: a sample without frames names the one before it that has them.
    for path in names:
        frames: dict[str, list[bytes]] = {}
        for found in webdataset.WebDataset(str(train / path), shardshuffle=False):
            row, key = json.loads(found["json"]), found["__key__"]
            own = [found[f"{i}.jpg"] for i in range(20) if f"{i}.jpg" in found]
            assert bool(own) == ("images_of" not in row)
            frames[key] = own or frames[row["images_of"]]
            (sample,) = (s for s in split if s.key == key)
            assert tuple(frames[key]) == sample.images

    # A second index, and what of a pack is trained, lead to the same frames.
    template = '{user_end: "<|end|>\\n"}'
    options = ["--tokenizer", tokenizer, "--template", template, "--workers", "1"]
    again = ["retokenize", "--data", str(tmp_path / "out"), "--out", str(tmp_path / "again")]
    assert main([*again, *options]) == 0
    check_frames(Split(tmp_path / "again" / SUBSET / "train"), 4)


def test_a_first_question_that_is_unusable_leaves_the_frames_to_the_next(
    tmp_path: Path, tokenizer: str
) -> None:
    rows = [published.video_row(i, "v/0.mp4") for i in range(3)]
    rows[0]["conversations"] = []
    source = published.llava_video(
        tmp_path / "source", rows, [{"v/0.mp4": published.video(1, fps=4)}]
    )
    assert recipe("llava_video", source, tmp_path / "out", tokenizer) == 0
    train = tmp_path / "out" / SUBSET / "train"
    assert [number_of(sample) for sample in Split(train)] == [1, 2]
    check_frames(Split(train), 1)
    (names,) = members(train).values()
    assert sorted({name.split(".")[0][-1] for name in names if name.endswith(".jpg")}) == ["1"]


def test_frames_of_held_out_clips_are_shared_too(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples that were set aside are written anew: into the held-out split, or back."""
    monkeypatch.setattr("data_recipes.llava_video.JOB_SAMPLES", 4)
    source = clips(tmp_path, 5, 4)
    assert recipe("llava_video", source, tmp_path / "out", tokenizer, "--validation", "9") == 0
    found = {}
    for name, samples in (("train", 12), ("validation", 8)):
        split = Split(tmp_path / "out" / SUBSET / name)
        check_frames(split, 5)
        assert len(split) == samples
        names = [n for stored in members(split.directory).values() for n in stored]
        assert sum(n.endswith(".jpg") for n in names) == samples // 4 * 20
        found[name] = {number_of(sample) for sample in split}
    assert found["train"] | found["validation"] == set(range(20))


def test_data_with_repeated_frames_reads_as_before(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote them; a shard of each kind may stand in one split."""
    source = clips(tmp_path, 2, 3)
    shared, repeated = tmp_path / "shared", tmp_path / "repeated"
    assert recipe("llava_video", source, shared, tokenizer) == 0
    write = Shard.write

    def apart(self: Shard, *row: Any) -> bool:
        self._video = "", []
        return write(self, *row)

    monkeypatch.setattr(Shard, "write", apart)
    assert recipe("llava_video", source, repeated, tokenizer) == 0
    one, other = (Split(path / SUBSET / "train") for path in (shared, repeated))
    assert list(one) == list(other)
    sizes = [sum(s["bytes"] for s in split.meta["shards"]) for split in (one, other)]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.slow
def test_processes_change_no_byte(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_recipes.llava_video.JOB_SAMPLES", 2)  # three shards
    rows = [published.video_row(i, f"v/{i % 3}.mp4") for i in range(5)]
    tars = [{f"v/{i}.mp4": published.video(1 + i, fps=2) for i in range(3)}]
    source = published.llava_video(tmp_path / "source", rows, tars)
    for workers in ("1", "2"):
        out = tmp_path / workers
        assert recipe("llava_video", source, out, tokenizer, "--workers", workers) == 0
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / w / SUBSET / "train").iterdir()} for w in "12"
    )
    assert one == two


# ------------------------------------------------------------------------------- Live-WhisperX


def test_live_captions_and_what_is_wrong_with_them(tmp_path: Path, tokenizer: str) -> None:
    words = [[1.0, 1.4, "It"], [1.4, 2.0, "is"], [2.1, 2.2, "dark"], [3.1, 3.3, "still"]]
    lines = [
        published.live_line("video/youtube/-a.mp4", 1.0, 6.0, words),
        published.live_line("video/youtube/absent.mp4", 0.0, 5.0, words),
        published.live_line("../secret.mp4", 0.0, 5.0, words),
        published.live_line("video/youtube/-a.mp4", 1.0, 6.0, []),
        published.live_line("video/youtube/-a.mp4", 100.0, 130.0, [[101, 102, "late"]]),
        '[{"role": "user", "content": [{"type": "vid',
        {"not": "a list"},
        published.live_line("video/youtube/broken.mp4", 0.0, 5.0, words),
        published.live_line("video/youtube/-a.mp4", 2.0, 4.0, [[2.0, 2.5, "end"]], text=""),
    ]
    videos = {
        "video/youtube/-a.mp4": published.video(8, fps=4),
        "video/youtube/broken.mp4": b"noise" * 99,
    }
    source = published.live_whisperx(tmp_path / "source", lines, videos)
    assert recipe("live_whisperx", source, tmp_path / "out", tokenizer) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["train"]
    assert found["skipped"] == {
        "clip_outside_video": 1,
        "damaged_line": 1,
        "missing_video": 1,
        "no_words": 1,
        "not_a_live_row": 1,
        "unreadable_video": 1,
        "unsafe_path": 1,
    }
    split = Split(tmp_path / "out" / "train")
    assert [split.key(i)[-1] for i in range(len(split))] == ["0", "8"]
    sample = split.read(0)
    # 1.0 to 3.5 s: the frames end with the last word, not with the clip.
    assert shown(sample.images) == [4, 6, 8, 10, 12, 14]
    pieces = [part for part in sample.turns[0].live if isinstance(part, str)]
    assert pieces == [
        FRAME_END,
        " It" + FRAME_END,
        " is" + FRAME_END,
        " dark" + FRAME_END,
        FRAME_END,
        " still",
    ]
    assert sample.turns[0].user == ("Comment on it.\nA grey wall",)
    assert split.read(1).turns[0].user == ("A grey wall",)
    assert sample.source == split.source(0) == "live_whisperx"


def test_a_source_without_annotations_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").mkdir()
    assert recipe("live_whisperx", tmp_path / "source", tmp_path / "out", tokenizer) == 2
    assert "has no *.jsonl" in capsys.readouterr().err
