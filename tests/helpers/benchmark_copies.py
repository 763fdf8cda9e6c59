"""Tiny copies of the nine benchmarks, with the columns and folders of the published ones."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200)}
TYPES = ("Regular Text Recognition", "Key Information Extraction")


def picture(colour: str, width: int = 84, height: int = 56, mark: int = 0) -> bytes:
    """A PNG of one colour; `mark` makes it another file."""
    image = Image.new("RGB", (width, height), COLOURS[colour])
    ImageDraw.Draw(image).rectangle((4, 4, 6 + mark % 20, 8), fill=(255, 255, 255))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def file_of(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def rows_of(name: str, count: int = 6) -> list[dict[str, Any]]:
    """Rows of a benchmark as published; colours are asked for, sizes differ."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        colour = list(COLOURS)[i % 3]
        data = picture(colour, 56 + 28 * (i % 4), 56 + 28 * (i % 2), mark=i)
        row: dict[str, Any] = {"question": f"What colour is picture {i}?", "image": file_of(data)}
        if name == "chartqa":
            row |= {"type": ("human_test", "augmented_test")[i % 2], "answer": colour}
        elif name == "docvqa":
            row |= {
                "questionId": str(49_000 + i),
                "docId": 14 + i,
                "answers": [colour, f"{colour}ish"],
            }
        elif name == "infovqa":
            row |= {
                "questionId": str(65_000 + i),
                "answer_type": ["single span"],
                "answers": [colour],
            }
        elif name == "ocrbench":
            kind, data_set = TYPES[i % 2], ("IIIT5K", "FUNSD")[i % 2]
            row |= {"dataset": data_set, "question_type": kind, "answer": [colour]}
        elif name == "textvqa":
            row |= {"question_id": 34_602 + i, "answers": [colour] * 8 + ["grey"] * 2}
        elif name == "realworldqa":
            row |= {"answer": colour, "image_path": f"{i}.webp"}
        elif name == "ai2d":
            row |= {"options": list(COLOURS), "answer": str(i % 3)}
        elif name == "mme":
            about, shown = list(COLOURS)[i // 2 % 3], list(COLOURS)[(i // 2 + i % 2) % 3]
            row |= {
                "question_id": f"color/{i // 2:04}.png",
                "question": f"Is it {shown}? Please answer yes or no.",
                "answer": "Yes" if about == shown else "No",
                "category": ("color", "code_reasoning")[i // 2 % 2],
                "image": file_of(picture(about, mark=i // 2)),
            }
        rows.append(row)
    return rows


def gqa_rows(count: int = 6) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(instructions, images): two questions a picture."""
    images = [
        {"id": f"n{i}", "image": file_of(picture(list(COLOURS)[i % 3], mark=i))}
        for i in range(-(-count // 2))
    ]
    questions = [
        {
            "id": f"20{i:04}",
            "imageId": f"n{i // 2}",
            "question": f"What colour is the wall {i}?",
            "answer": list(COLOURS)[i // 2 % 3],
        }
        for i in range(count)
    ]
    return questions, images


FOLDERS = {
    "chartqa": ("ChartQA/data", "test"),
    "docvqa": ("DocVQA/DocVQA", "validation"),
    "infovqa": ("DocVQA/InfographicVQA", "validation"),
    "ocrbench": ("OCRBench/data", "test"),
    "textvqa": ("textvqa/data", "validation"),
    "realworldqa": ("RealWorldQA/data", "test"),
    "ai2d": ("ai2d/data", "test"),
    "mme": ("MME/data", "test"),
}


def write_rows(folder: Path, split: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as a parquet file of a split, pictures as the hub's files hold them."""
    import datasets

    table = datasets.Dataset.from_list([dict(row) for row in rows])
    if "image" in table.column_names:
        table = table.cast_column("image", datasets.Image(decode=False))
        table = table.cast_column("image", datasets.Image())
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def write_benchmark(
    copies: Path, name: str, count: int = 6, rows: Sequence[Mapping[str, Any]] | None = None
) -> None:
    """A copy of one benchmark in a folder of copies."""
    if name == "gqa":
        questions, images = gqa_rows(count)
        write_rows(copies / "GQA/testdev_balanced_instructions", "testdev", rows or questions)
        write_rows(copies / "GQA/testdev_balanced_images", "testdev", images)
        return
    folder, split = FOLDERS[name]
    write_rows(copies / folder, split, rows_of(name, count) if rows is None else rows)
