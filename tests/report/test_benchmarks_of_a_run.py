"""The report's section about benchmarks that a run was scored on while it trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from casa_train.evaluate.benchmarks.published import PUBLISHED
from casa_train.report.benchmarks import draw_benchmarks
from tests.helpers.benchmark_copies import picture
from tests.helpers.report_pages import HOSTILE, fake_record, fake_run, page_of


def _scored(step: int, score: float | None, digest: str = "now", **more: Any) -> dict[str, Any]:
    answers = [
        {
            "id": f"docvqa/{index}",
            "index": index,
            "question": f"What stands in line {index}?",
            "reference": "total",
            "answer": f"said at {step}",
            "score": points,
        }
        for index, points in ((3, 1.0), (8, 0.62), (11, 0.0))
    ]
    found = {
        "score": score,
        "sub_scores": {},
        "questions": 150,
        "unreadable": 2,
        "over_budget": 0,
        "protocol": "casa",
        "max_new_tokens": 48,
        "revision": "c0ffee",
        "digest": digest,
        "answers": answers,
        **more,
    }
    empty = {"step": step, "questions": [], "best_step": 0, "best_loss": None}
    return {**empty, "benchmarks": {"docvqa": found, "mme": {**found, "answers": []}}}


def test_scores_and_answers_stand_beside_the_published_rows(tmp_path: Path) -> None:
    records = [_scored(step, 20.0 + step) for step in range(1, 31)]
    pictures = {"docvqa/3": [picture("red")], "docvqa/8": [b"no picture"]}
    run = fake_run(validations=records, pictures=pictures, backbone="helium")
    html, page = page_of(run, tmp_path)
    assert "Validation loss" not in page.text  # benchmarks alone
    for row in PUBLISHED:
        beside = row.family in ("helium", "")
        assert (f">{row.name}<" in html) == beside, row.name
        if beside:
            cells = re.search(rf">{re.escape(row.name)}</th>(.*?)</tr>", html)
            assert cells is not None
            figures = [row.figures[name] for name in ("docvqa", "mme")]
            assert re.findall(r"<td>([\d.]+)</td>", cells[1]) == [
                f"{figures[0]:.1f}",
                f"{figures[1]:.0f}",
            ]
    own = re.search(r">this run, step 30</th>(.*?)</tr>", html)
    assert own is not None and own[1] == "<td>50.0</td><td>50</td>"
    assert "150 questions, protocol casa, at most 48 new tokens, revision c0ffee" in page.text
    assert "2 pictures unreadable" in page.text
    table = html[html.index("Answers to benchmarks over time") :]
    assert "at 8 validations of 30" in table
    heads = re.findall(r"step ([\d,]+)<", table)
    assert len(heads) == 8 and heads[0] == "1" and heads[-1] == "30"
    assert table.count("✓") == 8 and table.count("62 %") == 8 and "said at 30" in table
    assert "(unreadable image)" in table and "(no image)" in table
    assert len(page.all("img")) == 1


def test_what_was_asked_otherwise_is_no_part_of_the_curve() -> None:
    metrics = [fake_record(step) for step in range(1, 9)]
    records = [_scored(2, 91.0, "then"), _scored(4, 33.0), _scored(6, None), _scored(8, 35.0)]
    docvqa, mme = draw_benchmarks(records, metrics, PUBLISHED)
    assert (docvqa.title, docvqa.note, mme.note) == ("DocVQA", "percent", "points")
    assert docvqa.svg.count("CASA-Helium1-VL-2B, 2026: 86.3") == 1
    alone = draw_benchmarks(records[1:], metrics, PUBLISHED)[0]
    assert alone.svg == docvqa.svg
    assert draw_benchmarks([_scored(2, None)], metrics, PUBLISHED) == []


@pytest.mark.parametrize("field", ["answer", "question", "reference"])
def test_hostile_answers_are_shown(tmp_path: Path, field: str) -> None:
    record = _scored(4, 1.0)
    record["benchmarks"]["docvqa"]["answers"][0][field] = HOSTILE
    html, page = page_of(fake_run(validations=[record]), tmp_path)
    assert "<script" not in html and "example.org" not in str(page.all("img"))
    assert "Answers to benchmarks over time" in page.text
