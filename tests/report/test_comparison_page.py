"""The page of a comparison: whole and escaped, its drawings, inference costs and attention, and
the command.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.report import __main__ as report
from casa_train.report.ability_attention import attention_over_time, gate_of, gate_rows
from casa_train.report.comparison import Comparison, compare
from casa_train.report.comparison_page import write_comparison
from casa_train.report.comparison_plots import apart, curve, looks
from casa_train.report.jobs import read_sweep
from casa_train.report.streaming_costs import read_streaming
from tests.helpers.once import once
from tests.helpers.report_pages import HOSTILE, Page
from tests.helpers.sweep_jobs import config_of, skilled, write_job, write_lines

ABILITIES = ("newest", "text_between", "read <i>$x$")
SEEDS = (0, 1, 2)
# Of answers by ability and layer, at the end; before, half of it.
SHARES = {"newest": (0.4, 0.6), "text_between": (0.1, 0.3), "read <i>$x$": (0.5, 0.7)}


def seen(seed: int, text: float = 1.0) -> Callable[[int], dict[str, Any]]:
    """What validations record of attention.

    :param text: of the answers to questions about text, as a multiple.
    """

    def at(step: int) -> dict[str, Any]:
        def classes(name: str) -> dict[str, Any]:
            scale = (text if name == "text_between" else 1.0) * (1.0 if step > 10 else 0.5)
            answer = [scale * share + 0.01 * seed for share in SHARES[name]]
            gist = None if name == "text_between" else [0.2, 0.25]
            return {"question": [0.3, 0.1 * seed], "answer": answer, "gist": gist}

        return {
            "image share": {
                "layers": [1, 3],
                "uniform": 0.45,
                "sources": {
                    f"tasks_{name}": {
                        "samples": 2,
                        "classes": classes(name),
                        "uniform": {"answer": 0.42 if name == "text_between" else 0.46},
                    }
                    for name in SHARES
                },
            }
        }

    return at


def make_sweep(path: Path) -> None:
    skills = {"casa": 1.5, "insertion": 0.2}
    for mechanism, skill in skills.items():
        for seed in SEEDS:
            write_job(
                path / f"s,fusion={mechanism},seed={seed}",
                config_of(f"fusion={mechanism}"),
                seed,
                skilled({f"tasks_{name}": skill for name in ABILITIES}, seed, questions=40),
                cost=1.0 if mechanism == "casa" else 1.5,
                attention=seen(seed) if mechanism == "casa" else None,
            )


@pytest.fixture
def sweep(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Path:
    shutil.copytree(once(tmp_path_factory, "page_sweep", make_sweep), tmp_path / "sweep")
    return tmp_path / "sweep"


def compared(sweep: Path, match: str = "flops") -> Comparison:
    return compare(read_sweep(sweep), sweep, match)


# --------------------------------------------------------------------------------------- the page


def test_the_page_is_whole_escaped_and_deterministic(sweep: Path) -> None:
    html = write_comparison(sweep, "*", "flops")[1].read_text()
    page = Page(html)
    assert not page.all("script") and not page.all("img") and not page.all("link")
    assert "default-src 'none'" in html and "<i>$x$" not in html
    drawn = [svg["aria-label"] for svg in page.all("svg") if svg.get("role") == "img"]
    assert drawn[:4] == [
        "Difference from insertion",
        "All abilities against training tokens",
        "All abilities against training FLOPs",
        "All abilities against training time",
    ]
    assert "newest: casa by step" in drawn and len(drawn) == len(set(drawn)) == 10
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids))
    assert "casa" in page.text and "seeds 0, 1, 2, step 30" in page.text
    assert "seeds 0, 1, 2, step 20" in page.text  # insertion, which does more work a step
    assert "python -m casa_train.bench streaming --sweep" in page.text
    assert write_comparison(sweep, "*", "flops")[1].read_text() == html
    found = json.loads((sweep / "comparison.json").read_text())
    assert found["limit"] == 30e9 and "decay" in found["problems"][0]
    assert found["problems"][0] in page.text


def test_every_cell_tells_where_it_is_from(sweep: Path) -> None:
    page = Page(write_comparison(sweep, "*", "flops")[1].read_text())
    titles = [cell["title"] for cell in page.all("td") if cell.get("title")]
    assert len(titles) == 2 * 4
    assert all("step 20" in title for title in titles[:4]) and "insertion, newest" in titles[1]
    assert "against insertion, over seeds +" in titles[5] and "p < 0.001 corrected" in titles[5]
    widths = [cell["style"] for cell in page.all("td") if cell.get("title")]
    mean = compared(sweep).cells["insertion", "newest"].mean
    assert widths[1] == f"--v: {100 * mean:.1f}%"


def test_names_of_others_are_text(sweep: Path) -> None:
    starts = {"start": 1, "time": 1.0, "host": HOSTILE, "device": "cpu"}
    for path in sweep.glob("*casa*"):
        (path / "starts.jsonl").write_text(json.dumps(starts) + "\n")
    for path in sweep.glob("*insertion*"):
        (path / "starts.jsonl").write_text(json.dumps({**starts, "host": "b"}) + "\n")
    shutil.copytree(sweep / "s,fusion=casa,seed=0", sweep / "s,<script>alert(1)<")
    lines, path = write_comparison(sweep, "*", "seconds")
    page = Page(path.read_text())
    assert "<script>" not in path.read_text() and HOSTILE in page.text
    assert any("s,<script>alert(1)< counts" in line for line in lines)


def test_the_command_prints_the_table_and_says_what_is_wrong(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--sweep", str(sweep), "--match", "seconds"]
    assert report.main([*arguments, "--baseline", "casa", "--only", "s,*"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == f"report {sweep / 'comparison.html'}"
    assert (sweep / "comparison.md").read_text() in shown + "\n"
    table = [line for line in shown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[:7]}) == 1
    assert [cell.strip() for cell in table[0].split("|")][1:4] == ["ability", "casa", "insertion"]
    assert "To know:" in shown and not (sweep / "sweep.html").exists()
    assert report.main([*arguments, "--baseline", "mamba"]) == 2
    assert "'casa', 'insertion'" in capsys.readouterr().err
    assert report.main(["--sweep", str(sweep)]) == 0  # without --match as ever
    assert (sweep / "sweep.html").exists()
    for wrong in (["--match", "flops", str(sweep)], ["--sweep", "x", "--baseline", "casa"]):
        with pytest.raises(SystemExit):
            report.main(wrong)


# ---------------------------------------------------------------------------------------- drawings


def test_curves_are_means_between_the_lowest_and_highest_seed(sweep: Path) -> None:
    result = compared(sweep)
    (casa,) = (v for v in result.variants if v.label == "casa")
    found = curve(result, casa, "flops", "newest")
    assert found is not None
    x, mean, low, high = found
    assert x.tolist() == [10e9, 20e9, 30e9]
    last = [100 * result.share(trial.readings[-1], "newest") for trial in casa.trials]
    assert (mean[-1], low[-1], high[-1]) == pytest.approx((np.mean(last), min(last), max(last)))
    assert curve(result, casa, "seconds", "newest") is not None
    for reading in casa.trials[0].readings:
        reading.amounts["seconds"] = float("nan")
    assert curve(result, casa, "seconds", "newest") is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=14).map(sorted))
def test_labels_lie_apart_and_near_their_lines(values: list[float]) -> None:
    places = apart(values, 6.0, 0.0, 100.0)
    assert all(b - a >= 6 - 1e-6 for a, b in pairwise(places))
    assert min(places) >= -1e-6 and max(places) <= 100 + 1e-6
    if all(b - a >= 6 for a, b in pairwise(values)):
        assert places == pytest.approx(values)


def test_each_of_many_variants_has_a_look_of_its_own(sweep: Path) -> None:
    result = compared(sweep)
    for number in range(12):
        result.apart.append(type(result.baseline)(f"v{number}", {}, result.baseline.trials))
    found = looks(result)
    assert len({look.colour for look in found.values()}) == 13  # the palette's twelve, and ink
    assert found["insertion"].variable == "var(--ink)"
    assert found["casa"].dash != found["insertion"].dash == found["v3"].dash


# --------------------------------------------------------------------------------- inference costs


def stream(*images: int, scale: float = 1.0) -> dict[str, Any]:
    """As the benchmark writes it, after so many images."""
    marks = {
        str(n): {
            "first_token": scale * (0.01 + 0.001 * n),
            "tokens_per_second": 200.0 / n,
            "cache_tokens": 5 * n,
            "cache_bytes": 1000 * n,
            "state_bytes": 0,
            "memory_bytes": 9000 + 1000 * n,
            "memory": "weights, cache and state",
            "median_of": 1,
        }
        for n in images
    }
    return {"marks": marks, "turns": [], "first_token": {"first": 1.0, "last": 2.0}}


MACHINE = {"device": "a CPU", "threads": 1, "dtype": "float32", "torch": "2", "transformers": "5"}


def write_streams(sweep: Path, step: int = 30, **streams: Any) -> None:
    named = {f"s,fusion={name}": found for name, found in streams.items()}
    exports = {name: {"seed": 0, "step": step} for name in named}
    content = {"machine": MACHINE, "exports": exports, "streams": named}
    (sweep / "streaming.json").write_text(json.dumps(content))


def test_inference_costs_stand_beside(sweep: Path) -> None:
    seeds = {f"casa,seed={seed}": stream(1, 16, 64, scale=s) for seed, s in ((0, 1.0), (1, 3.0))}
    write_streams(sweep, **seeds, **{"insertion,seed=2": stream(1, 16)})
    result = compared(sweep)
    costs = read_streaming(result, sweep, "python -m measure", pytest.fail)
    assert costs is not None and costs.images == [1, 16, 64]
    assert costs.machine == "a CPU, 1 thread, float32, torch 2"
    assert len(costs.columns) == 5 and costs.memory == "weights, cache and state"
    assert costs.values["casa", "first_token", 16] == pytest.approx(2 * 0.026)  # mean of two
    assert costs.values["casa", "cache_bytes", 64] == 64_000
    assert costs.row("insertion", costs.columns[2])[1:] == ["15.6 KiB", "–"]
    page = Page(write_comparison(sweep, "*", "flops")[1].read_text())
    assert "KV cache" in page.text and "15.6 KiB" in page.text
    assert "bench streaming" not in page.text and "weights, cache and state" in page.text


def test_streams_that_do_not_belong_are_told(sweep: Path) -> None:
    result = compared(sweep)
    said: list[str] = []
    assert read_streaming(result, sweep, "python -m measure", said.append) is None and not said
    (sweep / "streaming.json").write_text('{"machine": {}, "streams"')
    assert read_streaming(result, sweep, "python -m measure", said.append) is None
    assert "cannot be read" in said.pop() and not said
    write_streams(sweep, **{"casa,seed=0": {"marks": {"1": 3}}})
    assert (
        read_streaming(result, sweep, "python -m measure", said.append) is None
        and "TypeError" in said.pop()
    )
    write_streams(sweep, step=20, **{"casa,seed=0": stream(1)})
    assert read_streaming(result, sweep, "python -m measure", said.append) is None
    assert "its export was of step 20, the job came to step 30" in said[0]
    said.clear()
    write_streams(sweep, **{"casa,seed=0": stream(16), "casa,seed=1": stream(16, scale=9.0)})
    export = sweep / "s,fusion=casa,seed=1" / "export"
    export.mkdir()
    (export / "model.safetensors").write_bytes(b"new")
    later = (sweep / "streaming.json").stat().st_mtime + 5
    os.utime(export / "model.safetensors", (later, later))
    costs = read_streaming(result, sweep, "python -m measure", said.append)
    assert costs is not None
    assert costs.values["casa", "first_token", 16] == pytest.approx(0.026)  # seed 0 alone
    changed, missing = said
    assert "not of s,fusion=casa,seed=1 as it is" in changed and "Measure again" in changed
    assert "holds no stream of insertion" in missing
    lines, path = write_comparison(sweep, "*", "flops")
    assert any("holds no stream of insertion" in line for line in lines)
    assert "holds no stream of insertion" in Page(path.read_text()).text


def test_a_page_says_what_is_not_there_yet(sweep: Path) -> None:
    done = len(list(sweep.glob("s,*")))
    whole = Page(write_comparison(sweep, "s,*", "flops")[1].read_text()).text
    assert "not all is told yet" not in whole
    matched = write_comparison(sweep, "s,*", "params")[1].read_text()
    assert "not all is told yet" not in Page(matched).text  # who is told apart is done, too
    assert f"bench streaming --sweep {sweep.resolve()} --only 's,*'" in whole
    assert "Nothing stands here of insertion" in whole  # no attention of it was recorded
    (sweep / "s,fusion=casa,seed=7").mkdir()
    page = Page(write_comparison(sweep, "s,*", "flops")[1].read_text()).text
    assert f"jobs{done}of {done + 1}: not all is told yet" in page


# --------------------------------------------------------------------------------------- attention


def test_attention_is_told_by_ability_class_and_layer(sweep: Path) -> None:
    (over,) = attention_over_time(compared(sweep))
    assert (over.variant.label, over.quantity) == ("casa", "image share")
    assert over.layers == [1, 3] and over.steps == [10, 20, 30]
    assert over.uniform == {"newest": 0.46, "text_between": 0.42, "read <i>$x$": 0.46}
    assert over.values["newest", "answer"].shape == (3, 3, 2)
    assert ("text_between", "gist") not in over.values and ("newest", "gist") in over.values
    assert over.values["text_between", "question"][:, 0, 1] == pytest.approx([0, 0.1, 0.2])
    layers = dict(over.by_layer("answer"))
    at = over.abilities.index("newest")
    assert layers[3][at] == pytest.approx(0.6 + 0.01)
    assert dict(over.by_layer("gist"))[1][over.abilities.index("text_between")] is None


def test_that_the_gate_closes_is_said_where_it_carries(sweep: Path) -> None:
    (over,) = attention_over_time(compared(sweep))

    def finding() -> str:
        gate = gate_of(over)
        assert gate is not None
        return gate.finding

    gate = gate_of(over)
    assert gate is not None and gate.equal == pytest.approx((0.42, 0.46))
    assert (gate.step, gate.text, gate.others) == (30, pytest.approx(0.21), pytest.approx(0.56))
    (row,) = gate_rows([gate])
    assert row == [
        *("30", "21.0 %", "42.0 %", "56.0 %", "46.0 %", "−35.0", "−35.0 to −35.0"),
        "closes",
    ]
    # No further down than equal attention would be.
    over.uniform["text_between"] = 0.05
    assert finding() == "not shown to close"
    over.uniform["text_between"] = 0.42
    over.values["text_between", "answer"][:, -1] = [[0.1], [0.5], [0.9]]
    assert finding() == "not shown to close"
    over.values["text_between", "answer"][:, -1] += 0.9
    assert finding() == "not shown to close"
    over.values["text_between", "answer"][:, -1] = [[0.9], [0.91], [0.92]]
    assert finding() == "further open"
    over.uniform.clear()
    (row,) = gate_rows([g for g in [gate_of(over)] if g])
    assert row[2] == row[4] == "–"
    for key, values in over.values.items():
        over.values[key] = values[:1]
    assert finding() == "one seed: nothing is claimed"
    del over.values["text_between", "answer"]
    assert gate_of(over) is None


def test_the_gates_stand_on_the_page_and_beside_it(sweep: Path) -> None:
    lines, page = write_comparison(sweep, "*", "flops")
    text = "".join(Page(page.read_text()).text.split())
    assert "21.0%42.0%56.0%46.0%−35.0−35.0to−35.0closes" in text
    assert any("|21.0%|42.0%|56.0%|46.0%|−35.0|" in "".join(line.split()) for line in lines)
    (gate,) = json.loads((sweep / "comparison.json").read_text())["attention"]
    assert gate["variant"] == "casa" and gate["text_answers"] == pytest.approx(0.21)


@pytest.mark.parametrize(
    "found",
    [
        None,
        {"layers": [1], "uniform": None, "sources": {}},
        {"layers": [1], "uniform": 0.4, "sources": {"tasks_newest": {"samples": 0}}},
        {
            "layers": [1],
            "uniform": 0.4,
            "sources": {"tasks_newest": {"classes": {"answer": [None], "gist": None}}},
        },
    ],
)
def test_attention_of_which_nothing_is_known_has_no_section(sweep: Path, found: Any) -> None:
    for seed in SEEDS:
        path = sweep / f"s,fusion=casa,seed={seed}" / "validation.jsonl"
        records = [{**r, "attention": {"image share": found}} for r in read_metrics(path)]
        write_lines(path, records)
    assert not attention_over_time(compared(sweep))
    _, page = write_comparison(sweep, "*", "flops")
    assert "Attention to images" not in Page(page.read_text()).text
