"""A hub of one dataset on this machine: the requests that `datasets` and its file system make."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlparse

S = TypeVar("S", bound=ThreadingHTTPServer)

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves the files of `root` as dataset `name`.

    :param broken: how many of the next reads of parquet files end in the middle.
    """

    def __init__(self, root: Path, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.name = root, name
        self.broken = 0
        self.reads = 0  # whole answers to reads of parquet files
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up after a broken answer are no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def entry(self, path: Path) -> dict[str, Any]:
        relative = path.relative_to(self.root).as_posix()
        if path.is_dir():
            return {"type": "directory", "oid": "0" * 40, "size": 0, "path": relative}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "oid": oid, "size": path.stat().st_size, "path": relative}


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        self.answer(posted=self.rfile.read(length))

    def answer(self, body: bool = True, posted: bytes = b"") -> None:
        hub = self.server
        path = unquote(urlparse(self.path).path)
        api, files = f"/api/datasets/{hub.name}", f"/datasets/{hub.name}/resolve/"
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": hub.entry(p)["path"]} for p in self.all_files()]
            self.send(json.dumps({"id": hub.name, "sha": COMMIT, "siblings": siblings}), body)
        elif path.startswith(f"{api}/tree/"):
            place = hub.root.joinpath(*path.removeprefix(f"{api}/tree/").split("/")[1:])
            if not place.is_dir():
                self.send("{}", body, 404, {"X-Error-Code": "EntryNotFound"})
                return
            recursive = parse_qs(urlparse(self.path).query).get("recursive") == ["True"]
            found = sorted(place.rglob("*") if recursive else place.iterdir())
            self.send(json.dumps([hub.entry(p) for p in found]), body)
        elif path.startswith(f"{api}/paths-info/"):
            wanted = json.loads(posted)["paths"]
            there = [hub.root / name for name in wanted if (hub.root / name).exists()]
            self.send(json.dumps([hub.entry(p) for p in there]), body)
        elif path.startswith(files):
            place = hub.root.joinpath(*path.removeprefix(files).split("/")[1:])
            self.send_file(place, body)
        else:
            self.send("{}", body, 404)

    def all_files(self) -> list[Path]:
        return sorted(path for path in self.server.root.rglob("*") if path.is_file())

    def send_file(self, path: Path, body: bool) -> None:
        hub = self.server
        if not path.is_file():
            self.send("{}", body, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data, status = path.read_bytes(), 200
        broken = False
        headers = {"ETag": f'"{hub.entry(path)["oid"]}"', "X-Repo-Commit": COMMIT}
        asked = self.headers.get("Range")
        if body and path.suffix == ".parquet":
            with hub.lock:
                broken, hub.broken = hub.broken > 0, max(0, hub.broken - 1)
                hub.reads += not broken
        if asked:
            first, last = asked.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last), len(data) - 1) if last else len(data) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
            data, status = data[start : end + 1], 206
        self.send(data, body, status, headers, broken)

    def send(
        self,
        data: str | bytes,
        body: bool,
        status: int = 200,
        headers: dict[str, str] | None = None,
        broken: bool = False,
    ) -> None:
        content = data.encode() if isinstance(data, str) else data
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if broken else content)
            self.close_connection = broken


@contextmanager
def running(server: S) -> Iterator[S]:
    """A server that answers meanwhile."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(root: Path, name: str) -> Iterator[Hub]:
    """A running hub."""
    with running(Hub(root, name)) as hub:
        yield hub
