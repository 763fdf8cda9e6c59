"""Captions as files: subtitles (SRT, WebVTT) and one JSON line a frame, written as they come."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from casa_train.caption.cues import RollUp
from casa_train.caption.playing import Spoken
from casa_train.errors import UserError
from casa_train.io.log import LineFile
from casa_train.video.burning import Cue

SUFFIXES = (".srt", ".vtt", ".jsonl")


class CaptionFiles:
    """`NAME.srt`, `NAME.vtt` and `NAME.jsonl` of one video, anew.

    What a full disk refuses waits in memory, and captions go on.

    :param directory: None: nothing is written, cues are kept alone.
    :param log: is told when the disk refuses, and when no longer.
    :param keep: all cues in `cues`, too, in seconds of the video.
    :param offset: second of a player's clock at which the video's second 0 is; subtitles go by that
        clock, and the JSONL by the video's.
    :raises UserError: the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path | None,
        name: str,
        log: Callable[[str], None],
        keep: bool = False,
        offset: float = 0.0,
    ) -> None:
        self._files: list[LineFile] = []
        if directory is not None:
            _begin(directory, [name + suffix for suffix in SUFFIXES])
            self._files = [LineFile(directory / (name + suffix), log) for suffix in SUFFIXES]
        self.cues: list[Cue] = []
        self._keep = keep
        self._offset = offset
        self._roll = RollUp()
        self._numbers = 0
        self._add(".vtt", ["WEBVTT", ""])

    def add(self, spoken: Spoken) -> None:
        """Takes what was said to the next frame."""
        self._add(".jsonl", [json.dumps(as_record(spoken), ensure_ascii=False)])
        self._write(self._roll.add(spoken.time, spoken.caption.text))

    def close(self, end: float) -> bool:
        """Writes the rest; returns whether all of it is on the disk.

        :param end: seconds of the video at which it ended.
        """
        self._write(self._roll.close(end))
        for file in self._files:
            file.close()
        return not any(file.waiting for file in self._files)

    def _add(self, suffix: str, lines: list[str]) -> None:
        for file in self._files:
            if file.path.suffix == suffix:
                file.add(lines)

    def _write(self, cues: list[Cue]) -> None:
        for cue in cues:
            if self._keep:
                self.cues.append(cue)
            self._numbers += 1
            span = (cue.start + self._offset, cue.end + self._offset)
            srt, vtt = (" --> ".join(timestamp(t, mark) for t in span) for mark in (",", "."))
            self._add(".srt", [str(self._numbers), srt, *cue.text.split("\n"), ""])
            self._add(".vtt", [vtt, *_escaped(cue.text).split("\n"), ""])


def _begin(directory: Path, names: list[str]) -> None:
    """Empties what an earlier call wrote."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            (directory / name).write_bytes(b"")
    except OSError as error:
        raise UserError(
            f"--out {directory} cannot be written ({error.strerror or error}); expected a "
            "directory for subtitles."
        ) from error


def as_record(spoken: Spoken) -> dict[str, object]:
    """One line of the JSONL: times in seconds, memory in bytes."""
    caption = spoken.caption
    return {
        "time": round(spoken.time, 3),
        "text": caption.text,
        "tokens": caption.tokens,
        "first_token_seconds": caption.first_token,
        "tokens_per_second": caption.tokens_per_second,
        "cache_tokens": caption.cache_tokens,
        "memory_bytes": caption.memory_bytes,
        "lag_seconds": spoken.lag,
        "cut": caption.cut,
        "dropped_frames": spoken.dropped,
    }


def timestamp(seconds: float, mark: str) -> str:
    """hh:mm:ss and milliseconds. :param mark: between them: "," in SRT, "." in WebVTT."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    whole, thousandths = divmod(milliseconds, 1000)
    return f"{hours:02d}:{minutes:02d}:{whole:02d}{mark}{thousandths:03d}"


def _escaped(text: str) -> str:
    """For WebVTT, where "<" begins a tag and an arrow a cue."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
