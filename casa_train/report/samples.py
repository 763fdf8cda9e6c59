"""Sample answers with their pictures: which are shown, and as what."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from casa_train.pages import pictures
from casa_train.report.run_data import RunData

SAMPLES = 24  # rows of the table of answers
PICTURES = 16  # of a question, the last ones


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
    """The chosen answers with their pictures."""
    if run.evaluation is None:
        return []
    return [
        {
            **answer,
            "pictures": pictures_of(run, answer["id"]),
            "same": answer["answer"] == answer["blind_answer"],
        }
        for answer in choose_answers(run.evaluation["answers"])
    ]


def pictures_of(run: RunData, id: str) -> list[str | None]:
    """Data URIs of the pictures of a question; None stands for an unreadable one.

    Of many the last ones, behind a word on how many came before.
    """
    every = run.pictures.get(id, [])
    found = [pictures.of_file(data) for data in every[-PICTURES:]]
    earlier = [f"{len(every) - PICTURES} images before"] if len(every) > PICTURES else []
    return [*earlier, *(picture and picture[0] for picture in found)]


def _shuffle_key(answer: Mapping[str, Any]) -> str:
    text = f"{answer['id']}\n{answer['question']}"
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
