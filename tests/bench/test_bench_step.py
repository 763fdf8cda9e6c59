"""`python -m casa_train.bench step` at its smallest: what it counts, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from casa_train.bench.__main__ import main
from casa_train.bench._benchmark import machine
from casa_train.bench.step import _table
from tests.helpers.commands import ROOT, TINY, run

SMALL = [o for o in TINY if not o.startswith(("trainer.", "data.workers"))]


def bench(tmp_path: Path, *arguments: str, processes: int = 1) -> tuple[dict[str, Any], str]:
    out = tmp_path / "numbers.json"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, "-m", "casa_train.bench", "step", *arguments, "--json", str(out)]
    printed = run(command).stdout
    found: dict[str, Any] = json.loads(out.read_text())
    return found, printed


@pytest.mark.slow
def test_experiments_stand_side_by_side(tmp_path: Path) -> None:
    arms = ["demo", "demo,fusion=insertion,data.packs_per_step=4"]
    few = ["--steps", "2", "--warm-up", "1", "--profile", str(tmp_path / "traces")]
    found, printed = bench(tmp_path, *arms, *few, "--set", *SMALL, processes=2)
    casa, insertion = found["results"]
    assert [casa["experiment"], insertion["experiment"]] == arms
    assert found["ranks"] == 2 and printed.count("text tokens/s") == 1  # one rank speaks
    for arm, micro_steps in ((casa, 1), (insertion, 2)):
        assert arm["micro_steps"] == micro_steps
        assert arm["text_tokens"] == 2 * micro_steps * 160  # over both ranks
        assert 0 < arm["image_tokens"] <= 2 * micro_steps * 64
        assert math.isfinite(arm["loss"])
        assert arm["fastest_seconds"] <= arm["seconds"] <= arm["slowest_seconds"]
        # A median of the steps' speeds, which for two steps is not that of their median.
        fastest = arm["text_tokens"] / arm["fastest_seconds"]
        slowest = arm["text_tokens"] / arm["slowest_seconds"]
        assert arm["text_tokens_per_second"] == pytest.approx((fastest + slowest) / 2)
        work = arm["operations_per_pack"] * micro_steps
        share = arm["tflops"] / arm["text_tokens_per_second"]
        assert share == pytest.approx(work / 1e12 / arm["text_tokens"])
        assert arm["peak_bytes"] > 4 * 4 * arm["parameters"]  # masters, two moments, gradients
    assert casa["parameters"] > insertion["parameters"]
    assert casa["mfu"] is None  # of no use on a CPU
    ratio = insertion["seconds"] / casa["seconds"]
    row = next(line for line in printed.splitlines() if line.startswith("seconds a step"))
    assert float(row.split()[-1]) == pytest.approx(ratio, abs=0.006)
    for arm, layers, blocks in ((casa, 2, 2), (insertion, 2, 2)):
        assert len(arm["parts"]) == 2  # ranks
        for rank in arm["parts"]:
            assert rank["micro_steps"] == arm["micro_steps"]
            assert rank["calls"]["decoder"] == layers * arm["micro_steps"]
            assert rank["calls"]["vision, trained"] == (blocks + 1) * arm["micro_steps"]
            assert {"reduction", "update", "decoder, backward"} < set(rank["milliseconds"])
        trace = json.loads((tmp_path / "traces" / f"{arm['experiment']}.trace.json").read_text())
        names = {event["name"] for event in trace["traceEvents"]}
        assert {"decoder", "backward", "update"} < names
    assert ["fusion" in arm["parts"][0]["calls"] for arm in (casa, insertion)] == [True, False]
    assert printed.count("slowest rank") == 2 and printed.count("\nstep, ") == 2


@pytest.mark.slow
def test_what_was_measured_before_one_failed_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    few = ["--steps", "1", "--warm-up", "0", "--json", str(out), "--set", *SMALL]
    words = ["step", "demo,data.packs_per_step=3", "demo,fusion=insertion", *few]
    code = f"""
import sys
from casa_train.bench import _arm
from casa_train.bench.__main__ import main
from casa_train.errors import UserError
build = _arm.Arm._build
def refuse(arm, *given, **more):
    if arm.name.endswith("insertion"):
        raise UserError("no room for " + arm.name)
    return build(arm, *given, **more)
_arm.Arm._build = refuse
sys.exit(main({words!r}))
"""
    done = run([sys.executable, "-c", code], check=False)
    assert done.returncode == 2 and not done.stdout
    said = done.stderr.splitlines()
    assert said[-1] == "error: no room for demo,fusion=insertion"
    (row,) = json.loads(out.read_text())["results"]
    assert row["experiment"] == "demo,data.packs_per_step=3" and row["micro_steps"] == 3
    seconds = f"{row['seconds']:.3f} s a step, {row['peak_bytes'] / 2**30:.2f} GiB at the peak"
    assert f"demo,data.packs_per_step=3: {seconds}" in said


@pytest.mark.slow
def test_eager_and_compiled_blocks_stand_side_by_side(tmp_path: Path) -> None:
    few = ["--steps", "1", "--warm-up", "1", "--compile"]
    found, printed = bench(tmp_path, "demo", *few, "--set", *SMALL)
    eager, compiled = found["results"]
    assert [eager["experiment"], compiled["experiment"]] == ["demo", "demo, compiled"]
    assert eager["graphs"] == 0 and compiled["graphs"] >= 5
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    took = f"{compiled['graphs']} graphs compiled in {compiled['compile_seconds']:.1f} s"
    notes = [line for line in printed.splitlines() if "micro-step" in line]
    assert [took in line for line in notes] == [False, True]


@pytest.mark.gpu
@pytest.mark.slow
def test_full_size_on_a_gpu(tmp_path: Path) -> None:
    """Helium1-2B at a quarter of its budgets, so that 80 GB hold its optimiser too."""
    small = ["data.text_tokens=512", "data.image_tokens=5120"]
    few = ["--warm-up", "1", "--steps", "2"]
    command = [sys.executable, "-m", "casa_train.bench", "step", *few, "--set", *small]
    out = tmp_path / "numbers.json"
    subprocess.run([*command, "--json", str(out)], cwd=ROOT, check=True)
    arms = json.loads(out.read_text())["results"]
    assert len(arms) == 2
    for arm in arms:
        assert 0.05 < arm["mfu"] < 1 and arm["peak_bytes"] < 80 << 30


def test_more_than_two_experiments_stand_below_each_other() -> None:
    results = [
        {"experiment": name, "text_tokens": 8, "image_tokens": 4, "mfu": None, "seconds": seconds}
        | dict.fromkeys(("text_tokens_per_second", "image_tokens_per_second"), 10.0)
        | {"operations_per_pack": 1e9, "tflops": 1.0, "peak_bytes": 1 << 29, "parameters": 2e6}
        for name, seconds in (("demo", 0.5), ("demo,a=b", 1.0), ("demo,a=c", 0.25))
    ]
    arms = [SimpleNamespace(name=r["experiment"], micro_steps=1, notes=["noted"]) for r in results]
    facts = machine(torch.device("cpu"), torch.float32)
    lines = _table(arms, results, facts, world=1).splitlines()  # type: ignore[arg-type]
    assert [line.split()[0] for line in lines[:4]] == ["time", "demo", "demo,a=b", "demo,a=c"]
    assert [line.split()[1] for line in lines[1:4]] == ["1.00", "2.00", "0.50"]
    assert max(map(len, lines[:4])) < 90 and "MFU" not in lines[0]
    assert any(line.startswith("demo,a=c: 1 micro-step") and "noted" in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "no_such"),
        (["demo", "--steps", "0"], "--steps is 0; it must be at least 1"),
        (["demo", "--dtype", "bf16"], "--dtype is 'bf16'; expected none"),
        (["demo", "--set", "data.no_such=1"], "no_such"),
        (["demo", "--profile", "/dev/null/x"], "--profile /dev/null/x: it cannot be made"),
        (
            ["demo", "--set", "data.packs_per_step=10", "planned_ranks=4"],
            "is 10, which planned_ranks=4",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["step", *arguments]) == 2
    assert message in capsys.readouterr().err
