"""Runs made up for the report, and a reader of its pages."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from casa_train.report.run_data import RunData
from casa_train.report.run_page import write_report

VOID = {"meta", "img", "br", "input", "wbr"}
HOSTILE = "<script>alert('x')</script> & \"quoted\" <img src=http://example.org/x.png>"


class Page(HTMLParser):
    """Collects elements and checks that tags are balanced."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def fake_record(step: int, **changes: Any) -> dict[str, Any]:
    seconds = 30.0 if step == 1 else 1.0 + 0.1 * math.sin(step)
    return {
        "step": step,
        "loss": 0.5 + 5 * math.exp(-step / 10),
        "gradient_norm": 0.4 + 1 / step,
        **new_fields(step, seconds),
        "rates": {"fusion": 1e-4 * min(1, step / 5), "backbone": 1e-4 * min(1, step / 5)},
        "answer_tokens": 100,
        "text_tokens": 1000,
        "image_tokens": 5000,
        "samples": 12,
        "samples_digest": "0123456789abcdef",
        "bad_samples": 0,
        "fill_text": 0.98,
        "fill_image": 0.7,
        "seconds": seconds,
        "data_seconds": 0.1,
        "text_tokens_per_second": 1000 / seconds,
        "image_tokens_per_second": 5000 / seconds,
        **changes,
    }


def new_fields(step: int, seconds: float) -> dict[str, Any]:
    """What records of early runs lack; the run is started again after step 20."""
    start = 1 if step <= 20 else 2
    return {
        "start": start,
        "time": 1.7e9 + step + 3600 * start,
        "rank_seconds_min": 0.3,
        "rank_seconds_max": 0.4,
        "slowest_rank": 5 if step % 4 else 0,
        "operations": 4 * 10**12,
        "tflops": 2 / seconds,
        "mfu": 0.4 / seconds,
        "balance": 0.9,
        "memory_bytes": 40 << 30,
        "memory_peak_bytes": 61 << 30,
        "pack_efficiency": 0.99,
    }


def early_record(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in new_fields(1, 1.0)}


def fake_answers(sources: dict[str, tuple[int, int]]) -> list[dict[str, Any]]:
    """Answers by source: so many right, so many wrong."""
    return [
        {
            "id": f"{source}-{i}",
            "source": source,
            "question": f"What is {i}?",
            "reference": "red",
            "answer": "red" if i < right else "blue",
            "blind_answer": "green",
            "correct": i < right,
        }
        for source, (right, wrong) in sources.items()
        for i in range(right + wrong)
    ]


def fake_evaluation(answers: list[dict[str, Any]]) -> dict[str, Any]:
    scores = {"exact_match": 0.875, "blind": 0.25, "guess": 0.3125, "questions": 1200}
    families = {name: dict(scores) for name in dict.fromkeys(a["source"] for a in answers)}
    return {"export": "step_40", **scores, "families": families, "answers": answers}


def fake_run(**changes: Any) -> RunData:
    fields: dict[str, Any] = {
        "name": "fake",
        "metrics": [fake_record(step) for step in range(1, 41)],
        "config_yaml": "name: fake\nseed: 7\n",
        "environment": {"packages": {"torch": "9.9"}, "gpu": None, "command": ["train", "a b"]},
        "evaluation": None,
        "pictures": {},
        "quarantine": [],
        **changes,
    }
    return RunData(**fields)


def page_of(run: RunData, tmp_path: Path) -> tuple[str, Page]:
    path = tmp_path / "new" / "report.html"
    write_report(run, path)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)
