"""What the page can be asked for: itself, videos, streams, and their events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import (
    FileResponse,
    HTMLResponse,
    JSONResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from casa_train.caption.web.camera_frames import CameraFrames, read_picture
from casa_train.caption.web.guard import Guard
from casa_train.caption.web.hub import Hub
from casa_train.caption.web.limits import MIB
from casa_train.caption.web.live_stream import LiveStream
from casa_train.caption.web.uploads import FORMATS
from casa_train.errors import UserError


@dataclass(frozen=True)
class Shown:
    """What the page shows of the server.

    :param html: the page; :param model: what is running.
    :param fields: of the options, each with name, kind and default.
    """

    html: str
    model: str
    fields: Sequence[Mapping[str, Any]]


def application(
    hub: Hub, shown: Shown, token: str | None = None, hosts: frozenset[str] | None = None
) -> Starlette:
    """The server as an ASGI application; the hub lives as long as it does."""
    site = Site(hub, shown)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        hub.open()
        try:
            yield
        finally:
            await hub.close()

    stream = "/streams/{stream}"
    return Starlette(
        routes=[
            Route("/", site.page),
            Route("/state", site.state),
            Route("/videos/{name}", site.video),
            Route("/uploads", site.upload, methods=["POST"]),
            Route("/uploads/{name}", site.uploaded),
            Route("/streams", site.start, methods=["POST"]),
            Route(f"{stream}/events", site.events),
            Route(f"{stream}/picture", site.picture),
            Route(f"{stream}/frames", site.frame, methods=["POST"]),
            *(
                Route(f"{stream}/{verb}", site.steer(action), methods=["POST"], name=verb)
                for verb, action in (
                    ("pause", LiveStream.pause),
                    ("resume", LiveStream.resume),
                    ("stop", LiveStream.stop),
                )
            ),
        ],
        middleware=[Middleware(Guard, token=token, hosts=hosts)],
        exception_handlers={
            UserError: _wrong,
            HTTPException: _no_such,
            ClientDisconnect: _gone,
            Exception: _broken,
        },
        lifespan=lifespan,
    )


class Site:
    """The answers."""

    def __init__(self, hub: Hub, shown: Shown) -> None:
        self.hub, self.shown = hub, shown

    async def page(self, _: Request) -> Response:
        return HTMLResponse(self.shown.html, headers={"Cache-Control": "no-store"})

    async def state(self, _: Request) -> Response:
        limits = self.hub.limits
        videos = await asyncio.to_thread(self.hub.videos)  # a disk may be slow
        return _json(
            {
                "model": self.shown.model,
                "fields": list(self.shown.fields),
                "fps": self.hub.fps,
                "upload_bytes": limits.upload_bytes,
                "picture_pixels": limits.picture_pixels,
                "formats": FORMATS,
                "videos": list(videos),
                "streams": [s.about() for s in self.hub.streams.values() if not s.over],
            }
        )

    async def video(self, request: Request) -> Response:
        video = self.hub.video({"video": request.path_params["name"]})
        return FileResponse(video.path, media_type=video.kind)

    async def uploaded(self, request: Request) -> Response:
        video = self.hub.video({"upload": request.path_params["name"]})
        return FileResponse(video.path, media_type=video.kind)

    async def upload(self, request: Request) -> Response:
        most = self.hub.limits.upload_bytes
        _check_length(request, most, f"the file is larger than {most / MIB:g} MB (--max-upload).")
        name = unquote(request.headers.get("x-file-name", ""), errors="replace")
        return _json({"id": await self.hub.uploads.take(name, request.stream())}, 201)

    async def start(self, request: Request) -> Response:
        body = await _body(request, self.hub.limits.request_bytes, self.hub.limits.silence)
        try:
            wanted = json.loads(body)
            source, options = wanted["source"], wanted.get("options", {})
            realtime = wanted.get("realtime", True)
            named = isinstance(source, dict) and isinstance(options, dict)
            if not named or not isinstance(realtime, bool):
                raise TypeError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(
                'expected JSON: {"source": {"video": NAME}, "options": {}, "realtime": true}.'
            ) from None
        stream = self.hub.start(source, options, realtime)
        return _json(stream.about(), 201)

    async def events(self, request: Request) -> Response:
        stream = self._stream(request)
        return StreamingResponse(
            _events(stream),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def picture(self, request: Request) -> Response:
        content = self._stream(request).preview()
        if content is None:
            raise HTTPException(404, "there is no picture yet.")
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "no-store"})

    async def frame(self, request: Request) -> Response:
        stream = self._stream(request)
        if not isinstance(stream.frames, CameraFrames):
            raise UserError("this stream takes no pictures: it reads a file.")
        limits = self.hub.limits
        content = await _body(request, limits.picture_bytes, limits.silence)
        # Not in the loop: the others' events would wait for it.
        picture = await asyncio.to_thread(read_picture, content, limits.picture_pixels)
        if not stream.over:  # else it was on its way when the stream ended: no fault of the page's
            stream.frames.arrive(picture)
        return Response(status_code=204)

    def steer(self, action: Callable[[LiveStream], None]) -> Callable[[Request], Any]:
        """The answer to a button."""

        async def answer(request: Request) -> Response:
            action(self._stream(request))
            return Response(status_code=204)

        return answer

    def _stream(self, request: Request) -> LiveStream:
        return self.hub.find(request.path_params["stream"])


async def _events(stream: LiveStream) -> AsyncIterator[bytes]:
    """A stream's events as a browser's EventSource reads them."""
    events = stream.watch()
    try:
        async for event in events:
            yield b": nothing new\n\n" if event is None else b"data: " + _dumped(event) + b"\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # now, not when it is collected


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """
    :raises UserError: it is longer than `most` bytes, or has not come within so many seconds.
    """
    message = f"the request is longer than {most:,} bytes."
    _check_length(request, most, message)
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > most:
                raise UserError(message)

    try:
        await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise UserError(f"the request did not come within {seconds:g} s.") from None
    return bytes(body)


def _check_length(request: Request, most: int, message: str) -> None:
    """Refuses what says itself that it is too long, before any of it is read."""
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise UserError(message)


def _dumped(value: Any) -> bytes:
    # JSON of Python may hold what no browser reads: NaN, lone surrogates.
    return json.dumps(value, ensure_ascii=True, allow_nan=False).encode()


def _json(value: Any, status: int = 200) -> Response:
    return Response(_dumped(value), status, media_type="application/json")


async def _wrong(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _no_such(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)


async def _gone(_: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _broken(_: Request, error: Exception) -> Response:
    # The server prints the traceback.
    return JSONResponse({"error": f"{type(error).__name__}: {error}"}, status_code=500)
