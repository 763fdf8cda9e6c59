"""python -m casa_train.caption VIDEO [VIDEO ...] --export DIR: live captions of videos, of a camera
(--camera 0) or of a video on standard input (-), printed as they come and written with --out DIR.
python -m casa_train.caption --serve --export DIR: a page to watch them on.
"""

from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # seconds of imports: Ctrl-C just ends them

from casa_train.io.environment import set_environment

set_environment()  # before anything imports torch

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence

from casa_train.caption.command_line import add_arguments, check_together
from casa_train.caption.run_captions import run_captions
from casa_train.caption.web.serve import serve
from casa_train.errors import UserError
from casa_train.io.log import drop_unwritten
from casa_train.io.quiet import quiet_libraries


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.caption", description=__doc__)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        # A console that lacks a character shows another one: captions speak every language.
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # it was a file when Python began, and is a pipe now
                stream.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        check_together(arguments)
        return serve(arguments) if arguments.serve else run_captions(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    code = main()
    drop_unwritten()  # a console on a full disk is no failure
    sys.exit(code)
