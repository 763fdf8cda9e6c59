"""Files that visitors bring or choose."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from casa_train.caption.web import uploads
from casa_train.caption.web.limits import Limits
from casa_train.caption.web.uploads import HEAD_BYTES, media_type, videos_in
from tests.helpers.caption_page import Page, StandIn, serving, write_video

KINDS = {
    "a.mp4": ("libx264", "video/mp4"),
    "a.mov": ("libx264", "video/quicktime"),
    "a.webm": ("libvpx", "video/webm"),
    "a.mkv": ("libx264", "video/webm"),
    "a.avi": ("mpeg4", "video/x-msvideo"),
    "a.ts": ("libx264", "video/mp2t"),
    "a.flv": ("flv", "video/x-flv"),
    "a.mpg": ("mpeg2video", "video/mpeg"),
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("clip")
    return write_video(folder / "clip.mp4", 0.4).read_bytes()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with serving(StandIn(), Limits(upload_bytes=100_000, kept_uploads=2, silence=1.0)) as found:
        yield found


def answer_on(connection: socket.socket) -> bytes:
    """All that comes until the server closes: head and body may come apart."""
    connection.settimeout(20)
    with connection.makefile("rb") as file:
        return file.read()


def kept(page: Page) -> int:
    return len(list(page.hub.uploads.folder.iterdir()))


@pytest.mark.parametrize("name", KINDS)
def test_a_video_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    codec, kind = KINDS[name]
    rate = 0.4 if codec != "mpeg2video" else 0.0
    if rate:
        content = write_video(tmp_path / name, rate, codec).read_bytes()
    else:
        content = b"\x00\x00\x01\xba" + bytes(100)
    assert media_type(content[:HEAD_BYTES]) == kind


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1/secret\n",
        b"ffconcat version 1.0\nfile /etc/passwd\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"GIF89a" + bytes(300),
        b"G" + bytes(187) + b"H" + bytes(700),
        b"",
        b"x",
        bytes(5000),
    ],
)
def test_what_is_no_video_is_refused_whatever_it_is_called(page: Page, content: bytes) -> None:
    before = kept(page)
    answer = page.upload(content, "film.mp4")
    assert answer.status_code == 400
    assert "no video by its content" in answer.json()["error"]
    assert kept(page) == before


def test_a_video_is_taken_whatever_it_is_called(page: Page, clip: bytes) -> None:
    answer = page.upload(clip, "%3Cb%3E..%2F..%2Fetc%2Fpasswd%00.txt")
    assert answer.status_code == 201, answer.text
    identity = answer.json()["id"]
    assert page.hub.uploads.videos[identity].name == "<b>../../etc/passwd.txt"
    served = page.client.get(f"/uploads/{identity}")
    assert (served.content, served.headers["Content-Type"]) == (clip, "video/mp4")
    part = page.client.get(f"/uploads/{identity}", headers={"Range": "bytes=5-14"})
    assert (part.status_code, part.content) == (206, clip[5:15])
    assert part.headers["Content-Range"] == f"bytes 5-14/{len(clip)}"


def test_too_large_a_file_is_refused_before_it_comes_and_while_it_comes(
    page: Page, clip: bytes
) -> None:
    before = kept(page)
    large = clip + bytes(100_001 - len(clip))
    answer = page.upload(large)
    assert answer.status_code == 400 and "--max-upload" in answer.json()["error"]
    # Without a length, as a client that lies sends it; it would go on for ever.
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield clip
        while True:
            sent += 10_000
            yield bytes(10_000)

    with page.client.stream("POST", "/uploads", content=endless()) as found:
        assert found.status_code == 400
    assert sent < 50_000_000
    assert kept(page) == before
    assert page.upload(clip + bytes(100_000 - len(clip))).status_code == 201  # the limit itself


def test_an_upload_that_stands_still_or_breaks_off_leaves_nothing(page: Page, clip: bytes) -> None:
    before = kept(page)
    host, port = page.url[7:].split(":")
    head = f"POST /uploads HTTP/1.1\r\nHost: {host}\r\nX-Casa-Caption: 1\r\nContent-Length: 90000"
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(head.encode() + b"\r\n\r\n" + clip[:1000])
        assert b"stood still" in answer_on(slow)
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(
            head.replace("uploads", "streams").replace("90000", "90").encode() + b"\r\n\r\n{"
        )
        assert b"did not come within 1 s" in answer_on(slow)
    with socket.create_connection((host, int(port))) as broken:
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.sendall(head.encode() + b"\r\n\r\n" + clip[:1000])
        time.sleep(0.2)
        assert kept(page) == before + 1
    deadline = time.monotonic() + 5
    while kept(page) > before:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_oldest_upload_makes_room(page: Page, clip: bytes) -> None:
    found = [page.upload(clip, f"{n}.mp4").json()["id"] for n in range(3)]
    assert page.client.get(f"/uploads/{found[0]}").status_code == 400
    assert [page.client.get(f"/uploads/{i}").status_code for i in found[1:]] == [200, 200]
    assert kept(page) == 2


def test_a_new_upload_stays_while_all_kept_ones_are_watched(clip: bytes) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield clip

    async def bring() -> None:
        watched = await found.take("watched.mp4", body())
        found.videos[watched].readers = 1
        new = await found.take("new.mp4", body())
        assert list(found.videos) == [watched, new] and found.videos[new].path.is_file()

    found = uploads.Uploads(Limits(kept_uploads=1))
    try:
        asyncio.run(bring())
    finally:
        found.close()


def test_a_full_disk_is_one_message(
    page: Page, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, chunk: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = kept(page)
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "_write_all", full)
        answer = page.upload(clip)
    assert answer.status_code == 400 and "No space left on device" in answer.json()["error"]
    assert kept(page) == before
    assert page.upload(clip).status_code == 201


def test_uploads_go_with_the_server(clip: bytes) -> None:
    with serving(StandIn()) as page:
        page.upload(clip)
        folder = page.hub.uploads.folder
        assert folder.stat().st_mode & 0o077 == 0
        assert kept(page) == 1
    assert not folder.exists()


def test_what_a_killed_server_left_goes_with_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, new, other = (tmp_path / name for name in ("casa-caption-a", "casa-caption-b", "c"))
    running = uploads.Uploads(Limits())
    for folder in (left, new, other):
        folder.mkdir()
        (folder / "film").write_bytes(b"film")
    for folder in (left, other, running.folder):
        os.utime(folder, (1e9, 1e9))
    link = tmp_path / "casa-caption-link"
    link.symlink_to(other)
    os.utime(link, (1e9, 1e9), follow_symlinks=False)
    found = uploads.Uploads(Limits())
    assert not left.exists() and (new / "film").exists() and (other / "film").exists()
    assert running.folder.is_dir()
    found.close()
    running.close()
    assert not running.folder.exists() and not found.folder.exists()


def test_the_folder_shows_its_videos_and_nothing_around_it(tmp_path: Path, clip: bytes) -> None:
    folder, secret = tmp_path / "videos", tmp_path / "secret.mp4"
    folder.mkdir()
    secret.write_bytes(clip)
    (folder / "ä film?.mp4").write_bytes(clip)
    (folder / "notes.mp4").write_text("no film\n" * 9)
    (folder / "link.mp4").symlink_to(secret)
    (folder / "inside.mp4").symlink_to(folder / "ä film?.mp4")
    (folder / "deeper").mkdir()
    (folder / "deeper" / "b.mp4").write_bytes(clip)
    (folder / "circle.mp4").symlink_to(folder / "circle.mp4")
    os.mkfifo(folder / "pipe.mp4")  # opening it would wait for ever
    assert sorted(videos_in(folder)) == ["inside.mp4", "ä film?.mp4"]
    with serving(StandIn(), videos=folder) as page:
        assert page.client.get("/state").json()["videos"] == ["inside.mp4", "ä film?.mp4"]
        url = videos_in(folder)["ä film?.mp4"].url
        assert page.client.get(url).content == clip
        for name in (
            "deeper%2Fb.mp4",
            ".",
            "a%00b",
            "circle.mp4",
            "pipe.mp4",
            "../secret.mp4",
            "..%2Fsecret.mp4",
            "link.mp4",
            "%2e%2e%2fsecret.mp4",
            "x",
        ):
            assert page.client.get(f"/videos/{name}").status_code in (400, 404), name
        shutil.rmtree(folder)
        assert page.client.get("/state").json()["videos"] == []
