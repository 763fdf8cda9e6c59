"""The arguments of `python -m casa_train.caption`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from casa_train.caption.options import NAMES, PUBLISHED, TURN_END, CaptionOptions
from casa_train.caption.web.serve_arguments import add_serve_arguments
from casa_train.config.bounds import local_path, whole_from
from casa_train.errors import UserError
from casa_train.io.precision import DTYPES
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.video.frame_sources import STDIN

FPS = 2.0
HIGHEST_FPS = 120.0
# Each default is that of `CaptionOptions`.
HELP: dict[str, tuple[type, str]] = {
    "prompt": (str, "what is asked before the first frame"),
    "system": (str, "a system message before it (default: the chat template's own)"),
    "begin": (str, "words that the captions begin with, such as 'In this video'"),
    "frame_end": (str, f"the text that ends a frame's words; '{TURN_END}': the end of a turn"),
    "max_new_tokens": (int, "of a frame"),
    "temperature": (float, "0: the most likely tokens"),
    "top_k": (int, "of how many tokens is drawn; 0: of all"),
    "stop_bias": (float, "of ending a frame: above 1 less is said, below more"),
    "repetition_penalty": (float, "of tokens that were said before; 1: none"),
    "penalty_decay": (float, "what is left of a count after another token"),
    "penalty_most": (float, "the highest count"),
    "ngram": (int, "so many tokens in a row are said once within the window; 0: no block"),
    "ngram_window": (int, "in tokens"),
    "seed": (int, "of drawn tokens"),
}
# What says nothing beside --serve, by its name in the namespace.
PLAYING = ("start", "end", "out", "burn", "realtime", "compare")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds all of them."""
    parser.add_argument(
        "videos", nargs="*", metavar="VIDEO", help=f"video files; {STDIN}: one on standard input"
    )
    parser.add_argument("--export", type=local_path, required=True, metavar="DIR", help="the model")
    parser.add_argument("--camera", metavar="N", help="a camera: 0, 1 or /dev/video0")
    parser.add_argument("--fps", type=_fps, default=FPS, help=f"frames a second ({FPS:g})")
    parser.add_argument("--start", type=_seconds, metavar="S", help="seconds to begin at")
    parser.add_argument("--end", type=_seconds, metavar="S", help="seconds to end at")
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="for NAME.srt, NAME.vtt and NAME.jsonl of every video",
    )
    parser.add_argument(
        "--burn", type=local_path, metavar="FILE.mp4", help="the video with its subtitles in it"
    )
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="keep to the clock: cut what is not said when the next frame is due, drop frames "
        "whose time is over (a camera does so in any case)",
    )
    parser.add_argument(
        "--compare", type=local_path, metavar="DIR", help="another export, side by side"
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: that of the export")
    parser.add_argument(
        "--image-size",
        type=whole_from(SIDE),
        metavar="PIXELS",
        help="a frame has at most the pixels of a square of this side (default: the export's)",
    )
    group = parser.add_argument_group("what is said")
    group.add_argument(
        "--published",
        action="store_true",
        help="the values of the captioner that CASA's authors publish, where no option says other",
    )
    for name in NAMES:
        kind, text = HELP[name]
        default = getattr(CaptionOptions, name)
        shown = "" if "default" in text else f" (default: {default!r})"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, help=text + shown)
    add_serve_arguments(parser)


def check_together(arguments: argparse.Namespace) -> None:
    """Refuses arguments that say nothing beside each other.

    :raises UserError: naming them.
    """
    videos, camera = arguments.videos, arguments.camera
    if arguments.serve:
        stray = [f"--{name}" for name in PLAYING if getattr(arguments, name)]
        stray += ["--camera"] * (camera is not None) + videos
        if stray:
            raise UserError(
                f"{', '.join(stray)} say{'s' if len(stray) == 1 else ''} nothing beside --serve, "
                "whose page asks what to play; a folder of videos is --videos DIR. Leave it out."
            )
        return
    if not videos and camera is None:
        raise UserError("nothing to caption: name a video, --camera 0, - or --serve.")
    if videos and camera is not None:
        raise UserError(f"--camera {camera} beside {videos[0]}: expected one or the other.")
    if videos.count(STDIN) > 1 or (STDIN in videos and len(videos) > 1):
        raise UserError(f"{STDIN} (standard input) is named with other videos; name it alone.")
    if arguments.end is not None and arguments.end <= (arguments.start or 0.0):
        raise UserError(
            f"--end is {arguments.end:g}; expected more than --start, {arguments.start or 0:g}."
        )
    if arguments.compare is not None and arguments.realtime:
        raise UserError(
            "--compare beside --realtime: two models would share the time of one frame. Leave one "
            "of them out."
        )
    if (burn := arguments.burn) is not None:
        if len(videos) != 1 or videos[0] == STDIN or arguments.compare is not None:
            raise UserError(
                f"--burn {burn} takes one video file and one export, since it reads the video "
                "again; found other sources. Leave it out, or name them one by one."
            )
        if burn.suffix.lower() != ".mp4":
            raise UserError(f"--burn {burn}: expected the name of an .mp4 file.")
        if burn.is_dir():
            raise UserError(f"--burn {burn} is a directory; expected the name of a file.")
        if burn.exists() and Path(videos[0]).exists() and burn.samefile(videos[0]):
            raise UserError(f"--burn {burn} is the video itself; name another file.")


def options_of(arguments: argparse.Namespace) -> CaptionOptions:
    """What is asked and how tokens are chosen.

    :raises UserError: a value that cannot be.
    """
    given: dict[str, Any] = dict(PUBLISHED) if arguments.published else {}
    for name in NAMES:
        if (value := getattr(arguments, name)) is not None:
            given[name] = value
    options = CaptionOptions(**given)
    options.check(lambda field: f"--{field.replace('_', '-')}")
    return options


def _fps(text: str) -> float:
    value = _number(text)
    if not 0 < value <= HIGHEST_FPS:
        raise argparse.ArgumentTypeError(
            f"it is {text}; expected more than 0 and at most {HIGHEST_FPS:g}"
        )
    return value


def _seconds(text: str) -> float:
    value = _number(text)
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"it is {text}; expected seconds from 0 on")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"it is {text!r}; expected a number") from None
