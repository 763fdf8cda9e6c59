"""Every mechanism takes the same optimiser step under ZeRO 1, 2 and 3 as in plain torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import run
from tests.helpers.norm_steps import CLIP, STEPS
from tests.helpers.once import once
from tests.helpers.zero_steps import CASES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """All lines of the one launch."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]

    def make(path: Path) -> None:
        done = run([*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.zero_steps"])
        path.write_text(done.stdout)

    lines = once(tmp_path_factory, "zero steps", make).read_text().splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_one_step_under_every_zero_stage_equals_plain_torch(results: list[dict[str, Any]]) -> None:
    results = [r for r in results if "case" in r]
    assert {(r["case"], r["stage"]) for r in results} == {
        (name, stage) for name, case in CASES.items() for stage in case.stages
    }
    wrong = [r for r in results if not r["error"] <= 2e-6]
    assert not wrong, wrong
    # A clip acts as torch's on the norm over all ranks and tensors, and is well exceeded here.
    for r in results:
        assert r["norm"] == pytest.approx(r["plain_norm"], rel=1e-5)
        assert r["norm"] > 2 * CASES[r["case"]].clip
    # The step is large beside the tolerance, in every tensor of every mechanism.
    assert all(r["least_move"] > 1e-5 for r in results), results
    assert all(r["frozen_move"] == 0 for r in results)


def test_gradients_cost_fewer_operations_and_change_nothing_else(
    results: list[dict[str, Any]],
) -> None:
    """Steps of two ranks beside those that DeepSpeed takes left to itself."""
    lines = {r["norms"]: r for r in results if "norms" in r}
    assert len(lines) == 6
    for name, line in lines.items():
        # Stage 1 in bf16 takes norms in fp32, which round.
        assert max(line["apart"]) <= (1e-7 if name == "stage 1, bf16" else 0), name
        for step in STEPS:
            fused, own = line["fused"][step], line["own"][step]
            assert fused["applied"] == own["applied"] and len(set(own["applied"])) == 1, name
            assert fused["norm"] == pytest.approx(own["norm"], rel=2e-7, abs=0), (name, step)
            by_tensor = [
                sum(way["update"].get(kind, 0) for kind in ("linalg_vector_norm", "amax"))
                for way in (fused, own)
            ]
            assert by_tensor[0] <= 3 < 14 < by_tensor[1], (name, step, by_tensor)
            assert sum(fused["update"].values()) < sum(own["update"].values()) - 40
            # Stage 2 copies a gradient neither to fp32 nor back into the bucket.
            fewer = 14 if name == "stage 2, bf16" else -1
            for kind in ("_to_copy", "copy_"):
                assert own["backward"].get(kind, 0) - fused["backward"].get(kind, 0) > fewer
            # Ranks divide before they add, which the numbers of two ranks would not tell.
            divisions = [way["backward"].get("div_", 0) for way in (fused, own)]
            assert divisions[0] == divisions[1], (name, step, divisions)
            # The bucket itself is reduced, not a copy of it.
            copies = [way["backward"].get("cat", 0) for way in (fused, own)]
            in_place = name in ("stage 1, fp32", "stage 2, fp32", "stage 2, bf16")
            assert copies[1] - copies[0] == in_place, (name, step, copies)
        if name == "stage 2, bf16":  # a bucket's gradients join their sums in one call
            calls = [
                line[way]["usual"]["backward"].get("_foreach_add_", 0) for way in ("fused", "own")
            ]
            assert calls[0] > 0 == calls[1]
        applied = {step: line["fused"][step]["applied"][0] for step in STEPS}
        skipped = {step for step in STEPS if not applied[step]}
        # Stage 3 alone adds up in float64 throughout.
        too_large = set() if name.startswith("stage 3") else {"too large for squares"}
        assert skipped == {"not a number on one", "infinite on the other"} | too_large, name
        assert line["fused"]["usual"]["norm"] > CLIP > line["fused"]["below the clip"]["norm"]
