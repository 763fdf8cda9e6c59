"""Streams as their viewers see them: over HTTP, of files that a child decodes and of cameras."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from casa_train.caption.web.limits import Limits
from tests.helpers.caption_page import WORDS, Page, StandIn, serving, write_video

pytestmark = pytest.mark.fresh  # a decoder's limits are no fork's of a process with torch in it
# How a real child of the page begins.
CHILD = "import casa_train.caption.web.frame_child as child; child.limit_oneself(); "


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    whole = write_video(folder / "ball.mp4", 2.0)
    write_video(folder / "long.webm", 20.0, "libvpx")
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[:2000])
    (folder / "junk.avi").write_bytes(b"RIFF\0\0\0\0AVI " + bytes(range(256)) * 40)
    return folder


@pytest.fixture
def model() -> StandIn:
    return StandIn()


@pytest.fixture
def page(model: StandIn, videos: Path) -> Iterator[Page]:
    with serving(model, Limits(nobody=2.0, camera_silence=2.0, streams=3), videos) as found:
        yield found


@pytest.fixture
def patient() -> Iterator[Page]:
    """One that waits for a camera's first picture."""
    with serving(StandIn()) as found:
        yield found


def until(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
    return value


def of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


@contextlib.contextmanager
def watching(page: Page, stream: str) -> Iterator[list[dict[str, Any]]]:
    """A viewer in a thread; its events as they come."""
    found: list[dict[str, Any]] = []
    gone = threading.Event()

    def note(event: dict[str, Any]) -> bool:
        found.append(event)
        return gone.is_set()

    thread = threading.Thread(target=page.watch, args=(stream, note))
    thread.start()
    try:
        yield found
    finally:
        gone.set()
        page.client.post(f"/streams/{stream}/stop")
        thread.join(20)
        assert not thread.is_alive()


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "green").save(out, "JPEG")
    return out.getvalue()


def test_captions_come_beside_the_video_piece_by_piece(page: Page, model: StandIn) -> None:
    stream = page.start({"video": "ball.mp4"}, prompt="What rolls?", max_new_tokens=7)
    began = time.monotonic()
    events = page.to_the_end(stream)
    assert 1.9 < time.monotonic() - began < 10
    captions = of(events, "caption")
    assert [c["time"] for c in captions] == [0.0, 0.5, 1.0, 1.5]
    assert [c["text"] for c in captions] == [w + " " for w in WORDS[:4]]
    for caption in captions:
        # No frame before its moment, and its pieces before the whole.
        assert caption["position"] >= caption["time"]
        assert caption["lag"] == pytest.approx(caption["position"] - caption["time"])
        pieces = [e for e in of(events, "piece") if e["time"] == caption["time"]]
        assert "".join(e["text"] for e in pieces) == caption["text"] and len(pieces) == 2
        assert events.index(pieces[-1]) < events.index(caption)
    assert [c["cache_tokens"] for c in captions] == [3, 6, 9, 12]
    assert (events[-1]["state"], events[-1]["duration"]) == ("ended", 2.0)
    assert (model.opened[0].prompt, model.opened[0].max_new_tokens) == ("What rolls?", 7)


def test_viewers_see_the_same_and_one_who_comes_late_what_was_before(page: Page) -> None:
    stream = page.start({"video": "ball.mp4"})
    with watching(page, stream) as first:
        until(lambda: len(of(first, "caption")) >= 2)
        late = page.to_the_end(stream)
        until(lambda: first[-1].get("state") == "ended")
    before = [c["text"] for c in late[0]["captions"]]
    assert before == [c["text"] for c in of(first, "caption")[: len(before)]] and len(before) >= 2
    assert of(first, "caption")[len(before) :] == of(late, "caption")
    assert max(e["viewers"] for e in of(first, "viewers")) == 2


def test_streams_take_turns_on_the_one_model(videos: Path) -> None:
    model = StandIn(seconds=0.2)  # 0.4 s a frame: three streams need more time than there is
    with serving(model, videos=videos) as page:
        streams = [page.start({"video": "ball.mp4"}) for _ in range(3)]
        with contextlib.ExitStack() as stack:
            found = [stack.enter_context(watching(page, stream)) for stream in streams]
            until(lambda: all(events and events[-1].get("state") == "ended" for events in found))
    for events in found:  # each has a memory of its own
        assert [c["text"] for c in of(events, "caption")] == [w + " " for w in WORDS[:4]]
        assert of(events, "caption")[-1]["lag"] > 1
    order = [number for _, number in model.asked]
    contended = order[4:-4]
    assert all(contended[i] not in contended[i + 1 : i + 2] for i in range(len(contended)))


def test_the_clock_is_kept_by_cuts_and_by_frames_passed_over(videos: Path) -> None:
    with serving(StandIn(seconds=0.7), videos=videos) as page:
        events = page.to_the_end(page.start({"video": "ball.mp4"}, realtime=True))
    captions = of(events, "caption")
    assert events[-1]["skipped"] >= 1 and len(captions) + events[-1]["skipped"] == 4
    assert all(c["cut"] and c["text"] == WORDS[n][:2] for n, c in enumerate(captions))
    assert all(c["lag"] < 2.5 for c in captions)


def test_a_paused_stream_stands_and_goes_on(page: Page, model: StandIn) -> None:
    stream = page.start({"video": "long.webm"})
    with watching(page, stream) as events:
        until(lambda: len(of(events, "caption")) >= 2)
        page.client.post(f"/streams/{stream}/pause")
        until(lambda: events[-1].get("state") == "paused")
        position, asked = events[-1]["position"], len(model.asked)
        time.sleep(1.2)
        assert len(model.asked) <= asked + 1
        assert page.client.get("/state").json()["streams"][0]["position"] == position
        assert page.client.get(f"/streams/{stream}/picture").content[:2] == b"\xff\xd8"
        page.client.post(f"/streams/{stream}/resume")
        until(lambda: len(model.asked) > asked + 1)
        page.client.post(f"/streams/{stream}/stop")
        until(lambda: events[-1].get("state") == "stopped")
        until(lambda: not model.live, 5)  # its cache goes, though it is still watched
    times = [c["time"] for c in of(events, "caption")]
    assert times == [n / 2 for n in range(len(times))]  # none was passed over


def test_a_stream_that_nobody_watches_ends_and_leaves_nothing(page: Page, model: StandIn) -> None:
    def children() -> list[str]:
        command = ["pgrep", "-P", str(os.getpid()), "-f", "web.frame_child"]
        return subprocess.run(command, capture_output=True, text=True).stdout.split()

    stream = page.start({"video": "long.webm"})
    page.watch(stream, lambda event: event["event"] == "caption")  # and its viewer goes
    assert len(model.live) == 1 and len(children()) == 1
    until(lambda: not page.hub.streams, 15)
    assert not model.live and not children()
    assert page.client.get(f"/streams/{stream}/events").status_code == 400


@pytest.mark.parametrize("name, found", [("cut.mp4", "cut.mp4"), ("junk.avi", "junk.avi")])
def test_a_broken_file_is_one_message_and_the_others_go_on(
    page: Page, name: str, found: str
) -> None:
    good = page.start({"video": "ball.mp4"})
    with watching(page, good) as others:
        events = page.to_the_end(page.start({"video": name}))
        assert events[-1]["state"] == "failed" and found in events[-1]["message"]
        assert "Traceback" not in events[-1]["message"]
        until(lambda: others[-1].get("state") == "ended")
        assert len(of(others, "caption")) == 4


def test_a_decoder_that_is_killed_ends_its_stream_alone(page: Page) -> None:
    stream = page.start({"video": "long.webm"})
    with watching(page, stream) as events:
        until(lambda: of(events, "caption"))
        process = page.hub.streams[stream].frames._process  # type: ignore[attr-defined]
        process.send_signal(signal.SIGKILL)
        until(lambda: events[-1].get("state") == "failed", 20)
        assert "more memory or time than is allowed" in events[-1]["message"]
    assert len(of(page.to_the_end(page.start({"video": "ball.mp4"})), "caption")) == 4


def test_a_fault_of_the_model_ends_its_stream_alone(page: Page) -> None:
    events = page.to_the_end(page.start({"video": "ball.mp4"}, prompt="break"))
    assert events[-1]["message"] == "RuntimeError: out of luck"
    assert len(of(page.to_the_end(page.start({"video": "ball.mp4"})), "caption")) == 4


def limited(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_decoder_can_take_no_memory_and_write_no_file(tmp_path: Path) -> None:
    assert "MemoryError" in limited("bytearray(5 << 30)").stderr
    target = tmp_path / "written"
    written = limited(
        f"import os; os.write(os.open({str(target)!r}, os.O_CREAT | os.O_WRONLY), b'x')"
    )
    assert written.returncode != 0 and target.stat().st_size == 0
    opened = limited("a = [open('/dev/null') for _ in range(80)]")
    assert "Too many open files" in opened.stderr


def test_a_decoder_that_works_for_ever_is_ended() -> None:
    code = "import casa_train.caption.web.frame_child as child; child.FRAME_CPU_SECONDS = 1; "
    command = [sys.executable, "-c", code + "child.limit_oneself()\nwhile True: pass"]
    done = subprocess.run(command, capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGXCPU


def test_a_camera_is_captioned_as_its_pictures_come(page: Page) -> None:
    stream = page.start({"camera": True})
    path = f"/streams/{stream}/frames"
    with watching(page, stream) as events:
        for number in range(3):
            assert page.client.post(path, content=jpeg()).status_code == 204
            until(lambda: len(of(events, "caption")) == number + 1)  # noqa: B023
            time.sleep(0.1)
        assert page.client.get(f"/streams/{stream}/picture").status_code == 200
        until(lambda: events[-1].get("state") == "failed")  # it sends none any more
        assert "sent no picture for 2 s" in events[-1]["message"]
    times = [c["time"] for c in of(events, "caption")]
    assert times[0] == 0 and times == sorted(times) and times[-1] > 0.15
    assert [c["text"].strip() for c in of(events, "caption")] == WORDS[:3]


def test_a_frame_on_its_way_when_its_camera_is_stopped_is_no_fault(page: Page) -> None:
    """A browser reports answers from 400 on in its console, whatever the page's code does."""
    stream = page.start({"camera": True})
    path = f"/streams/{stream}"
    with watching(page, stream) as events:
        assert page.client.post(f"{path}/frames", content=jpeg()).status_code == 204
        until(lambda: len(of(events, "caption")) == 1)
        assert page.client.post(f"{path}/stop").status_code == 204
        until(lambda: events[-1].get("state") == "stopped")
        assert page.client.post(f"{path}/frames", content=jpeg()).status_code == 204
        assert len(of(events, "caption")) == 1


def test_a_camera_that_never_sends_a_picture_is_one_message(page: Page) -> None:
    events = page.to_the_end(page.start({"camera": True}))
    assert events[-1]["state"] == "failed"
    assert "sent no picture for 2 s" in events[-1]["message"]


def test_pictures_that_are_none_are_refused_and_the_next_one_is_taken(patient: Page) -> None:
    stream = patient.start({"camera": True})
    path = f"/streams/{stream}/frames"
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "PNG")
    bomb = jpeg((4000, 1100))  # 4.4 of 4.2 million pixels in 70 KB
    scan = bytes.fromhex("ffda0008010100003f00")
    passes = jpeg()[:-2] + 30 * scan + b"\xff\xd9"  # of 200,000, two minutes of decoding
    for content, found in (
        (b"", "no JPEG"),
        (b"\xff\xd8\xff" + bytes(50), "no JPEG"),
        (jpeg()[:-100], "no JPEG"),
        (png.getvalue(), "no JPEG"),
        (bomb, "4000 x 1100 pixels"),
        (passes, "31 JPEG scans"),
        (bytes((2 << 20) + 1), "longer than 2,097,152 bytes"),
    ):
        answer = patient.client.post(path, content=content)
        assert answer.status_code == 400 and found in answer.json()["error"]
    with watching(patient, stream) as events:
        assert patient.client.post(path, content=jpeg()).status_code == 204
        until(lambda: of(events, "caption"))


@pytest.mark.parametrize(
    "body, found",
    [
        ("garbage", "expected JSON"),
        ("[]", "expected JSON"),
        ("[" * 50_000, "expected JSON"),
        ('{"source": 1}', "expected JSON"),
        ('{"source": {"camera": true}, "realtime": "yes"}', "expected JSON"),
        ('{"source": {"video": "../ball.mp4"}}', "not among those here"),
        ('{"source": {"video": {}}}', "not among those here"),
        ('{"source": {"upload": "00"}}', "not among those here"),
        ('{"source": {"camera": true}, "options": {"temperatur": 1}}', "'temperatur' is unknown"),
        ('{"source": {"camera": true}, "options": {"temperature": -1}}', "temperature is -1.0"),
        ('{"source": {"camera": true}, "options": {"temperature": NaN}}', "a number"),
        ('{"source": {"camera": true}, "options": {"top_k": 1.5}}', "a whole number"),
        ('{"source": {"camera": true}, "options": {"max_new_tokens": 257}}', "at most 256"),
        ('{"source": {"camera": true}, "options": {"prompt": 5}}', "expected a text"),
        ('{"source": {"camera": true}, "options": {"ngram": true}}', "a whole number"),
        ('{"source": "' + "x" * 70_000 + '"}', "longer than 65,536 bytes"),
    ],
)
def test_a_wrong_request_is_one_message(page: Page, body: str, found: str) -> None:
    answer = page.client.post("/streams", content=body)
    assert answer.status_code == 400
    assert found in answer.json()["error"]
    assert page.client.get("/state").json()["streams"] == []


def test_garbage_on_the_wire_hurts_nobody(page: Page) -> None:
    host, port = page.url[7:].split(":")
    for content in (b"\x16\x03\x01\x02\x00" * 50, b"GET /\x00 HTTP/9\r\n\r\n", b"A" * 100_000):
        with socket.create_connection((host, int(port))) as client:
            client.settimeout(10)
            with contextlib.suppress(ConnectionError):
                client.sendall(content)
                assert client.recv(100).startswith(b"HTTP/1.1 400")
    assert page.client.get("/state").status_code == 200
    assert page.client.get("/nothing").json() == {"error": "Not Found"}


def test_no_more_streams_than_allowed(page: Page) -> None:
    for _ in range(3):
        page.start({"camera": True})
    answer = page.client.post("/streams", json={"source": {"camera": True}})
    assert answer.status_code == 400 and "--max-streams" in answer.json()["error"]
