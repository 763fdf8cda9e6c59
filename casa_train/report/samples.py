"""Sample answers with their pictures: which are shown, and as what."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from PIL import Image, features

from casa_train.report.run_data import RunData

SAMPLES = 24  # rows of the table of answers
# Readers of Pillow that start no program, as that of EPS does.
FORMATS = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "PPM"]
if "avif" in features.modules and features.check("avif"):
    FORMATS.append("AVIF")
PICTURE_SIDE = 112  # CSS pixels; twice as many are embedded for dense screens


def choose_answers(answers: Sequence[dict[str, Any]], limit: int = SAMPLES) -> list[dict[str, Any]]:
    """A mixture over all sources, right and wrong in turn; the same for the same answers.

    The order within a source follows a digest, so that questions about one picture do not crowd.
    """
    by_source: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for answer in sorted(answers, key=_shuffle_key):
        wrong_right = by_source.setdefault(str(answer["source"]), ([], []))
        wrong_right[bool(answer["correct"])].append(answer)
    queues = [
        [answer for pair in zip_longest(right, wrong) for answer in pair if answer is not None]
        for _, (wrong, right) in sorted(by_source.items())
    ]
    taken = [answer for row in zip_longest(*queues) for answer in row if answer is not None][:limit]
    return sorted(taken, key=lambda answer: str(answer["source"]))  # stable: sources side by side


def sample_rows(run: RunData) -> list[dict[str, Any]]:
    """The chosen answers with their pictures as data URIs; None stands for an unreadable one."""
    if run.evaluation is None:
        return []
    return [
        {
            **answer,
            "pictures": [thumbnail(data) for data in run.pictures.get(answer["id"], [])],
            "same": answer["answer"] == answer["blind_answer"],
        }
        for answer in choose_answers(run.evaluation["answers"])
    ]


def thumbnail(data: bytes) -> str | None:
    """A small JPEG on white as a data URI; None if the picture cannot be read."""
    side = 2 * PICTURE_SIDE
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.draft("RGB", (side, side))  # a large JPEG is decoded at a fraction of its size
            layered = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    layered.thumbnail((side, side))
    flat = Image.new("RGB", layered.size, "white")
    flat.paste(layered, mask=layered)
    file = io.BytesIO()
    flat.save(file, "JPEG", quality=90, subsampling=0)  # sharp edges: drawings and text are common
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _shuffle_key(answer: Mapping[str, Any]) -> str:
    text = f"{answer['id']}\n{answer['question']}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
