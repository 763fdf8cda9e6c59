"""The page of a run: complete, self-contained, escaped, and drawn from as little as one step."""

from __future__ import annotations

import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from casa_train.errors import UserError
from casa_train.io import numbers as numbers_text
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.pages import html as pages
from casa_train.report import samples, series
from casa_train.report.curves import draw_plots
from casa_train.report.run_page import write_report
from casa_train.report.samples import choose_answers
from tests.helpers.report_pages import (
    HOSTILE,
    early_record,
    fake_answers,
    fake_evaluation,
    fake_record,
    fake_run,
    new_fields,
    page_of,
)


def _picture(size: tuple[int, int], kind: str = "PNG", mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind)
    return file.getvalue()


def _rows(html: str) -> list[list[str]]:
    """The texts of all cells, row by row."""

    def text(cell: str) -> str:
        return " ".join(re.sub("<[^>]*>", " ", cell).split())

    rows = re.findall(r"<tr[ >].*?</tr>", html, re.DOTALL)
    cell = re.compile(r"<t[dh][ >].*?</t[dh]>", re.DOTALL)
    return [[text(found) for found in cell.findall(row)] for row in rows]


def test_a_full_page_shows_everything(tmp_path: Path) -> None:
    answers = fake_answers({"colour": (9, 3), "shape": (8, 0)})
    pictures = {
        answer["id"]: [_picture((300, 150)), _picture((56, 112), "JPEG")] for answer in answers
    }
    bad = [
        {"source": "web", "key": key, "reason": "too_long", "detail": "9 tokens, 8 at most"}
        for key in ("a", "b", "a")
    ]
    run = fake_run(evaluation=fake_evaluation(answers), pictures=pictures, quarantine=bad)
    html, page = page_of(run, tmp_path)

    assert [svg["aria-label"] for svg in page.all("svg")] == [
        "Loss by step",
        "Gradient norm by step",
        "Learning rates by step",
        "Throughput by step",
        "Model FLOPs utilisation by step",
        "Seconds by step",
        "Ranks by step",
        "Memory by step",
        "Pack fill by step",
        "Steps over time",
    ]
    for shown in ("87.5 %", "25.0 %", "31.2 %", "1,200", "step_40", "colour", "shape"):
        assert shown in page.text
    assert "fusion, backbone" in page.text  # one curve for one rate
    assert "1 step above, up to 30 s" in page.text  # the first step does not set the scale
    assert "too_long" in page.text and "9 tokens, 8 at most" in page.text
    assert "seed: 7" in page.text and "packages.torch" in page.text and "train 'a b'" in page.text
    shown_answers = choose_answers(answers)
    assert len(page.all("img")) == 2 * len(shown_answers) == 40
    assert page.all("img")[0]["alt"] == f"image 1 of 2 of sample {shown_answers[0]['id']}"
    assert page.text.count("wrong") == 3 + 1  # and once in the explanation
    assert 'style="width: 87.5%"' in html
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)
        assert "<style" not in svg  # it would apply to the whole page

    again, _ = page_of(run, tmp_path)
    assert again == html


def test_a_run_of_an_early_version_is_shown_as_it_is(tmp_path: Path) -> None:
    _, page = page_of(
        fake_run(metrics=[early_record(fake_record(step)) for step in range(1, 41)]), tmp_path
    )
    assert len(page.all("svg")) == 6
    for absent in ("Starts", "dashed", "MFU", "FLOP/s", "GiB", "Ranks"):
        assert absent not in page.text


def test_restarts_stand_in_every_curve_and_in_a_table(tmp_path: Path) -> None:
    starts: list[dict[str, Any]] = [
        {"start": 1, "time": 1.7e9, "after_step": 0, "host": "n0", "ranks": 8, "device": "H100"},
        {"start": 2, "time": 1.7e9 + 4000, "after_step": 20, "found_step": 23, "ranks": 1},
        {"start": 3, "time": 1.7e9 + 9000, "after_step": 40, "found_step": 40},
    ]
    starts[1] |= {"left": "max_hours", "step": 40, "left_time": 1.7e9 + 4000 + 3 * 3600 + 61}
    starts[2] |= {"left": f"UserError: {HOSTILE}", "step": 40, "left_time": 1.7e9 + 9000.25}
    html, page = page_of(fake_run(starts=starts), tmp_path)
    figures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    dashes = [len(re.findall("stroke-dasharray", figure)) for figure in figures]
    titles = [str(svg["aria-label"]) for svg in page.all("svg")]
    assert dashes == [2 if title.startswith("Throughput") else 1 for title in titles]
    assert "A dashed line stands where the run was started again." in page.text
    assert "in 3 starts" in page.text and "61 GiB" in page.text
    assert "rank 5 in 75.0 % of steps" in page.text
    rows = [row for row in _rows(html) if row[1].endswith(" UTC")]
    began = ["2023-11-14 22:13:20 UTC", "2023-11-14 23:20:00 UTC", "2023-11-15 00:43:20 UTC"]
    killed = "killed, without a word 3 steps repeated by the next start"
    assert rows[0] == ["1", began[0], "n0, 8 ranks, H100", "1", "23", "–", killed]
    assert rows[1][:6] == ["2", began[1], "1 rank", "21", "40", "3 h 1 min"]
    assert rows[1][6] == "its time was up (trainer.max_hours)"
    assert rows[2][:6] == ["3", began[2], "–", "41", "40", "250 ms"]
    assert rows[2][6].endswith("no step was done")
    assert "<script" not in html.lower()
    _, page = page_of(fake_run(starts=starts[:1]), tmp_path)
    assert "still runs, or was killed" in page.text


def test_losses_by_source_are_drawn_and_listed(tmp_path: Path) -> None:
    names = [f"subset_{i}" for i in range(9)] + [HOSTILE]
    metrics = [fake_record(step) for step in range(1, 41)]
    for record in metrics[::10]:
        record["sources"] = {
            name: {"loss": 4.0 / record["step"] + i, "answer_tokens": 100 - i}
            for i, name in enumerate(names)
        }
    metrics[10]["sources"]["subset_0"] = {"loss": math.nan, "answer_tokens": 0}
    html, page = page_of(fake_run(metrics=metrics), tmp_path)
    assert "Loss by source by step" in [svg["aria-label"] for svg in page.all("svg")]
    assert "of those with most answer tokens" in page.text
    assert "Loss by source: 10 sources" in page.text
    assert ["subset_0", "300", "4", "0.129"] in _rows(html)  # one record had none of it
    assert ["subset_1", "396", "5", "1.129"] in _rows(html)  # answer tokens, first and last loss
    assert HOSTILE in page.text and "<script" not in html.lower()
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)


def test_what_was_lost_is_drawn_only_if_something_was(tmp_path: Path) -> None:
    metrics = [fake_record(step, bad_samples=step // 10, left_out=0) for step in range(1, 41)]
    bad = [{"source": "web", "key": "a", "reason": "too_long", "detail": "9 tokens"}]
    _, page = page_of(fake_run(metrics=metrics, quarantine=bad), tmp_path)
    assert "Samples lost by step" in [svg["aria-label"] for svg in page.all("svg")]
    assert "unusable" in page.text and "beyond the budgets" not in page.text
    assert "left 4 holes in packs so far" in page.text


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path) -> None:
    answers = fake_answers({"colour": (2, 2)})
    pictures = {answer["id"]: [_picture((9, 9))] for answer in answers}
    html, page = page_of(fake_run(evaluation=fake_evaluation(answers), pictures=pictures), tmp_path)

    assert "http:" not in html and "https:" not in html and "@import" not in html
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "base"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith(("#", "data:image/jpeg;base64,"))
    urls = re.findall(r"url\(([^)]*)\)", html)
    assert urls and all(url.startswith("#") for url in urls)
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

    # Six drawings share one name space.
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert max(ids.values()) == 1
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', html))
    assert used and used <= set(ids)


def test_untrusted_text_is_escaped_everywhere(tmp_path: Path) -> None:
    answers = fake_answers({HOSTILE: (1, 0)})
    for name in ("id", "question", "reference", "answer", "blind_answer"):
        answers[0][name] = f"{name} {HOSTILE}"
    run = fake_run(
        name=HOSTILE,
        metrics=[{"step": 1, "rates": {HOSTILE: 1e-4, "$x_1$": 1e-5}}],
        config_yaml=HOSTILE,
        environment={HOSTILE: {"deep": HOSTILE}, "command": [HOSTILE]},
        evaluation={**fake_evaluation(answers), "export": HOSTILE},
        pictures={answers[0]["id"]: [_picture((9, 9)), b"no picture"]},
        quarantine=[dict.fromkeys(("source", "key", "reason", "detail"), HOSTILE)],
    )
    html, page = page_of(run, tmp_path)
    assert "<script" not in html.lower()
    assert "<img src=http" not in html
    assert "&lt;script&gt;" in html and "<script>alert('x')</script>" in page.text
    assert "$x_1$" in page.text  # not read as a formula
    assert len(page.all("img")) == 1 and page.text.count("(unreadable image)") == 1


def test_texts_that_no_file_can_hold_or_that_are_endless_are_shown_in_part(tmp_path: Path) -> None:
    answers = fake_answers({"web": (1, 0)})
    answers[0].update(question="a\ud800b", reference="long " * 10_000, answer="  ")
    run = fake_run(metrics=[{"step": 1, "loss": 2.0}], evaluation=fake_evaluation(answers))
    _, page = page_of(run, tmp_path)
    assert "a?b" in page.text
    assert page.text.count("long ") <= pages.LONGEST_TEXT and "…" in page.text
    assert "(empty)" in page.text and "(no image)" in page.text


def test_one_step_is_enough(tmp_path: Path) -> None:
    run = fake_run(metrics=[fake_record(1)], config_yaml="", environment={})
    html, page = page_of(run, tmp_path)
    assert len(page.all("svg")) == 10
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    assert "has not been evaluated" in page.text and page.text.count("Not recorded.") == 2
    for absent in ("Validation samples", "Bad samples", "moving average"):
        assert absent not in page.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("count", [1, 60])
def test_values_that_are_missing_or_not_finite_leave_gaps(count: int, tmp_path: Path) -> None:
    broken = [
        fake_record(
            s,
            **dict.fromkeys(new_fields(1, 1.0)),
            loss=math.nan,
            gradient_norm=math.inf,
            rates={"a": 0.0},
            data_seconds=None,
        )
        for s in range(1, count + 1)
    ]
    for record in broken:
        del record["fill_text"], record["fill_image"]
        record.update(dict.fromkeys(new_fields(1, 1.0)))
    evaluation = fake_evaluation(fake_answers({"colour": (1, 1)}))
    evaluation["families"]["colour"].update(exact_match=math.nan, guess=None)
    html, page = page_of(fake_run(metrics=broken, evaluation=evaluation), tmp_path)
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert labels == ["Learning rates by step", "Throughput by step", "Seconds by step"]
    assert numbers_text.MISSING in page.text


def test_no_metrics_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'fake' has no metrics.*metrics\.jsonl"):
        write_report(fake_run(metrics=[]), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(fake_run(metrics=[{"step": 1}]), tmp_path / "file" / "report.html")


def test_records_from_a_file_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (1, 2, 3, 2)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo', encoding="utf-8")
    _, page = page_of(fake_run(metrics=read_metrics(path)), tmp_path)
    assert "steps3" in page.text.replace("\n", "")


def test_the_choice_covers_every_source_right_and_wrong() -> None:
    answers = fake_answers({"a": (500, 5), "b": (300, 40), "c": (2, 0), "d": (0, 9)})
    chosen = choose_answers(answers)
    assert len(chosen) == samples.SAMPLES
    counts = Counter((answer["source"], answer["correct"]) for answer in chosen)
    assert counts["a", True] == counts["b", True] == 4
    assert counts["a", False] >= 3 and counts["b", False] >= 3
    assert counts["c", True] == 2 and counts["d", False] >= 7
    assert choose_answers(list(reversed(answers))) == chosen
    assert choose_answers(answers[:3]) and choose_answers([]) == []


def test_long_runs_stay_small_and_keep_their_spikes() -> None:
    count = 50_000
    steps, values = np.arange(1.0, count + 1), np.ones(count)
    values[12_345], values[40_000:41_000] = 99.0, np.nan
    thin_steps, thin = series.thin(steps, values)
    assert len(thin) <= series.CURVE_POINTS
    assert thin_steps[np.nanargmax(thin)] == 12_346.0
    assert np.isnan(thin).any()
    smooth_steps, smooth = series.smooth(steps, values)
    assert len(smooth) <= series.CURVE_POINTS and np.nanmax(smooth) == 1.0
    assert smooth_steps[0] == 1.0 and smooth_steps[-1] == count


def test_smoothing_follows_a_steep_start() -> None:
    values = np.linspace(10.0, 0.0, 101)
    _, smooth = series.smooth(np.arange(101.0), values)
    assert smooth[0] == 10.0
    np.testing.assert_allclose(smooth[:90], values[:90])


def test_groups_far_apart_get_a_logarithmic_scale() -> None:
    def note(**rates: float) -> str:
        (plot,) = draw_plots([{"step": step, "rates": rates} for step in (1, 2, 3)])
        return plot.note

    assert "logarithmic" in note(fusion=1e-3, backbone=1e-5)
    assert "logarithmic" not in note(fusion=1e-4, backbone=5e-5)
    assert "logarithmic" not in note(frozen=0.0)
    assert note(_private=1e-4)  # matplotlib keeps such names out of legends


def _validation(step: int, loss: float | None, questions: int = 2, **more: Any) -> dict[str, Any]:
    asked = [
        {
            "id": f"split/{i}",
            "source": "colour",
            "question": f"What is {i}?",
            "reference": "red",
            "answer": f"answer {step}" if i else "red",
            "correct": i == 0,
        }
        for i in range(questions)
    ]
    scores = {"loss": loss, "exact_match": 0.5, "answers": 9, "answer_tokens": 30}
    return {
        "step": step,
        **scores,
        "sources": {"colour": scores, "shape": {**scores, "exact_match": None}},
        "best_step": 20,
        "best_loss": 1.5,
        "questions": asked,
        **more,
    }


def test_answers_over_time_stand_side_by_side(tmp_path: Path) -> None:
    records = [_validation(step, 2.0) for step in range(1, 41)]
    records[3]["questions"] = []  # another set of questions at first
    pictures = {"split/0": [_picture((300, 200))], "split/1": [b"no picture"]}
    html, page = page_of(fake_run(validations=records, pictures=pictures), tmp_path)
    table = html[html.index("over-time") :]
    table = table[table.index("<tbody>") : table.index("</table>")]
    # Eight of forty: the first, the last, the best.
    heads = re.findall(r"step ([\d,]+)<", html)
    assert len(heads) == 8 and heads[0] == "1" and heads[-1] == "40" and "20" in heads
    assert html.count('<span class="tag">best</span>') == 1
    assert table.count("✓") == 8 and table.count("<tr>") == 2
    assert "answer 40" in table and "(unreadable image)" in table
    assert len(page.all("img")) == 1
    assert "Validation loss" in page.text and "Exact match" in page.text


def test_of_many_pictures_the_last_ones_are_shown_and_turns_before_are_counted(
    tmp_path: Path,
) -> None:
    record = _validation(20, 2.0)
    record["questions"][0]["history"] = 3
    answers = fake_answers({"stream": (1, 0)})
    answers[0].update(id="stream/0", history=7)
    evaluation = {**fake_evaluation(answers), "ask": "last"}
    shown = {"stream/0": [_picture((9 + i, 9)) for i in range(19)]}
    shown["split/0"] = shown["stream/0"][:16]
    run = fake_run(validations=[record], evaluation=evaluation, pictures=shown)
    html, page = page_of(run, tmp_path)
    assert html.count("(3 images before)") == 1 and len(page.all("img")) == 32
    assert html.count(" · after 3 turns") == html.count(" · after 7 turns") == 1
    assert "Asked is the last turn" in page.text


def test_a_first_validation_and_hostile_answers_are_shown(tmp_path: Path) -> None:
    record = _validation(1, None, questions=1, best_step=0, best_loss=None)
    record["questions"][0] |= {"answer": HOSTILE, "question": HOSTILE, "source": HOSTILE}
    record["sources"] = {HOSTILE: record["sources"]["colour"], "$x$": record["sources"]["shape"]}
    html, page = page_of(fake_run(metrics=[fake_record(1)], validations=[record]), tmp_path)
    assert "<script" not in html and "example.org" not in str(page.all("img"))
    assert "(no image)" in page.text and "Lowest loss" not in page.text
    html, page = page_of(fake_run(validations=[_validation(10, 1.0, questions=0)]), tmp_path)
    assert "Validation loss" in page.text and "Answers over time" not in page.text
