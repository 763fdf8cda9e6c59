"""Local copies of published datasets, written from their cards: file layout, columns, oddities."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PIL

RATED = ("relevance", "image_correspondence", "visual_dependency", "formatting")
FINEVISION = Features(
    {
        "images": List(Image()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
        "source": Value("string"),
        **{
            name: value
            for rating in RATED
            for name, value in (
                (f"{rating}_ratings", List(Value("int64"))),
                (f"{rating}_min", Value("int64")),
            )
        },
    }
)
NULL_FILLED = {name: Value("string") for name in ("content", "from", "role", "value")}
FROM_VALUE = {name: Value("string") for name in ("from", "value")}
ROLE_CONTENT = {name: Value("string") for name in ("content", "role")}


def picture(width: int = 40, height: int = 30, kind: str = "PNG", colour: str = "teal") -> bytes:
    buffer = io.BytesIO()
    PIL.new("RGB", (width, height), colour).save(buffer, kind)
    return buffer.getvalue()


def onevision_features(messages: Mapping[str, Any], image: bool = True) -> Features:
    return Features(
        {
            "id": Value("string"),
            "image": Image() if image else Value("null"),
            "conversations": List(dict(messages)),
            "data_source": Value("string"),
        }
    )


def stored(image: bytes | None) -> dict[str, Any] | None:
    return None if image is None else {"bytes": image, "path": None}


def fine_row(number: int, **changes: Any) -> dict[str, Any]:
    """A usual row of FineVision: one image, two turns, ratings."""
    row: dict[str, Any] = {
        "images": [stored(picture(40 + number % 7))],
        "texts": [
            {"user": f"question {number}", "assistant": f"answer {number}"},
            {"user": "and then?", "assistant": "nothing"},
        ],
        "source": "chartqa",
    }
    for rating in RATED:
        row[f"{rating}_ratings"] = [5, 2]
        row[f"{rating}_min"] = 2
    return {**row, **changes}


def parquet_dataset(
    root: Path,
    subsets: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    features: Mapping[str, Features],
    row_group: int = 5,
) -> Path:
    """A dataset of parquet files, SUBSET/train-00000-of-0000N.parquet, with its card.

    :param subsets: name -> rows of each file.
    """
    card = ["---", "configs:"]
    for name, files in subsets.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(files):
            table = pa.Table.from_pylist(list(rows), schema=features[name].arrow_schema)
            path = root / name / f"train-{number:05d}-of-{len(files):05d}.parquet"
            pq.write_table(table, path, row_group_size=row_group)
        card += [
            f"- config_name: {name}",
            "  data_files:",
            "  - split: train",
            f"    path: {name}/train-*",
        ]
    (root / "README.md").write_text("\n".join([*card, "---", ""]))
    return root


def finevision(
    root: Path, files: Sequence[Sequence[Mapping[str, Any]]], name: str = "chartqa"
) -> Path:
    return parquet_dataset(root, {name: files}, {name: FINEVISION})


def damage_row_group(path: Path, group: int) -> None:
    """Overwrites the header of the first page of a row group."""
    column = pq.ParquetFile(path).metadata.row_group(group).column(0)
    offset = column.dictionary_page_offset or column.data_page_offset
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 24)


def video(seconds: float, fps: int = 8, size: tuple[int, int] = (64, 48)) -> bytes:
    """An MP4 whose picture says the time: frame i is grey of value 4 * i, up to 240."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 1_000_000
        for i in range(round(seconds * fps)):
            grey = np.full((size[1], size[0], 3), min(4 * i, 240), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def tar_of(path: Path, members: Mapping[str, bytes]) -> None:
    """A tar.gz as the videos are published."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def llava_video(
    root: Path,
    rows: Sequence[Mapping[str, Any]],
    tars: Sequence[Mapping[str, bytes]],
    subset: str = "0_30_s_academic_v0_1",
) -> Path:
    """LLaVA-Video-178K: SUBSET/*_cap_processed.json and SUBSET/SUBSET_videos_N.tar.gz."""
    (root / subset).mkdir(parents=True)
    (root / subset / f"{subset}_cap_processed.json").write_text(json.dumps(list(rows)))
    for number, members in enumerate(tars, 1):
        tar_of(root / subset / f"{subset}_videos_{number}.tar.gz", members)
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        f"- config_name: {subset}\n"
        "  data_files:\n"
        "  - split: caption\n"
        f"    path: {subset}/*cap*.json\n"
        "- config_name: llava_hound\n"
        "  data_files:\n"
        "  - split: open_ended\n"
        "    path: llava_hound/sharegptvideo_qa_255k_processed.json\n"
        "---\n"
    )
    return root


def video_row(number: int, path: str) -> dict[str, Any]:
    return {
        "id": f"vid{number}",
        "conversations": [
            {"from": "human", "value": "<image>\nPlease describe the video."},
            {"from": "gpt", "value": f"Something grey gets brighter, take {number}."},
        ],
        "data_source": "0_30_s_academic_v0_1",
        "video": path,
    }


def live_line(
    path: str, start: float, end: float, words: Sequence[Any], text: str = "Comment on it."
) -> list[dict[str, Any]]:
    """A line of Live-WhisperX's JSONL."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "video", "video": path, "video_start": start, "video_end": end},
                {"type": "text", "text": text, "previous": "", "title": "A grey wall"},
            ],
        },
        {
            "role": "assistant",
            "content": [{"type": "text_stream", "text_stream": list(words)}],
        },
    ]


def live_whisperx(root: Path, lines: Sequence[Any], videos: Mapping[str, bytes]) -> Path:
    """Live-WhisperX-526K: a JSONL whose last line holds byte offsets, and the videos."""
    for name, data in videos.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    written = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    offsets = [0]
    for line in written[:-1]:
        offsets.append(offsets[-1] + len(line) + 1)
    text = "\n".join([*written, json.dumps(offsets)]) + "\n"
    (root / "live_whisperx_526k_with_seeks.jsonl").write_text(text)
    return root
