"""The page of the data: it shows the batches themselves, names what is left out and escapes."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from casa_train.data.materialize import Materializer, PackedBatch
from casa_train.data.prepared.plan import Pack, slowest_rank
from casa_train.data.prepared.shards import Split
from casa_train.data.tokens import load_tokenizer, save_tokenizer
from casa_train.errors import UserError
from casa_train.inspect.__main__ import main
from casa_train.inspect.packs import TokenTexts, _tokens, side_for, view_packs
from casa_train.inspect.pages import Target, find_sample, find_target, open_data
from casa_train.inspect.statistics import view_plan
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.windows import split_windows
from casa_train.pages import pictures
from casa_train.report import histograms
from casa_train.report.drawing import Plot
from data_recipes.__main__ import main as recipes
from tests.helpers import data_stream
from tests.helpers.commands import TEMPLATE, on_data
from tests.helpers.counting import writer_for
from tests.helpers.published import live_line
from tests.helpers.report_pages import HOSTILE, Page

BUDGETS = ["data.text_tokens=200", "data.image_tokens=24"]


def picture(width: int, height: int, colour: str = "teal") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def row(*turns: tuple[str, str]) -> dict[str, object]:
    texts = [{"user": question, "assistant": answer} for question, answer in turns]
    return {"texts": texts, "source": f"odd {HOSTILE}"}


@pytest.fixture(scope="module")
def odd(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of what goes wrong: hostile texts, a broken image, samples over the budgets."""
    tokenizer = load_tokenizer(str(data_dir / "tokenizer"))
    root = tmp_path_factory.mktemp("odd")
    tokenizer.save_pretrained(root / "tokenizer")
    writer = writer_for(CasaProcessor(tokenizer, template=TEMPLATE), root / "train")
    whole = picture(60, 60, "gold") + b"\0" * 400
    rows = [
        ("hostile", row((f"{HOSTILE} 東京\n\x07?", HOSTILE)), [picture(56, 56)]),
        ("many", row(("<image>a<image><image> b", "yes"), ("and?", "no")), [picture(30, 50)] * 3),
        ("text", row(("What comes after seven?", "eight")), []),
        ("broken", row(("What is this?", "nothing")), [whole[:60]]),
        ("long", row(("Why? " * 300, "because")), [picture(28, 28)]),
        ("large", row(("See?", "yes")), [picture(84, 84)] * 3),
    ]
    for key, record, images in rows:
        assert writer.write(key, record, images), key
    assert writer.close() == len(rows)
    return root / "train"


def look(tmp_path: Path, *arguments: str) -> tuple[str, Page]:
    out = tmp_path / "page.html"
    assert main([*arguments, "--out", str(out)]) == 0
    html = out.read_text(encoding="utf-8")
    return html, Page(html)


def batches(target: Target, chosen: list[int]) -> tuple[Materializer, list[PackedBatch]]:
    """The batches that training gets, made without the page's code."""
    planner, _, materializer = open_data(target.config)
    packs = list(itertools.islice(planner, max(chosen) + 1))
    return materializer, [materializer[packs[i]] for i in chosen]


def tokens_of(html: str) -> list[tuple[set[str], int]]:
    """Classes and id of every token of the packs, in order."""
    found = re.findall(r'<i class="(t[ a-z]*)" title="id (\d+)', html)
    return [(set(classes.split()), int(number)) for classes, number in found]


def test_the_page_shows_what_the_batches_hold(odd: Path, tmp_path: Path) -> None:
    arguments = [str(odd), *BUDGETS]
    html, page = look(tmp_path, *arguments, "--packs", "3", "--first", "2")
    materializer, expected = batches(find_target(str(odd), None, BUDGETS), [2, 3, 4])
    texts = TokenTexts(materializer.processor.tokenizer)

    shown = tokens_of(html)
    assert [token for _, token in shown] == [
        token for batch in expected for token in batch.inputs.input_ids.tolist()
    ]
    learned = [token for classes, token in shown if "a" in classes]
    assert learned == [token for batch in expected for token in batch.targets.tolist()]
    assert all(("s" in classes) == (token in texts.special) for classes, token in shown)
    assert not any("x" in classes for classes, _ in shown)  # no target differs from the text

    windows = [w for batch in expected for w in split_windows(batch.inputs.chunks)]
    drawn = [d for d in page.all("div") if "data-window" in d]
    assert len(drawn) == len(windows)
    coloured = [" w " in f"{d['class']} " for d in drawn]
    assert coloured == [not window.continues for window in windows]
    places = [m.start() for m in re.finditer(r"data-window=", html)] + [len(html)]
    for window, start, stop in zip(windows, places, places[1:], strict=False):
        count = len(tokens_of(html[start:stop]))
        assert count == window.text[1] - window.text[0]

    images = [i for i in page.all("img") if str(i["alt"]).endswith("of the pack")]
    assert len(images) == sum(len(batch.inputs.images) for batch in expected)
    fills = [f"{100 * fill:.1f} %" for batch in expected for fill in batch.fills]
    assert all(f"<b>{fill}</b>" in html for fill in fills)


def test_a_split_is_shown_with_the_template_it_was_counted_with(odd: Path, tmp_path: Path) -> None:
    template = {**TEMPLATE, "user_start": "<|user|>\n"}
    command = ["retokenize", "--data", str(odd.parent), "--out", str(tmp_path), "--workers", "1"]
    options = ["--tokenizer", f"{odd.parent}/tokenizer", "--template", json.dumps(template)]
    assert recipes([*command, *options]) == 0
    html, page = look(tmp_path, f"{tmp_path}/train", "data.text_tokens=1000", "--sample", "many")
    ids = [number for _, number in tokens_of(html)]
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    opening = tokenizer.encode("<|bos|><|user|>\n", add_special_tokens=False)
    assert ids[: len(opening)] == opening
    assert repr(template["user_start"]) in page.text and "index_mismatch" not in page.text


def test_a_target_that_is_not_the_text_is_marked(odd: Path) -> None:
    target = find_target(str(odd), None, BUDGETS)
    materializer, (batch,) = batches(target, [2])
    batch.targets[0] += 1
    tokens = _tokens(batch, TokenTexts(materializer.processor.tokenizer))
    assert [token.target is not None for token in tokens if token.learned][:2] == [True, False]


def test_a_character_of_several_tokens_stands_at_the_first(odd: Path) -> None:
    texts = TokenTexts(load_tokenizer(str(odd.parent / "tokenizer")))
    tokens = texts.tokenizer.encode("a 東é<|end|>", add_special_tokens=False)
    assert texts.read(tokens) == ["a", " ", "東", "", "", "é", "", "<|end|>"]
    assert texts.read(tokens[:3]) == ["a", " ", texts[tokens[2]]]  # cut inside a character


def test_what_is_left_out_is_named_with_its_reason(odd: Path, tmp_path: Path) -> None:
    html, page = look(tmp_path, str(odd), *BUDGETS, "--packs", "4")
    failures = [tr for tr in page.all("tr") if tr.get("class") == "failure"]
    broken = [a for a in page.all("article") if "failed" in str(a.get("class"))]
    assert failures and len(failures) == len(broken)
    assert all(str(a["data-sample"]).endswith("/broken") for a in broken)
    assert "unreadable_image" in page.text
    target = find_target(str(odd), None, BUDGETS)
    planner, _, _ = open_data(target.config)
    assert list(planner.dropped().values()) == [(2, 6)]
    assert "/long" in page.text and "199 at most" in page.text
    assert "/large" in page.text and "27 image tokens, 23 at most" in page.text


def test_a_pack_without_an_image_shows_its_dummy(odd: Path) -> None:
    target = find_target(str(odd), None, BUDGETS)
    planner, splits, materializer = open_data(target.config)
    name, number = find_sample(splits, "text")
    length = int(planner.sources[name].text[number])
    (view,) = view_packs([Pack(0, ((name, number, length, 0),), length, 0)], materializer)
    assert [sample.state for sample in view.samples] == ["trained", "dummy"]
    assert view.samples[1].learned == 0 and view.samples[1].image_tokens == 1


def test_rates_asked_and_drawn(data_dir: Path, tmp_path: Path) -> None:
    overrides = [
        *on_data(data_dir),
        f"+data.sources.b.path={data_dir}/validation",
        "+data.sources.synthetic.weight=3",
        "+data.sources.b.weight=1",
        "planned_ranks=2",
    ]
    html, page = look(tmp_path, "demo", *overrides, "--packs", "1")
    rows = re.findall(r'<tr data-source="(\w+)">(.*?)</tr>', html, re.DOTALL)
    rates = {name: re.findall(r'class="rate">([\d.]+) %', cells) for name, cells in rows}
    assert {name: asked for name, (asked, _) in rates.items()} == {"synthetic": "75.0", "b": "25.0"}
    for asked, drawn in rates.values():
        assert abs(float(asked) - float(drawn)) < 0.5
    # 24 samples asked for one in four: many epochs; counted on the plan itself.
    planner, _, _ = open_data(find_target("demo", None, overrides).config)
    packs = list(itertools.islice(planner, 1024))
    numbers = [item[1] for pack in packs for item in pack.items if item[0] == "b"]
    (cells,) = [cells for name, cells in rows if name == "b"]
    counts = re.findall(r'class="number">([\d,.]+)', cells)
    assert counts[0] == f"{len(numbers):,}" and counts[1] == "24"
    assert int(counts[3]) == max(np.bincount(numbers))
    assert "2 ranks, planned_ranks" in page.text and "rank 0" in page.text
    (ratio,) = re.findall(r"<b>([\d.]+)</b><small>2 ranks", html)
    loads = np.array([pack.image_tokens for pack in packs])
    assert ratio == f"{slowest_rank(loads, 2):.3f}"


def test_rates_are_shares_of_a_modality(data_dir: Path) -> None:
    (loader,) = data_stream.loaders(data_dir, 1, 0)
    planner = loader.planner
    packs = list(itertools.islice(planner, 4 * planner.block_packs))
    view = view_plan(packs, planner, loader.materializer.splits, world=4)
    assert view.video == 0.25
    rows = {row.name: row for row in view.sources}
    assert rows["film"].asked == rows["film"].drawn == 1.0
    assert rows["six"].asked == pytest.approx(6 / 7) == 1 - rows["plain"].asked
    assert rows["six"].drawn == pytest.approx(6 / 7, abs=0.03)
    assert sum(sum(row.shares) for row in view.sources) == pytest.approx(3)
    assert [balance.world for balance in view.balance if balance.chosen] == [4]


def test_nothing_of_the_data_is_markup_and_nothing_is_loaded(odd: Path, tmp_path: Path) -> None:
    for arguments in (["--packs", "6"], ["--sample", "hostile"]):
        html, page = look(tmp_path, str(odd), *BUDGETS, *arguments)
        assert "<script" not in html.lower() and "<img src=http" not in html
        assert "&lt;script&gt;" in html
        assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object"}
        for _, attributes in page.elements:
            for name, value in attributes.items():
                assert not name.startswith("on")
                if name in ("src", "href"):
                    assert str(value).startswith(("#", "data:image/jpeg;base64,"))
        assert all(url.startswith("#") for url in re.findall(r"url\(([^)]*)\)", html))
        assert "@import" not in html
        (policy,) = [m["content"] for m in page.all("meta") if "http-equiv" in m]
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
        assert "\x07" not in html and "␇" in html


def test_one_sample_before_and_after(odd: Path, tmp_path: Path) -> None:
    html, page = look(tmp_path, str(odd), *BUDGETS, "--sample", f"odd {HOSTILE}/many")
    assert "PNG 30×50 RGB" in page.text  # as stored; the next as the model reads it
    assert html.count("<figcaption>56×84<br>6 tokens") == 3  # data.min_pixels
    assert len([d for d in page.all("div") if " w " in f"{d.get('class')} "]) == 2
    _, page = look(tmp_path, str(odd), *BUDGETS, "--sample", "broken")
    assert "unreadable_image" in page.text
    _, page = look(tmp_path, str(odd), *BUDGETS, "--sample", "large")  # fits no pack, is shown
    assert len([i for i in page.all("img") if str(i["alt"]).endswith("of the pack")]) == 3


def test_what_the_budgets_leave_of_a_sample_is_said(
    odd: Path, data_dir: Path, tmp_path: Path
) -> None:
    _, page = look(tmp_path, str(odd), "data.text_tokens=17", "--sample", "many")
    assert re.search(r"trained\s*1 of 2 turns, 3 of 3 images of at most 9 tokens", page.text)

    tokenizer = load_tokenizer(str(data_dir / "tokenizer"))
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    writer = writer_for(
        CasaProcessor(tokenizer, template=TEMPLATE), tmp_path / "train", "live_whisperx"
    )
    words = [[n / 2, n / 2, f"w{n}"] for n in range(12)]
    line, times = live_line("v.mp4", 0, 6, words), [n / 2 for n in range(12)]
    frames = [picture(56, 84)] * 12
    assert writer.write("clip", {"messages": line, "frame_times": times}, frames)
    writer.close()
    _, page = look(tmp_path, f"{tmp_path}/train", "data.text_tokens=70", "--sample", "clip")
    (said,) = re.findall(r"1 of 1 turns, (\d+) of 12 images of at most", page.text)
    pictures_shown = [i for i in page.all("img") if str(i["alt"]).endswith("of the pack")]
    assert 1 < int(said) == len(pictures_shown) < 12


def test_a_run_directory_is_looked_at_with_its_own_configuration(
    data_dir: Path, tmp_path: Path
) -> None:
    config = find_target("demo", None, [*on_data(data_dir), "data.text_tokens=300"]).config
    (tmp_path / "run").mkdir()
    OmegaConf.save(OmegaConf.structured(config), tmp_path / "run" / "config.yaml")
    found = find_target(str(tmp_path / "run"), None, ["data.image_tokens=99"])
    assert found.run and found.config.data.text_tokens == 300
    assert found.config.data.image_tokens == 99
    assert main([str(tmp_path / "run"), "data.imgae_tokens=99", "--out", "/dev/null"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a prepared split"),
        (["{data}"], "It holds the splits .*train"),
        (["demo", "data.imgae_tokens=3"], "imgae_tokens"),
        (["{data}/train", "--sample", "x/nothing"], "no such sample"),
        (["{data}/train", "--experiment", "nothing"], "nothing"),
        (["demo", "--experiment", "demo"], "--experiment says"),
        (["{data}/train", "--out", "{data}/summary.json/page.html"], "cannot be written"),
        (["{data}/train", "data.text_tokens=3"], "fits a pack"),
        (["{data}/train", "planned_ranks=3"], "planned_ranks=3 does not divide"),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    arguments: list[str], message: str, data_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(data=data_dir) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1 and re.search(message, captured.err)


def test_one_key_in_two_sources_is_ambiguous(data_dir: Path) -> None:
    splits = {name: Split(data_dir / "validation") for name in ("a", "b")}
    key = splits["a"].key(3)
    with pytest.raises(UserError, match="2 samples have this key: a/"):
        find_sample(splits, key)
    assert find_sample(splits, f"b/{key}") == ("b", 3)


def test_the_slowest_rank() -> None:
    assert slowest_rank(np.array([4, 4, 2, 2, 9]), 2) == 1.0  # the last has no partner
    assert slowest_rank(np.array([4, 0, 0, 4]), 2) == 2.0
    assert slowest_rank(np.array([3, 1]), 1) == 1.0
    assert slowest_rank(np.zeros(4), 2) == 1.0


BAR = (
    r'<g><title>(.*?)</title><path d="([^"]*)"(?: clip-path="[^"]*")? '
    r'style="fill:([^;"]*)(?:;opacity:([\d.]+))?"'
)


def bars(plot: Plot | None) -> list[tuple[str, float, float, str]]:
    """Title, upper edge, height and colour of every bar of a drawing, in its units downwards."""
    assert plot is not None
    found = []
    for title, path, colour, _ in re.findall(BAR, str(plot.svg)):
        ys = [float(y) for y in re.findall(r"[ML] ?[\d.]+ ([\d.]+)", path)]
        found.append((title, min(ys), max(ys) - min(ys), colour))
    return found


def test_histograms_count_every_value_once() -> None:
    generator = np.random.default_rng(0)
    for values in (generator.integers(0, 5, 99), generator.lognormal(5, 2, 999).astype(int)):
        drawn = bars(histograms.histogram("x", [values[:40], values[40:]]))
        totals = {
            title: int(re.findall(r": ([\d,]+) \(", title)[0].replace(",", ""))
            for title, *_ in drawn
        }
        assert sum(totals.values()) == len(values)
        assert len({title.partition(":")[0] for title in totals}) == len(totals)
        # Bars stand on each other, and their heights are what they count.
        heights = {title: sum(h for t, _, h, _ in drawn if t == title) for title in totals}
        scale = sum(heights.values()) / len(values)
        for title, total in totals.items():
            assert heights[title] == pytest.approx(scale * total, abs=0.05)
        feet = {title: max(y + h for t, y, h, _ in drawn if t == title) for title in totals}
        assert max(feet.values()) - min(feet.values()) < 0.05
        for colour, own in (("var(--s0)", values[:40]), ("var(--s1)", values[40:])):
            total = sum(h for *_, h, c in drawn if c == colour)
            assert total == pytest.approx(scale * len(own), abs=0.5)
    assert histograms.histogram("x", [np.zeros(0)]) is None


def test_the_longest_values_share_the_last_bar() -> None:
    values = np.array([*range(100)] * 10 + [5000])
    plot = histograms.histogram("x", [values])
    titles = [title for title, *_ in bars(plot)]
    assert titles[0] == "0 to 4: 50 (5.0 %)" and titles[-1] == "95 and more: 51 (5.1 %)"
    assert plot is not None and ">≥95</text>" in plot.svg
    assert plot.note == "median 50, mean 54.4, most 5k"


def test_shares_are_drawn_from_nothing_to_all() -> None:
    drawn = bars(histograms.shares("x", np.array([0.0, 0.51, 0.52, 1.0])))
    assert [title for title, *_ in drawn] == [
        "0.0 % to 2.5 %: 1 (25.0 %)",
        "50.0 % to 52.5 %: 2 (50.0 %)",
        "97.5 % to 100.0 %: 1 (25.0 %)",
    ]


def test_sizes_of_images_are_a_map() -> None:
    plot = histograms.sizes("x", np.array([28, 28, 900]), np.array([28, 28, 30]))
    assert plot is not None
    found = re.findall(BAR, str(plot.svg))
    assert [title.rpartition(" ")[2] for title, *_ in found] == ["2", "1"]
    strengths = [float(strength or 1) for *_, strength in found]
    assert strengths[0] == 1 and strengths[1] == pytest.approx(0.4 + 0.6 / 2**0.5, abs=0.01)
    assert found[0][0] == "27–32 wide, 27–32 high: 2" and "largest 0.027 megapixels" in plot.note
    assert histograms.sizes("x", np.zeros(0), np.zeros(0)) is None


def test_many_pictures_get_small() -> None:
    assert side_for(10) == pictures.SIDE
    assert 24 <= side_for(2000) < 40
    assert pictures.of_file(b"no picture") is None
