"""The options of python -m casa_train.caption --serve."""

from __future__ import annotations

import argparse

from casa_train.config.bounds import local_path


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the page."""
    group = parser.add_argument_group("page")
    group.add_argument("--serve", action="store_true", help="a web page to watch videos on")
    group.add_argument("--port", type=int, default=8765, help="0: a free one (default: 8765)")
    group.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0: other machines, too, which ask for a token"
    )
    group.add_argument("--token", help="what the page asks for (default: a new one if needed)")
    group.add_argument(
        "--videos",
        dest="videos_dir",
        type=local_path,
        metavar="DIR",
        help="videos that the page lets choose",
    )
    group.add_argument(
        "--max-upload", type=float, default=200, metavar="MB", help="largest upload; 0: none"
    )
    group.add_argument("--max-streams", type=int, default=8, metavar="N", help="at once")
