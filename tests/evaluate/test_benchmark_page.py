"""The page of benchmarks: complete, self-contained, escaped, no larger than it may be."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks import page as pages
from casa_train.evaluate.benchmarks.page import choose, verdict, write_page
from casa_train.modeling.image_sources import ImageError
from tests.helpers.bad_images import encoded, exif, grey16, noise, plain
from tests.helpers.report_pages import HOSTILE, Page

BROKEN = f"</script></style></textarea>--> {HOSTILE} {{{{ 7 * 7 }}}} ' onload=x"


def _record(index: int, score: float | None = 1.0, **changes: Any) -> dict[str, Any]:
    """A record of an answer; without a score one of a picture that could not be read."""
    record = {
        "id": f"id-{index}",
        "index": index,
        "question": f"How many in {index}?",
        "prompt": f"How many in {index}?\nAnswer with one word.",
        "reference": ["seven"],
        "options": [],
        "category": "human_test",
    }
    told = {"error": "a PNG without its end"} if score is None else {"answer": "7", "score": score}
    return {**record, **told, **changes}


def _result(*names: str, **changes: Any) -> dict[str, Any]:
    scores = {name: 41.25 + i for i, name in enumerate(names)}
    return {
        "export": "runs/mine/export",
        "step": 31_000,
        "protocol": "casa",
        "max_pixels": 504 * 504,
        "dtype": "bf16",
        "weights_sha256": {"model.safetensors": "ab" * 32},
        "table": [
            {"model": "this export", "published": False, "scores": scores},
            {"model": "Other-2B, 2025", "published": True, "scores": {names[0]: 12.0}},
        ],
        "benchmarks": {
            name: {
                "score": scores[name],
                "sub_scores": {"human": 30.5, "augmented": 52.0},
                "questions": 2_345,
                "unreadable": 3,
                "published": 2_500,
                "source": f"someone/{name}",
                "split": "testdev",
                "revision": "f00d" * 10,
                "seconds": 12.5,
                "batch_size": 12,
                "versions": {"transformers": "5.11.0"},
            }
            for name in names
        },
        **changes,
    }


def _each(name: str, index: int, question: str) -> bytes:
    """Another picture for every question."""
    return encoded(plain(colour=(index % 256, index // 256, len(name)), size=(56, 84)))


def _page(
    tmp_path: Path,
    answers: dict[str, list[dict[str, Any]]],
    picture: pages.Picture = _each,
    shown: int = 200,
    **changes: Any,
) -> tuple[str, Page]:
    path = tmp_path / "new" / "benchmarks.html"
    write_page(path, _result(*answers, **changes), answers, picture, shown)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def _asked(page: Page) -> list[dict[str, str | None]]:
    return [a for tag, a in page.elements if tag == "div" and a.get("class") == "asked"]


def _jpegs(page: Page) -> list[Image.Image]:
    heads = [str(image["src"]).partition(",") for image in page.all("img")]
    assert all(head == "data:image/jpeg;base64" for head, _, _ in heads)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for _, _, data in heads]


# ------------------------------------------------------------------------------------ what it shows


def test_scores_stand_beside_published_ones_and_questions_below(tmp_path: Path) -> None:
    answers = {
        "chartqa": [_record(0), _record(1, 0.0, category="augmented_test"), _record(2, 0.6)],
        "mme": [_record(0, category="count"), _record(1, None, category="OCR")],
    }
    html, page = _page(tmp_path, answers)
    text = " ".join(page.text.split())
    for shown in (
        *(
            "scored of published",
            "2,342/2,500",
            "runs/mine/export",
            "31,000",
            "casa",
            "254,016 pixels",
            "ChartQA",
            "MME",
            "this export",
        ),
        *("Other-2B, 2025", "someone/chartqa, testdev", "f00d" * 10, "5.11.0", "ab" * 32),
        *("3 questions: all of chartqa.jsonl. Here: 1 right, 1 partly right, 1 wrong.",),
        *("2 questions: all of mme.jsonl. Here: 1 right, 1 unreadable.", "partly right 0.60"),
        *("How many in 0? Answer with one word.", "a PNG without its end"),
    ):
        assert shown in text, shown
    rows = re.findall(r"<tr.*?</tr>", html, re.DOTALL)
    cells = [re.findall(r'<td class="number">([^<]*)</td>', row) for row in rows[1:3]]
    assert cells == [["41.2", "42"], ["12.0", "–"]]  # MME's are points, and one is not published
    assert re.search(r'<tr class="own"><th scope="row">this export', rows[1])
    assert "own" not in rows[2]
    marks = [(one["data-verdict"], one["data-category"]) for one in _asked(page)]
    assert marks == [
        ("right", "human_test"),
        ("wrong", "augmented_test"),
        ("partly", "human_test"),
        ("right", "count"),
        ("unreadable", "OCR"),
    ]
    assert html == _page(tmp_path, answers)[0]


def test_scores_that_are_missing_leave_a_dash(tmp_path: Path) -> None:
    result = _result("gqa", "ocrbench")
    result["benchmarks"]["gqa"] |= {"score": math.nan, "sub_scores": None, "revision": None}
    result["benchmarks"]["ocrbench"] |= {"score": 740.0, "sub_scores": {"Scene": None}}
    result["step"] = None
    result["table"][0]["scores"] = {"gqa": math.nan, "ocrbench": 740.0}
    write_page(tmp_path / "page.html", result, {"ocrbench": []}, _each)
    html = (tmp_path / "page.html").read_text()
    assert not re.search(r"\b(nan|None)\b", Page(html).text)
    assert '<td class="number">–</td><td class="number">740</td>' in html
    assert not Page(html).all("article") and 'section class="benchmark"' not in html


def test_references_are_told_apart_and_counted(tmp_path: Path) -> None:
    own = _record(4, 0.3, reference=["nokia"] * 8 + ["toshiba", "nokia 7"], answer="toshiba")
    choice = _record(5, options=["egg", "pupa", "imago"], reference=["B. pupa"], answer="B")
    html, page = _page(tmp_path, {"textvqa": [own], "ai2d": [choice]})
    parts = re.search(r'<dd class="references">(.*?)</dd>', html, re.DOTALL)
    assert parts is not None
    assert re.findall(r">([^<\n]+)<", parts[1]) == ["nokia", "×8", "toshiba", "nokia 7"]
    assert [a for tag, a in page.elements if tag == "ol"] == [{"type": "A"}]
    listed = re.findall(r"<li>\s*<div[^>]*>([^<]*)</div>", html)
    assert listed == ["egg", "pupa", "imago"]


def test_long_texts_are_folded_huge_ones_cut_and_breaks_kept(tmp_path: Path) -> None:
    many = "line\r\n" * 30
    records = [
        _record(0, answer="two\r\nlines\nkept"),
        _record(1, answer="word " * 100),
        _record(2, answer=many, question="x" * 9_999),
        _record(3, answer=" \n"),
        _record(4, answer="أربعون (40)", question="a\ud800b"),
    ]
    html, page = _page(tmp_path, {"docvqa": records})
    assert ">two\nlines\nkept</div>" in html
    folded = re.findall(r'<details class="folded.*?</details>', html, re.DOTALL)
    assert len(folded) == 3
    assert f'<span class="head" dir="auto">{("word " * 100)[: pages.HEAD]}…' in folded[0]
    assert f'<div dir="auto">{("word " * 100).strip()}</div>' in folded[0]
    assert "x" * pages.LONGEST + "…</div>" in folded[1] and "it has 9,999 characters" in folded[1]
    assert html.count("x" * pages.LONGEST) == 1 and html.count("x" * (pages.LONGEST + 1)) == 0
    assert "\n".join(["line"] * 30) + "</div>" in folded[2] and "it has" not in folded[2]
    assert html.count("(empty)") == 1
    assert "a?b" in page.text and "␍" not in html
    directed = [a for _, a in page.elements if "data-text" in a and a.get("dir") != "auto"]
    assert [a["class"] for a in directed] == ["folded ", "folded question", "folded "]


# ------------------------------------------------------------------------ which questions it shows


def test_half_of_the_shown_are_right_and_spread_evenly() -> None:
    records = [_record(i, float(i % 4 != 0)) for i in range(1_000)]
    chosen = choose(records, 40)
    assert Counter(verdict(r) for r in chosen) == {"right": 20, "wrong": 20}
    assert choose(list(reversed(records)), 40) == chosen
    indices = [r["index"] for r in chosen]
    assert indices == sorted(indices)
    for kind, step in (("right", 50), ("wrong", 50)):
        own = [r["index"] for r in chosen if verdict(r) == kind]
        assert {b - a for a, b in zip(own, own[1:], strict=False)} <= set(range(step - 4, step + 5))
        assert own[0] < step and own[-1] >= 1_000 - step


@pytest.mark.parametrize(
    ("right", "other", "shown", "expected"),
    [(90, 3, 40, (37, 3)), (2, 90, 41, (2, 39)), (50, 50, 7, (3, 4)), (3, 4, 40, (3, 4))]
    + [(5, 5, 0, (0, 0)), (0, 0, 9, (0, 0)), (0, 30, 9, (0, 9)), (30, 0, 9, (9, 0))],
)
def test_where_one_half_is_short_the_other_takes_its_place(
    right: int, other: int, shown: int, expected: tuple[int, int]
) -> None:
    scores = [1.0] * right + [None if i % 3 == 0 else 0.5 * (i % 2) for i in range(other)]
    chosen = choose([_record(i, score) for i, score in enumerate(scores)], shown)
    good = sum(verdict(record) == "right" for record in chosen)
    assert (good, len(chosen) - good) == expected
    assert len({record["index"] for record in chosen}) == len(chosen)


def test_the_page_says_how_many_it_leaves_out(tmp_path: Path) -> None:
    answers = {"gqa": [_record(i, float(i % 3 == 0)) for i in range(1_200)]}
    _, page = _page(tmp_path, answers, shown=30)
    text = " ".join(page.text.split())
    assert "30 of 1,200; all are in gqa.jsonl." in text and "Here: 15 right, 15 wrong." in text
    assert len(_asked(page)) == len(page.all("img")) == 30


# ------------------------------------------------------------------------------------- its pictures


def test_questions_about_one_picture_share_it(tmp_path: Path) -> None:
    shared = {(name, i): _each(name, i // 3, "") for name in ("mme", "gqa") for i in range(7)}
    answers = {name: [_record(i, float(i % 2)) for i in range(7)] for name in ("mme", "gqa")}
    html, page = _page(tmp_path, answers, lambda name, index, question: shared[name, index])
    assert len(page.all("img")) == len(page.all("article")) == 6 and len(_asked(page)) == 14
    articles = re.findall(r"<article.*?</article>", html, re.DOTALL)
    asked = [re.findall(r"How many in (\d)\?", article) for article in articles]
    assert asked == 2 * [["0", "1", "2"], ["3", "4", "5"], ["6"]]


def test_pictures_of_any_kind_are_small_jpegs_as_the_model_gets_them(tmp_path: Path) -> None:
    transparent = plain("RGBA", (200, 0, 0, 0), (300, 200))
    kinds = [
        encoded(noise(40, 30).resize((4000, 3000)), "JPEG", quality=60),
        encoded(transparent),
        encoded(grey16(40_000)),
        encoded(plain("CMYK", (0, 255, 255, 0), (90, 60)), "JPEG"),
        encoded(plain("RGB", 9, (80, 40)), "JPEG", exif=exif(6)),
        encoded(plain("1", 1, (2000, 90))),
    ]
    answers = {"infovqa": [_record(i) for i in range(len(kinds))]}
    _, page = _page(tmp_path, answers, lambda name, index, question: kinds[index])
    shown = _jpegs(page)
    assert [image.mode for image in shown] == ["RGB"] * len(kinds)
    assert [image.size for image in shown[:1]] == [(448, 336)]
    assert all(max(image.size) <= 448 for image in shown) and max(shown[5].size) == 448
    assert shown[1].getpixel((5, 5)) == (255, 255, 255)
    assert shown[2].getpixel((5, 5)) == (156,) * 3  # 40,000 of 65,535
    red = shown[3].getpixel((5, 5))
    assert isinstance(red, tuple) and red[0] > 200 and max(red[1:]) < 60
    assert shown[4].size[0] < shown[4].size[1]  # upright


def test_a_picture_that_cannot_be_read_is_said_on_its_card(tmp_path: Path) -> None:
    def picture(name: str, index: int, question: str) -> bytes:
        if index == 1:
            raise OSError(f"parquet file {BROKEN} is gone")
        if index == 2:
            raise ImageError("unreadable_image", "row 2 has no picture")
        if index == 3:
            return b"no picture at all"
        return encoded(noise(300, 200))[: 400 if index == 4 else None]

    answers = {"gqa": [_record(i, None if i == 4 else 1.0) for i in range(6)]}
    html, page = _page(tmp_path, answers, picture)
    assert len(page.all("img")) == 1 and len(_asked(page)) == 6  # of the first and the last
    assert page.text.count("(unreadable picture)") == 4 and page.text.count("(not asked)") == 1
    assert "is gone" in page.text and "row 2 has no picture" in page.text
    assert "cannot be read as any of JPEG" in page.text and "a PNG without its end" in page.text
    assert len(page.all("script")) == 1 and "<img src=http" not in html


def test_the_page_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def picture(name: str, index: int, question: str) -> bytes:
        return encoded(noise(448, 300 + index), "PPM")

    answers = {name: [_record(i) for i in range(6)] for name in ("docvqa", "gqa")}
    html, page = _page(tmp_path, answers, picture)
    free = sum(len(str(image["src"])) for image in page.all("img"))
    assert free > 1_500_000  # noise is the worst that a picture can be
    monkeypatch.setattr(pages, "ROOM", 120_000)
    small, page = _page(tmp_path, answers, picture)
    assert len(page.all("img")) == 12 and len(_jpegs(page)) == 12
    assert 60_000 < sum(len(str(image["src"])) for image in page.all("img")) < 165_000
    # What remains is the same text, 1.6 kB a question at most; of 9 x 200 with full pictures:
    text = len(re.sub('src="[^"]*"', "", small)) - 40_000
    assert text < 12 * 1_600
    monkeypatch.undo()
    assert pages.ROOM * 4 / 3 + 9 * 200 * 1_600 + 40_000 < 30_000_000


# ----------------------------------------------------------------------------- safe, and for itself


def test_untrusted_text_is_escaped_everywhere(tmp_path: Path) -> None:
    record = _record(0, 0.5, options=[BROKEN], reference=[BROKEN, BROKEN])
    record |= dict.fromkeys(("id", "question", "prompt", "category", "answer"), BROKEN)
    result = _result("chartqa", export=BROKEN, protocol=BROKEN)
    result["weights_sha256"] = {BROKEN: BROKEN}
    result["table"][1]["model"] = BROKEN
    own: dict[str, Any] = dict.fromkeys(("source", "split", "revision"), BROKEN)
    own["versions"] = {BROKEN: BROKEN}
    result["benchmarks"] = {
        BROKEN: {**result["benchmarks"]["chartqa"], **own, "sub_scores": {BROKEN: 1.0}}
    }
    unread = _record(1, None, error=BROKEN, category=BROKEN)
    path = tmp_path / "page.html"
    write_page(path, result, {BROKEN: [record, unread]}, _each)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert html.lower().count("<script") == html.lower().count("</script") == 1
    assert len(page.all("script")) == 1 and len(page.all("img")) == 2 and "49" not in page.text
    assert page.text.count(BROKEN) >= 20
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
    asked = _asked(page)
    assert [one["data-category"] for one in asked] == [BROKEN] * 2
    assert [one["value"] for one in page.all("option")][1] == BROKEN


def test_nothing_is_loaded_and_only_the_pages_own_script_runs(tmp_path: Path) -> None:
    answers = {"chartqa": [_record(i) for i in range(3)]}
    html, page = _page(tmp_path, answers)
    assert "http:" not in html and "https:" not in html and "url(" not in html
    assert not {tag for tag, _ in page.elements} & {"link", "iframe", "object", "base"}
    for _, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("action", "formaction", "srcset")
            if name in ("src", "href"):
                assert value is not None and value.startswith(("#", "data:image/jpeg;base64,"))
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    expected = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src"
    assert policy == f"{expected} 'sha256-{digest}'"
    for word in ("innerHTML", "eval", "fetch", "XMLHttpRequest", "document.write", "import("):
        assert word not in script
    other, _ = _page(tmp_path, {"mme": [_record(9, 0.0, question="Quite another?")]})
    assert f"<script>{script}</script>" in other  # nothing of the data is in it


def test_what_the_script_looks_for_is_there(tmp_path: Path) -> None:
    answers = {"chartqa": [_record(0), _record(1, 0.0)], "gqa": [_record(0, 0.5)]}
    html, page = _page(tmp_path, answers)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    ids = {a["id"] for _, a in page.elements if "id" in a}
    sought = set(re.findall(r'getElementById\("(\w+)"\)', script))
    assert sought == {"filter", "none", "questions"} and sought <= ids
    (fields,) = re.findall(r"const \{ (.*) \} = form.elements", script)
    named = [a["name"] for _, a in page.elements if a.get("name") not in (None, "viewport")]
    named.remove("color-scheme")
    assert fields.split(", ") == named == ["benchmark", "verdict", "category", "text"]
    values = [str(option["value"]) for option in page.all("option")]
    assert values == ["", "chartqa", "gqa", "", *pages.VERDICTS, ""]
    assert {str(one["data-verdict"]) for one in _asked(page)} <= set(pages.VERDICTS)
    sections = [a["data-benchmark"] for tag, a in page.elements if "data-benchmark" in a]
    assert sections == ["chartqa", "gqa"]
    links = [str(link["href"]) for link in page.all("a")]
    assert links == ["#benchmark=chartqa", "#benchmark=gqa"]
    # Without a script there is no form that does nothing; every question is there to be seen.
    (form,) = page.all("form")
    assert "hidden" in form and not any("hidden" in one for one in _asked(page))
    assert sum("data-text" in a for _, a in page.elements) == 3 * 3


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/page.html cannot be written"):
        write_page(tmp_path / "file" / "page.html", _result("gqa"), {}, _each)
