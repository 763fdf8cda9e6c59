"""A hub on this machine that models are pushed to: the requests that huggingface_hub makes."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlparse

from tests.helpers.fake_hub import running

TOKEN = "hf_of_this_machine"


class ModelHub(ThreadingHTTPServer):
    """Keeps what is committed.

    :ivar repos: by name whether it is private; :ivar files: by repository and path.
    :ivar refuses: a status for every request that would write.
    :ivar breaks: hangs up on this many uploads of large files.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, bool] = {}
        self.files: dict[str, dict[str, bytes]] = {}
        self.refuses: int | None = None
        self.breaks = 0
        self.stored: dict[str, bytes] = {}
        self.asked: list[str] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are hung up on are no news."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: ModelHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""

    def reply(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def refused(self) -> bool:
        status = self.server.refuses
        if status is None and self.headers.get("authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self.body()
            self.reply({"error": "not you"}, status)
        return status is not None

    def do_GET(self) -> None:
        parts = urlparse(self.path).path.strip("/").split("/")
        if self.refused():
            return
        repo = "/".join(parts[2:4])
        if repo not in self.server.repos:
            self.reply({"error": "Repository not found"}, 404)
        elif parts[4:5] == ["tree"]:
            files = self.server.files[repo]
            entries = [
                {"type": "file", "oid": "0" * 40, "size": len(data), "path": path}
                for path, data in files.items()
            ]
            self.reply(entries)
        else:
            found = {"id": repo, "private": self.server.repos[repo], "sha": "0" * 40}
            self.reply({**found, "siblings": [], "tags": [], "downloads": 0, "likes": 0})

    def do_PUT(self) -> None:
        if self.server.breaks:
            self.server.breaks -= 1
            self.rfile.read(10)
            self.close_connection = True
            self.connection.close()
            return
        self.server.stored[self.path.rsplit("/", 1)[1]] = self.body()
        self.reply({})

    def do_POST(self) -> None:
        path = urlparse(self.path).path
        self.server.asked.append(path)
        if path == "/api/validate-yaml":
            self.body()
            self.reply({"errors": [], "warnings": []})
            return
        if self.refused():
            return
        body = self.body()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization']}/{wanted['name']}"
            if repo in self.server.repos:
                url = f"{self.server.url}/{repo}"
                self.reply({"error": "You already created this model repo", "url": url}, 409)
                return
            self.server.repos[repo] = "private" in (
                wanted.get("visibility"),
                wanted.get("private") and "private",
            )
            self.server.files[repo] = {}
            self.reply({"url": f"{self.server.url}/{repo}", "name": repo})
        elif path.endswith("/objects/batch"):
            made = []
            for item in json.loads(body)["objects"]:
                upload = {"href": f"{self.server.url}/put/{item['oid']}", "header": {}}
                made.append({**item, "actions": {"upload": upload}})
            self.reply({"transfer": "basic", "objects": made})
        elif "/preupload/" in path:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": modes})
        elif "/commit/" in path:
            self.commit("/".join(path.strip("/").split("/")[2:4]), body)

    def commit(self, repo: str, body: bytes) -> None:
        files = self.server.files[repo]
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.reply(
            {"commitUrl": f"{self.server.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}
        )


@contextmanager
def model_hub() -> Iterator[ModelHub]:
    """A hub that runs meanwhile."""
    with running(ModelHub()) as hub:
        yield hub
