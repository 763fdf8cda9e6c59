"""A captioner behind the page, run by uvicorn until somebody ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from casa_train.caption.captioner import Captioner
from casa_train.caption.web.address import LOOPBACK, Address
from casa_train.caption.web.hub import Hub
from casa_train.caption.web.limits import Limits
from casa_train.caption.web.live_stream import Captions
from casa_train.caption.web.options_form import form_fields, read_form
from casa_train.caption.web.routes import Shown, application
from casa_train.pages import html

LAST_SECONDS = 2  # for requests that are under way when the server ends


class PageServer(uvicorn.Server):
    """Ends its streams with itself: their viewers' requests would otherwise go on."""

    def __init__(self, config: uvicorn.Config, hub: Hub) -> None:
        super().__init__(config)
        self.hub = hub

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.hub.end_soon()


def page() -> str:
    """The page, the same for every model: what differs it asks the server for."""
    script = html.render("live.js.j2", __package__)
    return html.render("live.html.j2", __package__, script=script)


def make_server(
    captioner: Captioner,
    export: str,
    address: Address,
    fps: float,
    limits: Limits,
    videos: Path | None = None,
) -> PageServer:
    """What serves until SIGINT or SIGTERM, by its `run(sockets=[address.listening])`."""

    def begin(filled: Mapping[str, Any]) -> Callable[[], Captions]:
        return captioner.asking(**read_form(filled)).open

    # Frames that come in larger than this, the processor would make smaller anyway.
    limits = replace(limits, frame_pixels=captioner.processor.max_pixels)
    hub = Hub(begin, fps, limits, videos)
    shown = Shown(page(), export, form_fields(captioner.options))
    # Where a token is asked for, any name may be this server's: another machine's, or a proxy's.
    hosts = LOOPBACK if address.token is None else None
    config = uvicorn.Config(
        application(hub, shown, address.token, hosts),
        log_level="error",
        access_log=False,  # it would hold tokens
        timeout_graceful_shutdown=LAST_SECONDS,
        timeout_keep_alive=10,
        server_header=False,
    )
    return PageServer(config, hub)
