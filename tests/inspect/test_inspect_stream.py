"""The page of a stream: the packs that training gets, and what was met on the way to them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from casa_train.data.build import list_streams, open_data
from casa_train.data.processor import build_processor
from casa_train.inspect.__main__ import main
from casa_train.inspect.pages import find_target
from tests.helpers.report_pages import Page
from tests.helpers.stream_data import png, row, write_finevision, write_subset


def overrides(source: Path, data_dir: Path, *more: str) -> list[str]:
    return [
        "data=finevision_stream",
        f"data.stream.datasets.finevision.source={source}",
        "data.stream.datasets.llava_onevision=null",
        f"model.tokenizer={data_dir}/tokenizer",
        "data.text_tokens=120",
        "data.image_tokens=40",
        "data.packs_per_step=6",
        "data.stream.lanes=4",
        "data.stream.open_units=2",
        "data.balance_block=2",
        "data.workers=0",
        *more,
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subsets, and a third one of rows that cannot be used and some that fit no pack."""
    root = write_finevision(tmp_path_factory.mktemp("published") / "fv")
    odd = [row("odd", i) for i in range(8)]
    for i in range(0, 8, 2):
        odd[i]["texts"] = [{"user": "Why? " * 300, "assistant": "so"}]
    for i in (1, 3):
        odd[i]["texts"] = []
    odd[5]["images"] = [{"bytes": b"no picture", "path": None}]
    odd[7]["images"] = [{"bytes": png(28, 28, 7)[:60], "path": None}]  # its header is whole
    write_subset(root, "odd", [odd], group=2)
    return root


def look(tmp_path: Path, *arguments: str) -> tuple[str, Page]:
    out = tmp_path / "page.html"
    assert main([*arguments, "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    return html, Page(html)


@pytest.mark.parametrize(("first", "packs"), [(0, 5), (7, 6)])
def test_the_packs_are_those_that_training_gets(
    source: Path,
    data_dir: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    first: int,
    packs: int,
) -> None:
    chosen = overrides(source, data_dir)
    options = ["--first", str(first), "--packs", str(packs)]
    html, page = look(tmp_path, "demo", *chosen, *options)
    printed = capsys.readouterr()
    config = find_target("demo", None, chosen).config
    streams = list_streams(config, lambda line: None)
    loader = open_data(config, build_processor(config), streams, 1, lambda v: [v]).loader(0)
    batches = [batch for _ in range(3) for batch in loader.next_step()][first : first + packs]

    shown = [int(number) for number in re.findall(r'<i class="t[ a-z]*" title="id (\d+)', html)]
    assert shown == [i for batch in batches for i in batch.inputs.input_ids.tolist()]
    learned = re.findall(r'<i class="t(?: s)? a[ a-z]*" title="id (\d+)', html)
    assert [int(number) for number in learned] == [i for b in batches for i in b.targets.tolist()]
    assert re.findall(r'id="pack-(\d+)"', html) == [str(batch.index) for batch in batches]
    assert "but the batch asks" not in html
    trained = [
        str(a["data-sample"]) for a in page.all("article") if a.get("class") == "sample trained"
    ]
    assert trained == [id for batch in batches for id in batch.sample_ids]

    failures = [tr for tr in page.all("tr") if tr.get("class") == "failure"]
    assert len(failures) == sum(len(batch.failures) for batch in batches)
    rows = re.findall(r'<tr data-source="finevision/(\w+)">(.*?)</tr>', html, re.DOTALL)
    asked = {name: re.findall(r'class="rate">([\d.]+) %', cells)[0] for name, cells in rows}
    assert asked == {"big": "76.3", "odd": "6.8", "small": "16.9"}
    drawn = {name: int(re.findall(r'class="number">([\d,]+)', c)[0]) for name, c in rows}
    assert sum(drawn.values()) == sum(len(batch.sample_ids) for batch in batches)
    assert f"{packs} packs drawn of a stream of 118 rows" in printed.out
    left_out = sum(batch.left_out for batch in batches)
    assert f"{left_out} rows fit no pack" in printed.out
    assert f"reading {packs} packs" in printed.err and "of 4 lanes" in printed.err


@pytest.mark.slow
def test_bad_rows_and_holes_are_named(source: Path, data_dir: Path, tmp_path: Path) -> None:
    only = "+data.stream.datasets.finevision.subsets=[odd]"
    small = ["data.balance_block=2", "data.text_tokens=160"]  # a pack else holds 800 rows
    html, page = look(tmp_path, "demo", *overrides(source, data_dir, only, *small), "--packs", "4")
    failures = re.findall(r'<tr class="failure"><th scope="row">(.*?)</th>.*?wrong">(\w+)<', html)
    file = "odd/train-00000-of-00001"
    assert set(failures) == {
        (f"{file}_1", "no_turns"),
        (f"{file}_3", "no_turns"),
        (f"{file}_5", "unreadable_image"),
        (f"{file}_7", "unreadable_image"),
    }
    failed = [a for a in page.all("article") if a.get("class") == "sample failed"]
    assert failed and {str(a["data-sample"]) for a in failed} == {f"{file}_7"}
    assert "left a hole of" in page.text and "fit no pack" in page.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "x/y"], "streams its data, which has no index to find a sample by"),
        (["planned_ranks=3"], "data.stream.lanes is 4, which 3 ranks do not divide"),
        (["+data.stream.datasets.finevision.subsets=[bigg]"], r"names \['bigg'\]"),
        (["+data.ratings.relevance=3"], "streams do not filter by"),
        (["data.text_tokens=3", "data.stream.open_units=1"], "gave nothing to a pack"),
    ],
)
def test_what_a_user_can_mend_is_named(
    source: Path,
    data_dir: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["demo", *overrides(source, data_dir), *arguments]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and re.search(message, error)
