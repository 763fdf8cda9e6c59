"""LLaVA-Video-178K (`lmms-lab/LLaVA-Video-178K`): questions in JSON, videos in tars.

Videos are read in the order of the tars; each is decoded, and its frames are stored, once for all
questions about it.
"""

from __future__ import annotations

import argparse
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_recipes import published
from data_recipes.hub import (
    base_path,
    chosen_subsets,
    files_matching,
    is_local,
    load_arguments,
    subset_names,
    until_damage,
)
from data_recipes.pipeline import Job, Row, Skip, Skips, SplitPlan, slug
from data_recipes.video import decode_clip

HUB_ID = "lmms-lab/LLaVA-Video-178K"
TOKENIZER = "Qwen/Qwen2.5-VL-3B-Instruct"
TEMPLATE = "auto"
ELSEWHERE = "llava_hound"  # a subset whose videos are in another dataset
COLUMNS = ("id", "conversations", "data_source", "video")
LONGEST = 181.0  # seconds: clips up to 3 minutes, and what rounding adds
JOB_SAMPLES = 32
JOB_BYTES = 64 << 20  # of videos that wait for a process
LARGEST_VIDEO = 2 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    published.add_arguments(parser, HUB_ID, TOKENIZER, TEMPLATE)
    published.add_subset_argument(parser, f"every subset of the source but {ELSEWHERE}")


def run(arguments: argparse.Namespace) -> None:
    """Prepares the chosen subsets, one after the other."""
    source = arguments.source
    default = [name for name in subset_names(source) if name != ELSEWHERE]
    summaries = []
    for subset in chosen_subsets(source, arguments.subset, default):

        def plan(directory: Path, subset: str = subset) -> SplitPlan:
            rows, skips = read_annotations(source, subset)
            total = sum(map(len, rows.values()))
            jobs = video_jobs(source, subset, rows, skips)
            origin = {"dataset": "llava_video", "subset": subset}
            args = directory, "llava_video", subset, jobs, total, "rows", origin
            return SplitPlan(*args, rows=lambda: total)

        summaries.append(published.prepare(arguments, "llava_video", subset, plan))
    published.print_total(summaries)


@dataclass(frozen=True)
class VideoJob:
    """Some videos, each with the rows about it.

    :param videos: (bytes, or a path to open, and keyed rows) of each.
    """

    name: str
    subset: str
    videos: tuple[tuple[bytes | str, tuple[tuple[str, dict[str, Any]], ...]], ...]

    @property
    def weight(self) -> int:
        return sum(len(rows) for _, rows in self.videos)

    def rows(self) -> Iterator[Row | Skip]:
        from casa_train.data.schemas.conversation import safe_path
        from casa_train.data.schemas.rows import BadRow

        for video, rows in self.videos:
            try:
                data = Path(video).read_bytes() if isinstance(video, str) else video
                frames = decode_clip(data, LONGEST)
            except (BadRow, OSError) as error:
                reason = error.reason if isinstance(error, BadRow) else "unreadable_video"
                yield Skip(reason, len(rows))
                continue
            for key, row in rows:
                stored = {**row, "subset": self.subset, "frame_times": frames.times}
                yield Row(key, stored, frames.images, safe_path(key, row.get("video")))


def read_annotations(
    source: str, subset: str
) -> tuple[dict[str, list[tuple[str, dict[str, Any]]]], Counter[str]]:
    """(path of a video -> keyed rows about it, rows that cannot be used by reason)."""
    import datasets

    from casa_train.data.schemas.conversation import safe_path
    from casa_train.data.schemas.rows import BadRow

    rows: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    skips: Counter[str] = Counter()
    builder = datasets.load_dataset_builder(**load_arguments(source, subset))
    for split, files in builder.config.data_files.items():
        for number, file in enumerate(files):
            stream = datasets.load_dataset(
                "json", data_files={"train": [file]}, split="train", streaming=True
            )

            def damaged() -> None:
                skips["damaged_annotations"] += 1

            for position, row in enumerate(until_damage(stream, source, damaged)):
                key = f"{slug(subset)}-{slug(str(split))}-{number:02d}-{position:07d}"
                try:
                    path = safe_path(key, row.get("video"))
                except BadRow as error:
                    skips[error.reason] += 1
                    continue
                columns = {name: row[name] for name in COLUMNS if name in row}
                rows.setdefault(path, []).append((key, columns))
    return rows, skips


def video_jobs(
    source: str,
    subset: str,
    rows: Mapping[str, list[tuple[str, dict[str, Any]]]],
    skips: Mapping[str, int],
) -> Iterator[Job]:
    """Jobs over the videos in the tars, then over extracted ones, then what was missing."""
    left = dict(rows)
    missing = Counter(skips)
    batch: list[tuple[bytes | str, tuple[tuple[str, dict[str, Any]], ...]]] = []
    samples = size = 0

    def job() -> VideoJob:
        first, last = batch[0][1][0][0], batch[-1][1][-1][0]
        return VideoJob(f"{subset}: {first} to {last}", subset, tuple(batch))

    for video, about in _videos(source, subset, left, missing):
        batch.append((video, tuple(about)))
        samples += len(about)
        size += len(video) if isinstance(video, bytes) else 0
        if samples >= JOB_SAMPLES or size >= JOB_BYTES:
            yield job()
            batch.clear()
            samples = size = 0
    if batch:
        yield job()
    missing["missing_video"] += sum(map(len, left.values()))
    yield Skips(f"{subset}: missing", +missing)


def _videos(
    source: str,
    subset: str,
    left: dict[str, list[tuple[str, dict[str, Any]]]],
    missing: Counter[str],
) -> Iterator[tuple[bytes | str, list[tuple[str, dict[str, Any]]]]]:
    """Videos with the rows about them, which leave `left`; `missing` counts damaged tars."""
    tars = files_matching(source, f"{_escape(subset)}/*.tar*")
    for tar in sorted(tars, key=_natural):
        try:
            for name, video in _members(tar, left, missing):
                yield video, left.pop(name)
        except (tarfile.TarError, EOFError, zlib.error, OSError):
            missing["cut_tar"] += 1  # the rest of its videos stays in `left`
    if is_local(source):
        for name in list(left):
            for path in (Path(base_path(source), subset, name), Path(base_path(source), name)):
                if path.is_file() and path.stat().st_size <= LARGEST_VIDEO:
                    yield str(path), left.pop(name)
                    break


def _members(
    tar: str, left: Mapping[str, Any], missing: Counter[str]
) -> Iterator[tuple[str, bytes]]:
    """(path of a video, its bytes) of the members that rows are about, in the tar's order."""
    import fsspec

    with fsspec.open(tar, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        for member in archive:
            name = str(PurePosixPath(member.name))  # "./a/b" is "a/b"
            if not member.isfile() or name not in left:
                continue
            if member.size > LARGEST_VIDEO:
                missing["video_too_large"] += 1
                continue
            content = archive.extractfile(member)
            assert content is not None
            data = content.read()
            if len(data) != member.size:
                raise EOFError(f"{tar} ends within {name}")
            yield name, data


def _natural(name: str) -> list[Any]:
    """Sorts videos_2 before videos_10."""
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def _escape(subset: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", subset)
