"""Subtitles in the picture: where and when they stand, and what else stays as it was."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from casa_train.errors import UserError
from casa_train.video import burning
from casa_train.video.burning import Cue, burn
from casa_train.video.subtitles import draw_text, load_font, wrapped
from tests.helpers import videos
from tests.helpers.small_disk import small_disk

CUES = [Cue(1.0, 2.0, "A red circle grows"), Cue(0.4, 1.5, "größer und größer")]


def packets(path: Path, kind: str) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as container:
        (stream,) = [s for s in container.streams if s.type == kind]
        return [(float(p.pts * p.time_base), bytes(p)) for p in container.demux(stream) if p.size]


def begins(path: Path) -> list[float]:
    """The second at which the picture begins, and the sound."""
    with av.open(str(path)) as container:
        streams = container.streams.video[0], container.streams.audio[0]
        return [float(stream.start_time * stream.time_base) for stream in streams]


def changed(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """How much each row of a picture changed."""
    return np.abs(before.astype(np.int16) - after.astype(np.int16)).mean((1, 2))


def test_text_stands_at_its_time_and_the_rest_is_as_it_was(tmp_path: Path) -> None:
    clip, out = videos.real("bigbuckbunny"), tmp_path / "new" / "burnt.mp4"
    burnt = burn(clip, CUES, out)
    assert (burnt.pictures, burnt.sound, burnt.notes) == (132, True, ())
    assert packets(out, "audio") == packets(clip, "audio")
    before, after = videos.decoded(clip), videos.decoded(out)
    assert [t for t, _ in after] == [t for t, _ in before]
    for moment, lines in ((0.2, 0), (0.4, 1), (1.0, 2), (1.48, 2), (1.52, 1), (2.0, 0)):
        rows = changed(videos.on_screen(before, moment), videos.on_screen(after, moment))
        assert rows[:350].max() < 6, f"{moment} s: the picture changed above its text"
        written = int((rows > 12).sum())
        assert written == 0 if not lines else 25 * lines <= written <= 50 * lines, moment


def test_a_phone_video_of_odd_size_with_a_variable_rate(tmp_path: Path) -> None:
    begins = [0.0, 0.1, 0.15, 1.0, 1.01, 3.7, 3.74]
    pictures = [p.copy() for p in videos.numbered(7, height=99, width=131)]
    for picture in pictures:
        picture[:40, :40] = 255  # up left as it is coded, down left as it is shown
    clip = videos.encoded(tmp_path / "odd.mp4", pictures, begins, "libx264", None, "yuv444p")
    turned = videos.copied(clip, tmp_path / "turned.mp4", rotation=90)
    burnt = burn(turned, [Cue(3.7, 9.0, "now")], tmp_path / "burnt.mp4")
    after = videos.decoded(tmp_path / "burnt.mp4")
    assert burnt.pictures == 7
    assert [t for t, _ in after] == pytest.approx(begins, abs=1e-4)
    assert after[0][1].shape == (132, 100, 3)
    assert after[2][1][-30:, :30].min() > 230 and after[2][1][:80].max() < 60
    assert [round(float(p[2:70, 50:].mean()) / 10) for _, p in after] == [0, 1, 2, 3, 4, 5, 6]
    assert after[5][1][100:, 45:].max() > 200 > 90 > after[4][1][100:, 45:].max()


def test_sound_that_mp4_cannot_hold_is_left_out_with_a_word(tmp_path: Path) -> None:
    clip = tmp_path / "sound.avi"
    with av.open(str(clip), "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        sound = container.add_stream("pcm_mulaw", rate=8000, layout="mono")
        for picture in videos.numbered(10):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), "s16", "mono")
        samples.rate = 8000
        container.mux(sound.encode(samples))
        container.mux([*video.encode(None), *sound.encode(None)])
    burnt = burn(clip, [], tmp_path / "burnt.mp4")
    assert burnt.pictures == 10 and not burnt.sound and "pcm_mulaw" in burnt.notes[0]
    with av.open(str(tmp_path / "burnt.mp4")) as container:
        assert [s.type for s in container.streams] == ["video"]


def test_sound_and_picture_stay_together_where_sound_begins_before(tmp_path: Path) -> None:
    """After a late beginning, too; text goes by the picture."""
    clip, late = videos.real("bigbuckbunny"), tmp_path / "late.mkv"
    videos.copied(clip, late, delay=4.5, picture_delay=1.5)
    burn(late, [Cue(0.8, 1.4, "A red circle grows")], tmp_path / "burnt.mp4")
    before, after = (begins(path) for path in (late, tmp_path / "burnt.mp4"))
    assert after == pytest.approx([1.5, 0.0], abs=0.1)
    assert after[0] - after[1] == pytest.approx(before[0] - before[1], abs=0.002)
    plain, burnt = (
        videos.decoded(path, lambda picture: picture[::2, ::4])
        for path in (clip, tmp_path / "burnt.mp4")
    )
    written = [
        now - burnt[0][0]
        for (now, new), (_, old) in zip(burnt, plain, strict=True)
        if (changed(old, new) > 12).sum() > 5
    ]
    assert written and 0.8 <= written[0] + 1e-3 < 0.85 and 1.3 < written[-1] < 1.4


def test_a_video_whose_size_changes_is_written_in_its_first_one(tmp_path: Path) -> None:
    small, large = (
        videos.encoded(tmp_path / f"{side}.ts", videos.numbered(20, side, side), None)
        for side in (64, 98)
    )
    clip = tmp_path / "joined.ts"
    clip.write_bytes(small.read_bytes() + large.read_bytes())
    burnt = burn(clip, [Cue(5.0, 6.0, "never")], tmp_path / "burnt.mp4")
    after = videos.decoded(tmp_path / "burnt.mp4")
    assert burnt.pictures == len(after) == 40
    assert {p.shape for _, p in after} == {(64, 64, 3)}
    assert [videos.number_of(p) for _, p in after] == [*range(20), *range(20)]


def test_where_there_is_no_h264(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burning, "ENCODERS", burning.ENCODERS[1:])
    late = videos.copied(
        videos.real("carphone_distorted"), tmp_path / "late.ts", "mpegts", keep=["video"]
    )
    burnt = burn(late, CUES, tmp_path / "burnt.mp4")
    after = videos.decoded(tmp_path / "burnt.mp4")
    assert burnt.pictures == len(after) == 120
    assert [t for t, _ in after] == pytest.approx([n * 1001 / 30000 for n in range(120)], abs=1e-4)


@pytest.mark.parametrize("size", [(84, 84), (3840, 2160), (176, 144)])
def test_text_can_be_read_at_any_size(size: tuple[int, int]) -> None:
    width, height = size
    overlay = draw_text("A red circle moves left", width, height)
    rows = np.flatnonzero(overlay.alpha.max(1) > 0.5)
    columns = np.flatnonzero(overlay.alpha.max(0) > 0.5)
    assert overlay.top % 2 == 0 and overlay.alpha.shape == (height - overlay.top, width)
    assert rows[-1] + 1 < len(overlay.alpha) and 0 < columns[0] and columns[-1] < width - 1
    assert overlay.light.max() > 0.95 and (overlay.light <= overlay.alpha + 1e-6).all()
    assert 9 <= len(rows) <= 0.6 * height


def test_long_text_keeps_its_end_and_long_words_break() -> None:
    font = load_font(None, 20)
    lines = wrapped("one two " + "x" * 60 + " last", font, 200.0)
    assert len(lines) > 3 and all(font.getlength(line) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "") == "onetwo" + "x" * 60 + "last"
    long = draw_text("word " * 300, 320, 240)
    assert long.top >= 240 * 0.3
    assert draw_text("word " * 299 + "other", 320, 240).light.tolist() != long.light.tolist()


def test_letters_beyond_english_are_drawn() -> None:
    font = load_font(None, 30)
    missing = bytes(font.getmask("\uffff"))
    for letter in "üßŁЖΩ":
        assert bytes(font.getmask(letter)) != missing


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        out = disk / "burnt.mp4"
        out.write_bytes(b"before")
        with pytest.raises(UserError, match="No space left.*free some space") as caught:
            burn(videos.real("bikes"), CUES, out)
        assert str(out) in str(caught.value)
        assert [path.name for path in disk.iterdir()] == ["burnt.mp4"]
        assert out.read_bytes() == b"before"


def test_what_cannot_be_burnt_is_one_message(tmp_path: Path) -> None:
    clip = videos.real("carphone_distorted")
    font = tmp_path / "no.ttf"
    font.write_text("no font")
    mine = tmp_path / "mine.mp4"
    mine.write_bytes(clip.read_bytes())
    (tmp_path / "folder.mp4").mkdir()
    for wrong, expected in [
        (lambda: burn(clip, [], tmp_path / "x.avi"), "ends in .mp4"),
        (lambda: burn(clip, [], tmp_path / "folder.mp4"), "found a directory"),
        (lambda: burn(clip, [Cue(2.0, 2.0, "x")], tmp_path / "x.mp4"), "cue 0: from 2.0 s"),
        (lambda: burn(clip, [], tmp_path / "x.mp4", font), "no.ttf: cannot be read as a font"),
        (lambda: burn(mine, [], mine), "is the video itself"),
        (lambda: burn(tmp_path / "absent", [], tmp_path / "x.mp4"), "no such file"),
        (lambda: burn(clip, [], Path("/proc/x/y.mp4")), "cannot be written"),
    ]:
        with pytest.raises(UserError, match=expected):
            wrong()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.mp4", "mine.mp4", "no.ttf"]
    assert mine.read_bytes() == clip.read_bytes()
