"""Live-WhisperX-526K (`chenjoya/Live-WhisperX-526K`): clips of videos with word-timed transcripts.

Each line of its JSONL is a conversation: a user's video with `video_start` and `video_end` and a
text, an assistant's `text_stream` of (start, end, word). The last line holds byte offsets.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from casa_train.errors import UserError
from data_recipes import published
from data_recipes.hub import base_path, files_matching, until_damage
from data_recipes.pipeline import Job, Row, Skip, Skips, SplitPlan
from data_recipes.video import decode_clip

HUB_ID = "chenjoya/Live-WhisperX-526K"
TOKENIZER = "Qwen/Qwen2.5-VL-3B-Instruct"
TEMPLATE = "auto"
NAME = "live_whisperx"
LONGEST = 241.0  # seconds: clips of 30 to 240
JOB_SAMPLES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    published.add_arguments(parser, HUB_ID, TOKENIZER, TEMPLATE)


def run(arguments: argparse.Namespace) -> None:
    """Prepares the dataset.

    :raises UserError: a source without JSONL.
    """
    source = arguments.source
    files = files_matching(source, "*.jsonl")
    if not files:
        raise UserError(
            f"--source {source} has no *.jsonl; expected the published annotations and videos."
        )

    def plan(directory: Path) -> SplitPlan:
        origin = {"dataset": NAME, "subset": NAME}
        args = directory, NAME, NAME, live_jobs(source, files), None, "rows", origin
        return SplitPlan(*args, rows=lambda: sum(1 for _ in live_lines(source, files, [])))

    published.prepare(arguments, NAME, None, plan)


@dataclass(frozen=True)
class LiveJob:
    """Some lines of the annotations, with the folder that their videos lie under."""

    name: str
    base: str
    lines: tuple[tuple[str, str], ...]

    @property
    def weight(self) -> int:
        return len(self.lines)

    def rows(self) -> Iterator[Row | Skip]:
        from casa_train.data.schemas.rows import BadRow

        for key, line in self.lines:
            try:
                yield self._row(key, line)
            except BadRow as error:
                yield Skip(error.reason)

    def _row(self, key: str, line: str) -> Row:
        import fsspec

        from casa_train.data.schemas.conversation import safe_path
        from casa_train.data.schemas.rows import BadRow
        from casa_train.data.schemas.video_rows import last_word, live_parts

        try:
            row = {"messages": json.loads(line), "subset": NAME}
        except ValueError as error:
            raise BadRow("damaged_line", str(error)) from error
        clip, _, words = live_parts(key, row)
        video_path = safe_path(key, clip.get("video"))
        path = f"{self.base}/{video_path}"
        start, end = clip.get("video_start"), clip.get("video_end")
        if not isinstance(start, int | float) or not isinstance(end, int | float) or start < 0:
            raise BadRow("no_clip", f"video_start {start!r} and video_end {end!r}")
        # Nothing is said after the last word, so the frames end there.
        stop = min(float(end), max(last_word(words), float(start) + 1.0))
        try:
            with fsspec.open(path, "rb") as video:
                frames = decode_clip(video, LONGEST, float(start), stop)
        except FileNotFoundError as error:
            raise BadRow("missing_video", path) from error
        return Row(key, {**row, "frame_times": frames.times}, frames.images, video_path)


def live_jobs(source: str, files: list[str]) -> Iterator[Job]:
    """Jobs over the lines of the annotations, in order."""
    batch: list[tuple[str, str]] = []
    damages: list[int] = []
    for keyed in live_lines(source, files, damages):
        batch.append(keyed)
        if len(batch) == JOB_SAMPLES:
            yield _job(source, batch)
            batch = []
    if batch:
        yield _job(source, batch)
    if damages:
        yield Skips("damaged annotations", {"damaged_annotations": len(damages)})


def live_lines(source: str, files: list[str], damages: list[int]) -> Iterator[tuple[str, str]]:
    """The lines of the annotations under their keys.

    :param damages: receives the number of a file that could be read to a part only.
    """
    import datasets

    for number, file in enumerate(files):
        stream = datasets.load_dataset(
            "text", data_files={"train": [file]}, split="train", streaming=True
        )
        rows = until_damage(stream, source, partial(damages.append, number))
        for position, row in enumerate(rows):
            line = row["text"].strip()
            if line and not line.startswith(("[0,", "[0]")):  # byte offsets of the lines
                yield f"{NAME}-{number:02d}-{position:07d}", line


def _job(source: str, batch: list[tuple[str, str]]) -> LiveJob:
    return LiveJob(f"{batch[0][0]} to {batch[-1][0]}", base_path(source), tuple(batch))
