"""The stream of samples survives kills, and other numbers of ranks and workers."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment
from tests.helpers.data_stream import G, loaders, read_step

STEPS = 30


@pytest.fixture(scope="module")
def undisturbed(data_dir: Path) -> list[list[list[str]]]:
    """Ids of every pack of thirty steps, one rank, no workers."""
    ranks = loaders(data_dir, 1, 0)
    return [read_step(ranks) for _ in range(STEPS)]


def test_the_stream_keeps_its_rates(undisturbed: list[list[list[str]]]) -> None:
    """Packs of a step are whole, and nothing repeats within an epoch of the plain source."""
    assert all(len(step) == G for step in undisturbed)
    ids = Counter(i for step in undisturbed for pack in step for i in pack)
    assert len(ids) == 24 and max(ids.values()) <= 1.3 * min(ids.values())


@pytest.mark.slow
def test_ranks_and_workers_change_and_the_order_stays(
    data_dir: Path, undisturbed: list[list[list[str]]]
) -> None:
    """2 -> 4 -> 3 -> 1 ranks with 0, 1 and 4 workers; saved again right after every restore."""
    found: list[list[list[str]]] = []
    state = None
    for world, workers, steps in ((2, 0, 5), (4, 1, 4), (3, 0, 7), (1, 4, 4), (2, 1, 3)):
        ranks = loaders(data_dir, world, workers)
        if state is not None:
            for loader in ranks:
                loader.load_state_dict(state)
            again = json.loads(json.dumps(ranks[-1].state_dict()))
            ranks = loaders(data_dir, world, workers)
            for loader in ranks:
                loader.load_state_dict(again)
        found += [read_step(ranks) for _ in range(steps)]
        states = [json.loads(json.dumps(loader.state_dict())) for loader in ranks]
        assert all(s == states[0] for s in states)  # every rank would save the same
        state = states[0]
    assert found == undisturbed[: len(found)]


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(
    data_dir: Path, tmp_path: Path, undisturbed: list[list[list[str]]]
) -> None:
    """Ranks and workers change on the way too; the last commit of every step counts."""
    draw = random.Random(0)
    log = tmp_path / "log.jsonl"
    for attempt in range(11):
        world, workers = draw.choice([1, 2, 3, 4]), draw.choice([0, 1, 2])
        target = STEPS if attempt == 10 else 1000
        arguments = [str(data_dir), str(tmp_path), str(world), str(workers), str(target)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.data_stream", *arguments],
            cwd=ROOT,
            env=environment(),
            start_new_session=True,  # its workers die with it
        )
        if attempt == 10:
            assert process.wait(timeout=200) == 0
            break
        before = len(log.read_text().splitlines()) if log.exists() else 0
        deadline = time.monotonic() + 120
        steps = draw.randint(1, 5)  # a commit comes every third
        while not log.exists() or len(log.read_text().splitlines()) < before + steps:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    records = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    assert len(records) > STEPS  # steps were repeated, so kills lay between commits
    for record in records:
        if record["step"] <= STEPS:
            assert record["packs"] == undisturbed[record["step"] - 1], record["step"]
    assert {r["step"] for r in records} >= set(range(1, STEPS + 1))
