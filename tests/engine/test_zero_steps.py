"""Every mechanism takes the same optimiser step under ZeRO 1, 2 and 3 as in plain torch."""

from __future__ import annotations

import json
import sys

import pytest

from tests.helpers.commands import run
from tests.helpers.zero_steps import CASES

pytestmark = pytest.mark.slow


def test_one_step_under_every_zero_stage_equals_plain_torch() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run([*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.zero_steps"])
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
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
