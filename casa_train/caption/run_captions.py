"""One call of the command: opens videos and models, plays, and writes what is left of it."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from casa_train.caption.caption_files import CaptionFiles
from casa_train.caption.captioner import Captioner, stream_processor
from casa_train.caption.command_line import options_of
from casa_train.caption.playing import Playing, Spoken
from casa_train.caption.printing import Printer
from casa_train.errors import UserError
from casa_train.io.log import log, warn
from casa_train.io.numbers import count
from casa_train.io.precision import DTYPES
from casa_train.video.burning import burn
from casa_train.video.frame_sources import STDIN, FrameSource, open_source


class Telling:
    """Prints what is said and writes it to files.

    :param files: by number of model and video; none without --out and --burn.
    """

    def __init__(
        self, printer: Printer, files: dict[tuple[int, int], CaptionFiles], fps: float
    ) -> None:
        self.printer, self.files, self.fps = printer, files, fps
        self.broken: list[str] = []
        self._ends: dict[tuple[int, int], float] = {}

    def heard(self, model: int, video: int, time: float, piece: str) -> None:
        self.printer.heard(model, video, time, piece)

    def captioned(self, model: int, video: int, spoken: Spoken) -> None:
        self.printer.captioned(model, video, spoken)
        if (files := self.files.get((model, video))) is not None:
            with undisturbed():
                self._ends[model, video] = spoken.time + 1 / self.fps
                files.add(spoken)

    def ended(self, video: int, reason: str | None) -> None:
        self.printer.ended(video, reason)
        if reason is not None:
            self.broken.append(reason)

    def close(self) -> bool:
        """Ends all files; returns whether all is on the disk."""
        return all([files.close(self._ends.get(at, 0.0)) for at, files in self.files.items()])


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait, so that what is written of a frame is whole in every file."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda got, _: came.append(got)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def run_captions(arguments: argparse.Namespace) -> int:
    """Captions videos; returns the exit code: 0 where all went well.

    :raises UserError: what stands in the way of all of them.
    """
    options = options_of(arguments)
    exports = [arguments.export, *([arguments.compare] if arguments.compare else [])]
    with contextlib.ExitStack() as stack:
        _check_places(arguments)
        processors = [stream_processor(export, options, arguments.image_size) for export in exports]
        # Frames are read as large as a processor takes them, and no larger.
        pixels = max(processor.max_pixels for processor in processors)
        sources, failed = _open(arguments, pixels, stack)
        dtype = DTYPES[arguments.dtype] if arguments.dtype else "auto"
        captioners = [
            Captioner.load(export, options, arguments.device, dtype, processor=processor)
            for export, processor in zip(exports, processors, strict=True)
        ]
        labels = _labels(captioners, exports)
        names = _stems([source.name for source in sources])
        files = _files(arguments, labels, names, [source.offset for source in sources])
        printer = Printer(labels, [source.name for source in sources], alone=not files)
        told = Telling(printer, files, arguments.fps)
        streams = [captioner.open(len(sources)) for captioner in captioners]
        stopped: int | None = None
        began = time.monotonic()
        try:
            Playing(streams, sources, told).run()
        except KeyboardInterrupt:
            stopped = 128 + signal.SIGINT
        except BrokenPipeError:
            return 128 + signal.SIGPIPE
        finally:
            with undisturbed():
                whole = told.close()
        seen = max((totals.frames for totals in printer.totals.values()), default=0)
        log(f"\n{count(seen, 'frame')} in {time.monotonic() - began:.1f} s")
        log(printer.summary())
        if arguments.out is not None:
            log(f"subtitles: {arguments.out}")
    if arguments.burn is not None and stopped is None:
        log(f"rendering {arguments.burn}")
        burnt = burn(Path(arguments.videos[0]), files[0, 0].cues, arguments.burn)
        for note in burnt.notes:
            log(note)
    if stopped is not None and arguments.camera is None:  # of a camera that is how it ends
        return stopped
    return 1 if failed or told.broken or not whole else 0


def _check_places(arguments: argparse.Namespace) -> None:
    """Before a model is read and a video played: whether there is a place for what is written.

    :raises UserError: naming the option.
    """
    for option, path, directory in (
        ("--out", arguments.out, arguments.out),
        ("--burn", arguments.burn, arguments.burn and arguments.burn.parent),
    ):
        try:
            if directory is not None:
                directory.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=directory):
                    pass
        except OSError as error:
            raise UserError(
                f"{option} {path} cannot be written ({error.strerror or error}); expected a place "
                "for files; name another one."
            ) from error


def _open(
    arguments: argparse.Namespace, pixels: int, stack: contextlib.ExitStack
) -> tuple[list[FrameSource], int]:
    """The sources that can be opened, and how many cannot.

    :param pixels: of a frame at most.
    :raises UserError: none can.
    """
    sources: list[FrameSource] = []
    errors: list[UserError] = []
    names = arguments.videos or [f"camera:{arguments.camera}"]
    for name in names:
        try:
            source = open_source(
                name,
                arguments.fps,
                start=arguments.start or 0.0,
                end=arguments.end,
                max_pixels=pixels,
                realtime=arguments.realtime,
            )
        except UserError as error:
            errors.append(error)
            continue
        sources.append(stack.enter_context(source))
    if not sources:
        raise UserError("\n".join(map(str, errors)))
    for found in errors:  # the others go on
        print(f"error: {found}", file=sys.stderr)
    return sources, len(errors)


def _labels(captioners: Sequence[Captioner], exports: Sequence[Path]) -> list[str]:
    """What each model is called: by its mechanism, or its directory where that says no more."""
    labels = [str(captioner.model.config.fusion["mechanism"]) for captioner in captioners]
    if len(set(labels)) < len(labels):
        labels = [str(export) for export in exports]
    if len(set(labels)) < len(labels):
        labels = [f"{label} ({number})" for number, label in enumerate(labels, 1)]
    return labels


def _stems(names: Sequence[str]) -> list[str]:
    """A file's name for every video, no two alike."""
    stems: list[str] = []
    for name in names:
        stem = "stdin" if name == STDIN else Path(name.replace(":", "-")).stem
        free, number = stem, 2
        while free in stems:
            free, number = f"{stem}-{number}", number + 1
        stems.append(free)
    return stems


def _files(
    arguments: argparse.Namespace,
    labels: Sequence[str],
    names: Sequence[str],
    offsets: Sequence[float],
) -> dict[tuple[int, int], CaptionFiles]:
    out = arguments.out
    if out is None and arguments.burn is None:
        return {}
    found = {}
    for model, label in enumerate(labels):
        for video, (name, offset) in enumerate(zip(names, offsets, strict=True)):
            stem = f"{name}.{label.strip('/').replace('/', '-')}" if len(labels) > 1 else name
            keep = arguments.burn is not None
            found[model, video] = CaptionFiles(out, stem, warn, keep, offset)
    return found
