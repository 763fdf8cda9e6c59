"""Benchmarks at their smallest: that they run, count rightly and refuse what they cannot do.

Nothing here asserts a time.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from casa_train.bench.__main__ import benchmarks, main
from casa_train.bench._timing import interleaved, peak_bytes, tensor_bytes
from casa_train.bench.attention import LAYOUTS
from casa_train.bench.images import render
from tests.helpers.bench_numbers import bench

CPU = torch.device("cpu")


def test_attention_compares_equal_results(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench(tmp_path, "attention", "--scale", "0.004", "--repeats", "1", "--device", "cpu")
    rows = found["rows"]
    assert [(row["layout"], row["pass"]) for row in rows] == [
        (layout, direction)
        for layout in ("vision windows", "casa windows", "self-attention")
        for direction in ("forward", "forward + backward")
    ]
    for row in rows:
        assert row["difference"] < 1e-5
        assert row["dense_bytes"] >= row["queries"] * row["keys"]  # its mask, if nothing else
        assert row["linear_bytes"] > 0 and row["linear_seconds"] > 0
    assert "time ratio" in capsys.readouterr().out


def test_images_keep_their_bars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes and pixels are the same on every machine."""
    found = bench(tmp_path, "images", "--images", "1", "--repeats", "1")
    assert found["share_of_bytes"] <= 1 / 8
    assert found["mean_difference"] <= 2
    assert found["images_per_second_and_core"]["ours"] > 0
    assert found["bytes_per_image"]["ours"] == 3 * 812 * 1092
    assert "images/s and core" in capsys.readouterr().out


def test_images_of_files(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(render(1, 300, 200, 90, seed=1)[0])
    found = bench(tmp_path, "images", "--files", str(file), "--repeats", "1")
    assert found["images"] == 1 and found["encoded_bytes"] == file.stat().st_size
    file.write_text("text")
    assert main(["images", "--files", str(file)]) == 2


def test_packing_keeps_its_bars(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Fill and balance are no times: they are the same on every machine."""
    out = tmp_path / "packing.json"
    arguments = ["--samples", "8000", "--steps", "32", "--buffer", "500", "--json", str(out)]
    arguments += ["--sources", "7", "--large-samples", "70000"]
    assert main(["packing", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "3 images : 1 video" in printed
    assert "start with 7 sources, 70,000 samples: lengths" in printed
    found = json.loads(out.read_text())
    started = found.pop("start")
    assert started["lengths_seconds"] > 0 and started["step_milliseconds"] > 0
    assert found["images"]["efficiency"] >= 0.99
    assert found["3 images : 1 video"]["efficiency"] >= 0.98
    for stage in found.values():
        assert stage["slowest"] <= 1.06 < stage["slowest_unsorted"]
        assert stage["next_fit"] < stage["efficiency"]


def test_a_dense_mask_holds_what_segments_hold() -> None:
    """Ratios compare the same attention: every layout's mask has its segments' pairs."""
    for make in LAYOUTS:
        layout = make(0.01, np.random.default_rng(0))
        segments, mask = layout.segments(CPU), layout.mask(CPU)
        assert segments.covers(mask.shape[0]) and mask.any(1).all() and mask.any(0).all()
        pairs = 0
        for q, k in zip(segments.query_lengths, segments.key_lengths, strict=True):
            pairs += q * k - (q * (q - 1) // 2 if layout.causal else 0)
        assert int(mask.sum()) == pairs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["streaming", "--export", "nowhere"], "--export nowhere: config.json is missing"),
        (["streaming", "--image-size", "100"], "--image-size is 100; it must be a positive mult"),
        (["streaming", "--new-tokens", "1"], "--new-tokens is 1; it must be at least 2"),
        (["streaming", "--fps", "nan"], "--fps is nan; expected a number of frames/s above 0"),
        (["streaming", "--fps", "2", "--most", "0"], "--most is 0; it must be at least 1"),
        (["streaming", "--rounds", "9"], "--rounds is 9, but only --fps reads it; leave it out"),
        (["attention", "--scale", "0"], "--scale is 0.0; expected a number above 0"),
        (["attention", "--json", "no/such/folder.json"], "--json no/such/folder.json: the folder"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_says_what_each_benchmark_measures(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    for name, benchmark in benchmarks().items():
        assert f"{name} {benchmark.measures}" in printed


def test_peak_bytes_counts_what_lives_together() -> None:
    def call() -> torch.Tensor:
        first = torch.ones(1000, 1000)
        second = first + 1  # 8 MB live here
        del first
        return second[:1].clone()

    assert 8_000_000 <= peak_bytes(call, CPU) < 8_100_000


def test_tensor_bytes_counts_storages_once() -> None:
    whole = torch.zeros(100, dtype=torch.float64)
    assert tensor_bytes({"a": whole, "b": [whole[:3], (whole.view(10, 10),)]}) == 800
    assert tensor_bytes(whole[:1], torch.zeros(2, dtype=torch.int8), None, "text") == 802


def test_interleaved_calls_take_turns() -> None:
    order: list[str] = []
    times = interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"}, CPU, repeats=2, warm_up=1
    )
    assert order == list("ababab") and set(times) == {"a", "b"}
