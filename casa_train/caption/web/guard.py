"""Who may talk to the page: this machine's own browser, or whoever has the token.

A page that listens on 127.0.0.1 is still within reach of every website that its user's browser
opens. Against those: the Host header must be this machine (a name of someone else's that resolves
to 127.0.0.1 is not), a request that changes something has a header that no form can send and no
other origin may, and nothing is handed to another site.
"""

from __future__ import annotations

import hashlib
import hmac
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OWN_HEADER = "x-casa-caption"
"""Every request that changes something has it; browsers let no other site send it."""
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
}


class Guard:
    """Refuses what does not come from the page itself, and sets the headers of every answer.

    :param token: what has to be known; None: nothing.
    :param hosts: the names by which a browser may call this server, without port; None: any, which
        is safe only with a token, since another name's page has no cookie of this one.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: frozenset[str] | None) -> None:
        self.app, self.token, self.hosts = app, token, hosts
        # Cookies know no ports: two servers on one machine must not take each other's.
        digest = hashlib.sha256((token or "").encode()).hexdigest()
        self.cookie = f"casa_caption_{digest[:8]}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        request = Request(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                if message["status"] >= 400 and request.method not in ("GET", "HEAD"):
                    headers["Connection"] = "close"  # what still comes of its body is not read
            await send(message)

        app = self._refusal(request) or self._welcome(request) or self.app
        await app(scope, receive, with_headers)

    def _refusal(self, request: Request) -> Response | None:
        """What is wrong with a request; None: nothing."""
        host = request.headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return _refused(
                403,
                f"Host {host[:80]!r} is not this server; expected {_words(self.hosts)}. Behind a "
                "proxy or by another name: start the command with --token.",
            )
        navigates = request.method == "GET" and request.url.path == "/"
        site = request.headers.get("sec-fetch-site", "same-origin")
        if site not in ("same-origin", "none") and not navigates:
            return _refused(403, f"a request from another site ({site[:20]}) is refused.")
        if request.method not in ("GET", "HEAD"):
            origin = request.headers.get("origin")
            # A proxy may have changed Host; then what the browser says of the site decides.
            told = "sec-fetch-site" in request.headers
            if origin is not None and not told and urlsplit(origin).netloc != host:
                return _refused(403, f"a request from {origin[:80]} is refused.")
            if OWN_HEADER not in request.headers:
                return _refused(403, f"header {OWN_HEADER} is missing; send it with any value.")
        if not self._knows(request):
            return PlainTextResponse(
                "This page asks for a token: open the address that the command printed, with "
                "?token=... at its end.\n",
                status_code=401,
            )
        return None

    def _knows(self, request: Request) -> bool:
        if self.token is None:
            return True
        given = (request.query_params.get("token"), request.cookies.get(self.cookie))
        # Lists, not a generator: both are compared, whatever the first one is.
        return any([_equal(value, self.token) for value in given if value is not None])  # noqa: C419

    def _welcome(self, request: Request) -> Response | None:
        """Puts the token of an address into a cookie, so that it stands in no history."""
        if request.url.path != "/" or "token" not in request.query_params or self.token is None:
            return None
        query = [(k, v) for k, v in request.query_params.multi_items() if k != "token"]
        response = RedirectResponse("/" + ("?" + urlencode(query) if query else ""), 303)
        # Lax: where somebody follows a link to the page, the redirect has to bring the cookie.
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
        return response


def _name(host: str) -> str:
    """A Host header without its port: `[::1]:80` is `::1`."""
    try:
        return urlsplit("//" + host).hostname or ""
    except ValueError:
        return ""


def _equal(given: str, token: str) -> bool:
    """In a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _words(names: frozenset[str]) -> str:
    return " or ".join(sorted(names))


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status)
