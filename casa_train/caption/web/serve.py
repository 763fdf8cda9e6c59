"""python -m casa_train.caption --serve: the port, and what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from casa_train.caption.captioner import Captioner
from casa_train.caption.command_line import options_of
from casa_train.caption.web.limits import MIB, Limits
from casa_train.errors import UserError
from casa_train.io.precision import DTYPES

LOCAL = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Address:
    """Where the page is.

    :param listening: a bound socket; :param token: what a visitor has to know; None: nothing.
    """

    listening: socket.socket
    host: str
    token: str | None

    @property
    def url(self) -> str:
        """What a browser opens."""
        host = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(
            self.host, f"[{self.host}]" if ":" in self.host else self.host
        )
        token = "" if self.token is None else f"?token={self.token}"
        return f"http://{host}:{self.listening.getsockname()[1]}/{token}"


def serve(arguments: argparse.Namespace) -> int:
    """Serves the page until Ctrl-C; returns the exit code.

    :param arguments: of the command, those of the page among them.
    :raises UserError: the extra is not installed, an option cannot be, the port is in use, or the
        export cannot be loaded.
    """
    for library in ("starlette", "uvicorn"):
        if importlib.util.find_spec(library) is None:
            raise UserError(
                f"--serve needs {library}, which is not installed; pip install 'casa_train[live]'."
            )
    from casa_train.caption.web.running import run

    limits = _limits(arguments)
    options = options_of(arguments)
    videos: Path | None = arguments.videos_dir
    if videos is not None and not videos.is_dir():
        raise UserError(f"--videos {videos} is no folder; expected one with videos in it.")
    # Before the model, since this is what fails quickly.
    address = bind(arguments.host, arguments.port, arguments.token)
    try:
        with address.listening:
            dtype = DTYPES[arguments.dtype] if arguments.dtype else "auto"
            captioner = Captioner.load(
                arguments.export, options, arguments.device, dtype, arguments.image_size
            )
            print(f"live captions by {arguments.export}: {address.url}", flush=True)
            run(captioner, str(arguments.export), address, arguments.fps, limits, videos)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0


def bind(host: str, port: int, token: str | None = None) -> Address:
    """A listening socket; with a token where other machines reach it.

    :raises UserError: nothing can listen there.
    """
    if token is not None and (not token.isascii() or not token.isprintable() or " " in token):
        raise UserError("--token: expected visible ASCII characters without spaces.")
    if token is not None and len(token) < 8:
        raise UserError(f"--token has {len(token)} characters; expected 8 or more.")
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}; expected 0 (a free one) to 65535.")
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(24)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, place = found[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(
            f"--host {host}: {error.strerror}; expected an address of this machine."
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(place)
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise UserError(
            f"--host {host} --port {port}: {error.strerror}. Name another port; 0: a free one."
        ) from error
    return Address(listening, host, token)


def _limits(arguments: argparse.Namespace) -> Limits:
    upload, streams = arguments.max_upload, arguments.max_streams
    if not 0 <= upload <= 1e6:  # NaN is neither
        raise UserError(f"--max-upload is {upload:g}; expected 0 to 1,000,000 MB.")
    if streams < 1:
        raise UserError(f"--max-streams is {streams}; expected 1 or more.")
    return Limits(upload_bytes=int(upload * MIB), streams=streams)
