"""What a source shows at each moment, against PyAV alone; and what no source can be made of."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from casa_train.errors import UserError
from casa_train.video.containers import Video
from casa_train.video.frame_sources import Frame, FrameSource, open_source
from data_recipes.video import decode_clip
from tests.helpers import videos

ROOT = Path(__file__).resolve().parents[2]


def as_shown(
    frames: list[Frame], pictures: list[tuple[float, np.ndarray]], quarters: int = 0
) -> None:
    """Each frame is the picture that a player shows, and no other is nearer to it."""
    small = [p[::4, ::4].astype(np.int16) for _, p in pictures]
    for frame in frames:
        seen = np.rot90(np.asarray(frame.image), -quarters)[::4, ::4]
        far = [np.abs(p - seen).mean() for p in small]
        right = videos.on_screen(
            [(t, d) for (t, _), d in zip(pictures, far, strict=True)], frame.time
        )
        assert right <= min(far) + 1e-9, f"another picture at {frame.time} s"
        assert right < 3


def times(frames: list[Frame]) -> list[float]:
    return [frame.time for frame in frames]


@pytest.mark.parametrize("name", ["bikes", "carphone_pristine", "carphone_distorted"])
@pytest.mark.parametrize("fps", [1.9, 7.3])
def test_real_clips_show_what_a_player_shows(name: str, fps: float) -> None:
    clip = videos.real(name)
    pictures = videos.decoded(clip)
    with open_source(clip, fps) as source:
        frames = list(source)
        assert (source.live, source.skipped, source.ended_early) == (False, 0, None)
    seconds = {"bikes": 10.0}.get(name, 4.004)
    assert source.duration == pytest.approx(seconds)
    assert times(frames) == pytest.approx(
        [n / fps for n in range(math.ceil(seconds * fps))], abs=1e-6
    )
    as_shown(frames, pictures)


def test_recipe_and_source_show_the_same() -> None:
    clip = videos.real("bigbuckbunny")
    recipe = decode_clip(clip.read_bytes(), 60, start=1.3, end=3.8)
    with open_source(clip.read_bytes(), 2, start=1.3, end=4.1, title="upload") as source:
        frames = list(source)
    assert source.name == "upload"
    assert times(frames) == recipe.times == [1.3, 1.8, 2.3, 2.8, 3.3, 3.8]
    for frame, jpeg in zip(frames, recipe.images, strict=True):
        stored = np.asarray(Image.open(io.BytesIO(jpeg)), np.float32)
        assert np.abs(stored - np.asarray(frame.image)).mean() < 3
    assert source.size == (1280, 720)


@pytest.mark.parametrize("start", [0.9, 3.37, 8.0])
def test_a_part_shows_the_same_as_the_whole(start: float) -> None:
    # bikes has B-frames and few key pictures: decoding begins before the start.
    clip = videos.real("bikes")
    with clip.open("rb") as file, open_source(file, 3, start=start, end=9.5) as source:
        frames = list(source)
    assert times(frames)[0] == start and times(frames)[-1] < 9.5
    assert len(frames) == math.ceil((9.5 - start) * 3)
    as_shown(frames, videos.decoded(clip))


def test_a_variable_rate(tmp_path: Path) -> None:
    begins = [0.0, 0.1, 0.15, 1.0, 1.01, 3.7, 3.74]
    clip = videos.encoded(tmp_path / "vfr.mp4", videos.numbered(7), begins)
    with open_source(clip, 4) as source:
        shown = [videos.number_of(frame.image) for frame in source]
    expected = [max(i for i, b in enumerate(begins) if b <= n / 4) for n in range(15)]
    assert shown[:15] == expected
    assert len(set(expected)) == 4


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_a_phone_video_stands_upright(tmp_path: Path, degrees: int) -> None:
    clip = videos.real("carphone_pristine")
    turned = videos.copied(clip, tmp_path / "turned.mp4", rotation=degrees)
    with open_source(turned, 1.5) as source:
        frames = list(source)
    upright = (144, 176) if degrees % 180 else (176, 144)
    assert source.size == frames[0].image.size == upright
    as_shown(frames, videos.decoded(clip), quarters=degrees // 90)


@pytest.mark.parametrize("container", ["mpegts", "matroska", "mov", "flv"])
def test_other_containers_and_late_beginnings(tmp_path: Path, container: str) -> None:
    clip = videos.real("bigbuckbunny")
    late = videos.copied(clip, tmp_path / "late", container, delay=7.5)
    with open_source(late, 3, max_pixels=100 * 100) as source:
        frames = list(source)
    assert times(frames) == pytest.approx([n / 3 for n in range(16)], abs=1e-5)
    with open_source(late, 3, start=2.0, max_pixels=100 * 100) as source:
        part = list(source)
    assert times(part)[0] == 2.0
    assert [f.image.tobytes() for f in part] == [f.image.tobytes() for f in frames[6:]]


def test_avi_shows_pictures_in_order_though_it_has_no_times(tmp_path: Path) -> None:
    # Its pictures are stored in another order than they are shown: these are B-frames.
    slow = {"preset": "medium"}
    clip = videos.encoded(tmp_path / "b.avi", videos.numbered(20), None, options=slow)
    with open_source(clip, 15) as source:
        shown = [videos.number_of(frame.image) for frame in source]
    assert shown == [2 * n for n in range(10)]
    frames = decode_clip(clip.read_bytes(), 5)
    images = [Image.open(io.BytesIO(jpeg)) for jpeg in frames.images]
    expected = [int((second + videos.CLOCK) * 30) for second in frames.times]
    assert [videos.number_of(image) for image in images] == expected


@pytest.mark.parametrize("container", ["mpegts", "matroska", "mov"])
def test_sound_that_begins_before_the_picture_is_the_offset(tmp_path: Path, container: str) -> None:
    clip = videos.real("bigbuckbunny")
    late = videos.copied(clip, tmp_path / "late", container, delay=3.0, picture_delay=1.25)
    with av.open(str(late)) as opened:
        picture, sound = (
            float(s.start_time * s.time_base)
            for s in (opened.streams.video[0], opened.streams.audio[0])
        )
    assert picture - sound == pytest.approx(1.25, abs=0.1)
    for start in (0.0, 1.5):
        with open_source(late, 2, start=start, end=2.9, max_pixels=100 * 100) as source:
            assert source.offset == pytest.approx(picture - sound, abs=1e-3)
            assert next(iter(source)).time == start
    alone = videos.copied(clip, tmp_path / "alone", container, keep=["video"], delay=3.0)
    with open_source(alone, 2) as source:
        assert source.offset == 0.0


def joined(out: Path, delays: list[float]) -> Path:
    """Broadcasts of 20 pictures each, of two sizes in turn, joined to one; each at a time."""
    parts = []
    for number, delay in enumerate(delays):
        side = 48 * (1 + number % 2)
        part = out.with_name(f"part{number}.ts")
        whole = videos.encoded(out.with_name("whole.ts"), videos.numbered(20, side, side), None)
        parts.append(videos.copied(whole, part, "mpegts", delay=delay).read_bytes())
    out.write_bytes(b"".join(parts))
    return out


@pytest.mark.parametrize("delays", [[5.0, 3600.0, 3601.0], [3600.0, 5.0, 9.0], [4.0, 4.0, 4.0]])
def test_a_broadcast_whose_clock_jumps_goes_on_at_once(tmp_path: Path, delays: list[float]) -> None:
    clip = joined(tmp_path / "joined.ts", delays)
    # A gap of less than 10 s is one in which nothing was sent: its last picture stays.
    still = [b - a - 20 / 30 for a, b in zip(delays, delays[1:], strict=False)]
    gaps = [gap if 0 < gap < 10 else 0.0 for gap in still]
    begins = [part * 20 / 30 + sum(gaps[:part]) for part in range(3)]
    with open_source(clip, 10) as source:
        frames = list(source)
        assert source.ended_early is None
    assert len(frames) == math.ceil((begins[-1] + 20 / 30) * 10 - 1e-6)
    for frame in frames:
        part = max(n for n in range(3) if begins[n] <= frame.time + videos.CLOCK)
        number = min(19, int((frame.time + videos.CLOCK - begins[part]) * 30))
        assert videos.number_of(frame.image) == number, frame.time
        assert frame.image.height == 48 * (1 + part % 2)


@pytest.mark.parametrize("later", [3.0, 1.0, 900.0])
def test_sound_and_picture_jump_together(tmp_path: Path, later: float) -> None:
    """The last picture of a part comes behind the first sound of the next one."""
    parts = [
        videos.copied(
            videos.real("bigbuckbunny"), tmp_path / "part.ts", "mpegts", delay=delay
        ).read_bytes()
        for delay in (3.0, later)
    ]
    with Video(b"".join(parts)) as video:
        sound: list[float] = []

        def heard(packet: av.Packet) -> None:
            if packet.pts is not None:
                sound.append(float(packet.pts * packet.time_base) - video.origin)

        begins = [begin for begin, _ in video.pictures(True, heard)]
        assert video.jumped
    assert begins == pytest.approx([n / 25 for n in range(265)], abs=0.04)
    assert max(np.diff(begins)) < 0.1 and 0 < min(np.diff(sound)) <= max(np.diff(sound)) < 0.1
    assert len(sound) % 2 == 0
    ahead = [begins[n] - sound[n // 132 * (len(sound) // 2)] for n in (0, 132)]
    assert ahead[0] == pytest.approx(ahead[1], abs=0.05)


def test_a_screen_recording_may_stand_still_for_as_long_as_it_likes(tmp_path: Path) -> None:
    begins = [0.0, 0.4, 25.0, 25.2, 190.0]
    clip = videos.encoded(tmp_path / "still.mkv", videos.numbered(5), begins)
    with open_source(clip, 1) as source:
        shown = [videos.number_of(frame.image) for frame in source]
    assert shown[:191] == [0] + [1] * 24 + [2] + [3] * 164 + [4]


def test_pixels_stay_as_they_are_stored(tmp_path: Path) -> None:
    """As recipes store them, and as those read them whose models are trained further."""
    clip = tmp_path / "wide.mkv"
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt = 72, 56, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(64, 45)
        for picture in videos.numbered(3, 56, 72):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(clip)) as opened:
        assert opened.streams.video[0].sample_aspect_ratio == Fraction(64, 45)
    with open_source(clip, 4) as source:
        assert source.size == next(iter(source)).image.size == (72, 56)
    recipe = decode_clip(clip.read_bytes(), 5)
    assert Image.open(io.BytesIO(recipe.images[0])).size == (72, 56)


def test_odd_sizes(tmp_path: Path) -> None:
    pictures = videos.numbered(5, height=33, width=47)
    clip = videos.encoded(
        tmp_path / "odd.mkv", pictures, [n / 5 for n in range(5)], "ffv1", {}, "bgr0"
    )
    with open_source(clip, 5) as source:
        frames = list(source)
    assert [videos.number_of(frame.image) for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[0].image.size == (47, 33)


def test_4k_is_made_small_at_once(tmp_path: Path) -> None:
    picture = np.zeros((2160, 3840, 3), np.uint8)
    picture[:, 1920:] = 200
    clip = videos.encoded(tmp_path / "4k.mp4", [picture] * 3, [0.0, 0.4, 0.8])
    with open_source(clip, 2.5) as source:
        frames = list(source)
    assert source.size == (3840, 2160)
    width, height = frames[0].image.size
    assert width * height <= 504 * 504 and width / height == pytest.approx(16 / 9, rel=0.01)
    image = np.asarray(frames[2].image, np.float32)
    assert (
        image[:, : width // 2 - 4].mean() < 5 and abs(image[:, width // 2 + 4 :].mean() - 200) < 5
    )


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_minutes_in_flat_memory(tmp_path: Path) -> None:
    # Coded pictures of one real clip, again and again with later times.
    clip = videos.real("carphone_distorted")
    long = tmp_path / "long.mkv"
    with av.open(str(clip)) as old, av.open(str(long), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [p for p in old.demux(video=0) if p.dts is not None]
        data = [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in packets]
        for turn in range(150):
            for content, pts, dts, key in data:
                packet = av.Packet(content)
                packet.pts, packet.dts = pts + turn * 120_120, dts + turn * 120_120
                packet.time_base, packet.stream, packet.is_keyframe = (
                    packets[0].time_base,
                    stream,
                    key,
                )
                new.mux(packet)
    with open_source(long, 2) as source:
        memory = []
        for frame in source:
            if frame.time >= 60:
                memory.append(resident())
    assert frame.time == 600.5 and len(memory) == 1082
    assert max(memory) - memory[0] < 8 << 20


def test_real_time_passes_over_what_comes_too_late() -> None:
    began = time.monotonic()
    with open_source(videos.real("carphone_distorted"), 10, end=2.3, realtime=True) as source:
        assert source.live
        seen = []
        for frame in source:
            assert time.monotonic() - source.began >= frame.time
            seen.append(frame)
            if frame.time == 1.0:
                time.sleep(0.65)
    assert time.monotonic() - began >= 2.2
    assert source.skipped >= 5 and len(seen) + source.skipped == 23
    as_shown(seen, videos.decoded(videos.real("carphone_distorted")))


def test_a_cut_file_plays_as_far_as_it_goes(tmp_path: Path) -> None:
    for name, container in (("cut.mkv", "matroska"), ("cut.flv", "flv")):
        whole = videos.copied(videos.real("bikes"), tmp_path / f"whole-{name}", container)
        cut = tmp_path / name
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
        with open_source(cut, 4) as source:
            frames = list(source)
        assert 1 < frames[-1].time < 8
        assert source.ended_early and " announces 10." in source.ended_early
        as_shown(frames[:-2], videos.decoded(videos.real("bikes")))


def test_damage_is_left_out(tmp_path: Path) -> None:
    data = bytearray(videos.real("bikes").read_bytes())
    data[200_000:215_000] = bytes(15_000)
    with open_source(bytes(data), 2) as source:
        frames = list(source)
    assert frames[-1].time >= 9.0 and source.ended_early is None


def audio_alone(out: Path) -> Path:
    return videos.copied(videos.real("bigbuckbunny"), out, "mp4", keep=["audio"])


def unknown_codec(out: Path) -> Path:
    data = videos.real("carphone_distorted").read_bytes()
    out.write_bytes(data.replace(b"avc1", b"zzz1").replace(b"avcC", b"zzzC"))
    return out


def playlist(out: Path) -> Path:
    clip = videos.copied(videos.real("bikes"), out.parent / "secret.ts", "mpegts")
    out.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{clip}\n#EXT-X-ENDLIST\n")
    return out


def moov_lost(out: Path) -> Path:
    data = videos.real("bikes").read_bytes()
    out.write_bytes(data[: len(data) // 2])
    return out


def written(content: bytes):  # type: ignore[no-untyped-def]
    return lambda out: out.write_bytes(content) and out


BAD = {
    "absent": (lambda out: out, "no such file; expected a video file, camera:0, or -"),
    "directory": (lambda out: out.mkdir() or out, "found a directory"),
    "empty": (lambda out: out.touch() or out, "found 0 bytes"),
    "text": (written(b"hello " * 500), "cannot be read as a video"),
    "sound": (audio_alone, "found no moving picture, only audio"),
    "codec": (unknown_codec, "a codec that PyAV cannot decode"),
    "playlist": (playlist, "another file"),
    "cut": (moov_lost, "is it whole?"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_video_is_one_message(tmp_path: Path, case: str) -> None:
    make, expected = BAD[case]
    path = make(tmp_path / f"{case}.m3u8" if case == "playlist" else tmp_path / case)
    with pytest.raises(UserError) as caught:
        open_source(path, 2)
    assert expected in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong, expected",
    [
        ({"fps": 0.0}, "fps: 0.0"),
        ({"fps": float("nan")}, "fps: nan"),
        ({"start": -1.0}, "start: -1.0"),
        ({"start": 5.0, "end": 5.0}, "end: 5.0"),
        ({"start": 30.0}, "lasts 10.0 s"),
        ({"max_pixels": 0}, "max_pixels: 0"),
    ],
)
def test_numbers_out_of_range(wrong: dict[str, float], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        open_source(videos.real("bikes"), **{"fps": 3.0, **wrong})  # type: ignore[arg-type]


def read_pipe(feed: str, code: str) -> subprocess.Popen[str]:
    """A process whose standard input is a pipe from a shell command."""
    command = [sys.executable, "-c", code]
    shell = subprocess.Popen(["sh", "-c", feed], stdout=subprocess.PIPE)
    return subprocess.Popen(
        command, stdin=shell.stdout, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("container", ["mpegts", "matroska", "yuv4mpegpipe"])
def test_standard_input(tmp_path: Path, container: str) -> None:
    clip = videos.real("carphone_distorted")
    if container == "yuv4mpegpipe":
        piped = tmp_path / "piped.y4m"
        pictures = [p for _, p in videos.decoded(clip)]
        videos.encoded(piped, pictures, None, "wrapped_avframe", {})
    else:
        piped = videos.copied(clip, tmp_path / "piped", container, keep=["video"], delay=2.5)
    process = read_pipe(
        f"cat {piped}",
        "from casa_train.video.frame_sources import open_source\n"
        "with open_source('-', 2.5) as source:\n"
        "    print(source.name, [frame.time for frame in source], source.live)",
    )
    out, _ = process.communicate(timeout=60)
    moments = [round(n / 2.5, 6) for n in range(10 if container == "yuv4mpegpipe" else 11)]
    assert out == f"standard input {moments} False\n"


def test_a_pipe_that_needs_seeking_says_so() -> None:
    process = read_pipe(
        f"cat {videos.real('bikes')}",
        "from casa_train.video.frame_sources import open_source\n"
        "try: open_source('-', 2)\nexcept Exception as e: print(type(e).__name__, e)",
    )
    out, _ = process.communicate(timeout=60)
    assert out.startswith("UserError standard input") and "fragmented MP4" in out


def test_closing_ends_a_pipe_that_waits(tmp_path: Path) -> None:
    piped = videos.copied(videos.real("bikes"), tmp_path / "piped.ts", "mpegts")
    process = read_pipe(
        f"head -c 300000 {piped}; sleep 120",
        "import threading, time\n"
        "from casa_train.video.frame_sources import open_source\n"
        "source = open_source('-', 2)\n"
        "threading.Timer(2, source.close).start()\n"
        "print(len(list(source)), source.ended_early)",
    )
    began = time.monotonic()
    out, _ = process.communicate(timeout=60)
    assert 1 < int(out.split()[0]) < 20 and out.split()[1] == "None"
    assert time.monotonic() - began < 30


def test_an_interrupt_ends_a_pipe_that_waits(tmp_path: Path) -> None:
    piped = videos.copied(videos.real("bikes"), tmp_path / "piped.ts", "mpegts")
    process = read_pipe(
        f"head -c 300000 {piped}; sleep 120",
        "import os, signal, threading\n"
        "from casa_train.video.frame_sources import open_source\n"
        # Also where a shell began the tests in the background, which hear no Ctrl-C then.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "source = open_source('-', 2)\n"
        "threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "try: list(source)\nexcept KeyboardInterrupt: print('interrupted', source.closed)",
    )
    out, _ = process.communicate(timeout=60)
    assert out == "interrupted True\n"


def test_closing_from_another_thread_ends_a_file() -> None:
    source: FrameSource = open_source(videos.real("bikes"), 5, realtime=True)
    threading.Timer(0.7, source.close).start()
    began = time.monotonic()
    frames = list(source)
    assert 2 <= len(frames) <= 5 and time.monotonic() - began < 3
    assert source.closed and source.ended_early is None
    source.close()
    with open_source(videos.real("bikes"), 5) as closed:
        closed.close()
        assert list(closed) == []
