"""python -m casa_train.caption --serve: what it needs, and what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from casa_train.caption.captioner import Captioner
from casa_train.caption.command_line import options_of
from casa_train.caption.web.address import bind
from casa_train.caption.web.limits import MIB, Limits
from casa_train.errors import UserError
from casa_train.io.precision import DTYPES


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
    from casa_train.caption.web.running import make_server

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
            export = str(arguments.export)
            server = make_server(captioner, export, address, arguments.fps, limits, videos)
            server.run(sockets=[address.listening])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0


def _limits(arguments: argparse.Namespace) -> Limits:
    upload, streams = arguments.max_upload, arguments.max_streams
    if not 0 <= upload <= 1e6:  # NaN is neither
        raise UserError(f"--max-upload is {upload:g}; expected 0 to 1,000,000 MB.")
    if streams < 1:
        raise UserError(f"--max-streams is {streams}; expected 1 or more.")
    return Limits(upload_bytes=int(upload * MIB), streams=streams)
