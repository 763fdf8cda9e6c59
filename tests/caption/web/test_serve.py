"""`python -m casa_train.caption --serve` with a real model: its start, its end, and its memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from casa_train.caption.__main__ import main
from casa_train.caption.captioner import Captioner
from casa_train.caption.options import CaptionOptions
from casa_train.caption.web.address import bind
from tests.helpers.caption_page import OWN, serving, write_video
from tests.helpers.commands import ROOT, environment
from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "ball.mp4", 1.0)
    write_video(folder / "short.mp4", 0.5)
    write_video(folder / "long.mp4", 30.0)
    return folder


@contextlib.contextmanager
def started(export: Path, videos: Path, *options: str) -> Iterator[tuple[Any, httpx.Client]]:
    """The command as a process, and its page."""
    command = [sys.executable, "-m", "casa_train.caption", "--serve", "--export", str(export)]
    command += ["--videos", str(videos), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    printed = b""
    while b"http://" not in printed:
        line = process.stdout.readline()
        assert line, printed.decode()
        printed = line
    url = re.findall(r"http://\S+", printed.decode())[0]
    try:
        with httpx.Client(base_url=url, headers=OWN, timeout=60) as client:
            yield process, client
    finally:
        process.terminate()  # which removes its folder of uploads
        process.wait(30)


def start(client: httpx.Client, video: str) -> str:
    options = {"max_new_tokens": 3}
    answer = client.post("/streams", json={"source": {"video": video}, "options": options})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def events(client: httpx.Client, stream: str) -> Iterator[dict[str, Any]]:
    with client.stream("GET", f"/streams/{stream}/events") as answer:
        for line in answer.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


@pytest.mark.slow
def test_ten_streams_in_a_row_do_not_grow_the_memory(export: Path, videos: Path) -> None:
    with started(export, videos, "--fps", "8") as (process, client):
        held = []
        for _ in range(13):
            found = list(events(client, start(client, "short.mp4")))
            captions = [e for e in found if e["event"] == "caption"]
            assert found[-1]["state"] == "ended" and len(captions) >= 3
            # The text tokens of this stream alone: none begins where another ended.
            assert captions[0]["cache_tokens"] < 100 < captions[-1]["cache_tokens"] + 100
            held.append(psutil.Process(process.pid).memory_info().rss)
        assert max(held[3:]) - held[2] < 4 << 20, held
        assert not psutil.Process(process.pid).children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_at_once_with_its_children_and_uploads(
    export: Path,
    videos: Path,
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def folders(path: Path) -> list[Path]:
        return list(path.glob("casa-caption-*"))

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with started(export, videos) as (process, client):
        upload = client.post("/uploads", content=(videos / "ball.mp4").read_bytes())
        assert upload.status_code == 201
        stream, said, ended = start(client, "long.mp4"), threading.Event(), []

        def watch() -> None:
            for event in events(client, stream):
                ended.append(event)
                if event["event"] == "caption":
                    said.set()

        viewer = threading.Thread(target=watch)
        viewer.start()
        assert said.wait(30)
        (child,) = psutil.Process(process.pid).children()
        (folder,) = folders(tmp_path)
        assert len(list(folder.iterdir())) == 1
        began = time.monotonic()
        process.send_signal(number)
        assert process.wait(15) == {signal.SIGINT: 0, signal.SIGTERM: 143}[number]
        assert time.monotonic() - began < 6
        viewer.join(10)
        assert ended[-1]["state"] == "stopped"  # its viewers are told
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        assert not folders(tmp_path)
        printed = process.stdout.read().decode()
        assert "Traceback" not in printed and "Error" not in printed, printed


@pytest.mark.fresh
def test_the_page_says_what_the_command_says(
    export: Path, videos: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked = {"prompt": "What rolls there?", "max_new_tokens": 5, "repetition_penalty": 1.3}
    options = [word for k, v in asked.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    video = str(videos / "ball.mp4")
    assert main([video, "--export", str(export), "--out", str(tmp_path), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "ball.jsonl").read_text().splitlines()]
    with serving(Captioner.load(export, CaptionOptions()), None, videos) as page:
        first, second = (page.start({"video": "ball.mp4"}, **asked) for _ in range(2))
        found = [page.to_the_end(stream) for stream in (first, second)]
    for events in found:
        captions = [e for e in events if e["event"] == "caption"] or events[0]["captions"]
        for name in ("time", "text", "tokens", "cache_tokens"):
            assert [c[name] for c in captions] == [line[name] for line in lines], name
    assert len(lines) == 2 and lines[0]["text"]


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["--serve", *options]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def test_a_port_in_use_is_one_message_before_the_model_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with bind("127.0.0.1", 0).listening as taken:
        port = str(taken.getsockname()[1])
        message = refused(capsys, "--export", str(tmp_path / "none"), "--port", port)
    assert "Address already in use" in message and "0: a free one" in message


@pytest.mark.parametrize(
    "options, found",
    [
        (["--port", "65536"], "--port is 65536"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1"),
        (["--videos", "/no/such/folder"], "--videos /no/such/folder is no folder"),
        (["--max-upload", "-1"], "--max-upload is -1"),
        (["--max-upload", "nan"], "--max-upload is nan"),
        (["--max-streams", "0"], "--max-streams is 0"),
        (["--token", "abc"], "--token has 3 characters"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--port", "0"], "no-export"),
    ],
)
def test_what_cannot_be_is_one_message(
    options: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert found in refused(capsys, "--export", str(tmp_path / "no-export"), *options)


@pytest.mark.parametrize("library", ["starlette", "uvicorn"])
def test_without_the_extra_the_command_says_what_to_install(
    library: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == library else find(n))
    message = refused(capsys, "--export", "x")
    assert f"needs {library}" in message and "pip install 'casa_train[live]'" in message


def test_the_command_needs_the_extra_for_the_page_alone() -> None:
    code = (
        "import sys; sys.modules.update(starlette=None, uvicorn=None); "
        "import casa_train.caption.__main__ as m; m.main(['--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "--max-upload" in done.stdout, done.stderr


def test_other_machines_are_given_an_address_with_a_token() -> None:
    here = bind("127.0.0.1", 0)
    everywhere, again = bind("0.0.0.0", 0), bind("0.0.0.0", 0)
    with here.listening, everywhere.listening, again.listening:
        assert here.token is None and re.fullmatch(r"http://127\.0\.0\.1:\d+/", here.url)
        assert everywhere.token and everywhere.token != again.token
        pattern = re.escape(f"http://{socket.gethostname()}:") + r"\d+/\?token=[\w-]{32}"
        assert re.fullmatch(pattern, everywhere.url)
