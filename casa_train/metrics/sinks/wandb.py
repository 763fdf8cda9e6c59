"""Weights & Biases: online where somebody is logged in, otherwise into files."""

from __future__ import annotations

import netrc
import os
import socket
import threading
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from casa_train.config.schema import Config
from casa_train.metrics.fields import scalars
from casa_train.metrics.sinks.base import Record

ID_FILE = "wandb_id"
LONGEST_NAME = 128  # characters that the server takes
SERVER = "https://api.wandb.ai"
CONNECT_SECONDS = 3.0
INIT_SECONDS = 20.0
FINISH_SECONDS = 60.0  # a job that was told to leave has not much more


class WandbSink:
    """One wandb run for all starts of a run: its id stays in the run directory.

    It asks nobody for anything: without a login, without a way to the server, or where the server
    refuses, the run is written into `wandb/` in the run directory for `wandb sync`.

    :param config: of the whole run, shown beside it.
    :param log: prints a line for the user.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        log: Callable[[str], None] = print,
    ) -> None:
        import wandb  # only where it is switched on

        wanted = {
            "console": "off",
            "silent": True,
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        known = wandb.Settings.model_fields  # by release
        options = {
            "dir": str(run_dir),
            "id": _run_id(run_dir / ID_FILE),
            "name": run_name(config.name, run_dir),
            "project": config.metrics.wandb_project,
            "entity": config.metrics.wandb_entity,
            "tags": list(config.metrics.wandb_tags),
            "config": asdict(config),
            "settings": wandb.Settings(**{k: v for k, v in wanted.items() if k in known}),
        }
        self._run: Any = None
        offline = _why_offline()
        if offline is None:
            try:
                self._run = wandb.init(**options, mode="online", resume="allow")
            except Exception as error:  # a refused key, a server that does not answer, ...
                offline = f"{type(error).__name__}: {error}"
                wandb.teardown()  # its service still holds the id
        if self._run is None:
            self._run = wandb.init(**options, mode="offline")
            log(f"wandb is offline ({offline}): upload {run_dir}/wandb with `wandb sync`")

    def write(self, record: Record) -> None:
        # wandb leaves out steps that it has already: a resumed run repeats them bit for bit.
        self._run.log(scalars(record), step=record["step"])

    def validated(self, record: Record) -> None:
        self._run.log(scalars({"validation": record}), step=record["step"])

    def log(self, line: str) -> None:
        """Messages are not metrics."""

    def close(self) -> None:
        self._run.finish()


def switched_off() -> bool:
    """Whether the user wants nothing of wandb at all, neither files nor reports."""
    return os.environ.get("WANDB_MODE") == "disabled"


def run_name(name: str, run_dir: Path) -> str:
    """The name that wandb shows: of a sweep's job its directory's, since all share `name`."""
    shown = run_dir.name if run_dir.name.startswith(f"{name},") else name
    if len(shown) > LONGEST_NAME:  # the end tells jobs apart
        shown = shown[: LONGEST_NAME - 43] + "..." + shown[-40:]
    return shown


def _run_id(path: Path) -> str:
    """The id of the run's first start, or a new one that is kept."""
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()


def _why_offline() -> str | None:
    """Why nothing can be sent; None: somebody is logged in and the server is within reach."""
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "dryrun"):
        return f"WANDB_MODE={mode}"
    server = urlsplit(os.environ.get("WANDB_BASE_URL") or SERVER)
    host = server.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return "nobody is logged in, see `wandb login`"
    if urllib.request.getproxies().get(server.scheme):
        return None  # the way leads through a proxy
    port = server.port or (80 if server.scheme == "http" else 443)
    if not _answers(host, port):
        return f"{host}:{port} is out of reach"
    return None


def _in_netrc(host: str) -> bool:
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        if path and os.path.isfile(os.path.expanduser(path)):
            try:
                return netrc.netrc(os.path.expanduser(path)).authenticators(host) is not None
            except (netrc.NetrcParseError, OSError):
                return False
    return False


def _answers(host: str, port: int) -> bool:
    """Whether somebody listens there; within `CONNECT_SECONDS`, the look-up of the name too."""
    connected = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
            connected.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return connected.is_set()
