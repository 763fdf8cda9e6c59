"""Where the page listens, and who is asked for a token there."""

from __future__ import annotations

import secrets
import socket
from dataclasses import dataclass

from casa_train.errors import UserError

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
"""Names of this machine that no other one reaches."""


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
    if token is None and host not in LOOPBACK:
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
