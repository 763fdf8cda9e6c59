"""Kills, damage and full disks: the same command again ends as if nothing had happened.

Real processes and real signals; `tests/helpers/fault_cases.py` has the cases.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.commands import ROOT, environment
from tests.helpers.fault_cases import DAMAGES, DISKS, KILLS
from tests.helpers.small_disk import small_disk

Results = dict[tuple[str, str], dict[str, Any]]


def cases(kinds: str, *paths: Path) -> Results:
    """Runs the cases of some kinds."""
    command = [sys.executable, "-m", "tests.helpers.fault_cases", kinds, *map(str, paths)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line.pop("kind"), line.pop("case")): line for line in lines}


def check_whole(case: str, found: dict[str, Any], *more: str) -> None:
    """Ends like the undisturbed run and leaves no more than it."""
    assert found["weights"] and found["metrics"], (case, found)
    assert found["errors"] == [None, None], (case, found)
    assert found["held"] == sorted(["step_6", "step_8", *more]), (case, found)
    assert found["frozen"], (case, found)  # one file, that of the undisturbed run


@pytest.mark.slow
def test_a_kill_in_any_phase_of_a_save_loses_nothing(tmp_path: Path) -> None:
    results = cases("kill,slow", tmp_path)
    assert results.pop(("undisturbed", ""))["held"] == ["step_6", "step_8"]
    slow = results.pop(("slow", "writer"))
    assert slow["early"] == []  # rank 0 committed nothing while rank 1 was writing
    check_whole("slow writer", slow)
    assert {case for _, case in results} == set(KILLS)
    for (_, case), found in results.items():
        assert found["killed"] and found["other_left"] != "hung", (case, found)
        assert found["resumed_well"], (case, found)
        # A name is given only with the rename, and taken before anything is deleted.
        assert ("step_6" in found["left"]) == (found["resumed"] == 6), (case, found)
        assert ("step_4" in found["left"]) == (found["resumed"] > 0), (case, found)
        check_whole(case, found)
    assert "step_2.deleted" in results["kill", "between deletions"]["left"]
    assert "step_6.tmp" in results["kill", "between manifest and rename"]["left"]
    half = results["kill", "half the frozen weights"]
    assert half["left"] == ["step_2.tmp"] and half["frozen_left"] == ["unfinished.tmp"]
    alone = results["kill", "frozen weights without a checkpoint"]
    assert alone["left"] == ["step_2.tmp"] and len(alone["frozen_left"]) == 1
    assert alone["frozen_left"] != ["unfinished.tmp"]


@pytest.mark.slow
def test_damage_full_disks_and_empty_packs(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "16m") as disk:
        results = cases("damage,answers,disk", tmp_path / "runs", disk)
    undisturbed = results["undisturbed", ""]
    for size, expected in zip(undisturbed["bytes"], undisturbed["expected_bytes"], strict=True):
        assert 1 <= size / expected < 1.08, undisturbed  # names and the like
    nothing_valid = results.pop(("damage", "all"))
    assert nothing_valid["held"] == ["step_6.broken", "step_8.broken"]
    for error in nothing_valid["errors"]:
        assert "none is valid" in error and "checkpoint.resume=never" in error
    for case, words in zip(
        DAMAGES, ("not match its sha256", "bytes, expected", "is missing", "not match"), strict=True
    ):
        found = results["damage", case]
        assert found["resumed"] == 6
        assert "step_8 is broken" in found["said"][0] and words in found["said"][0], found
        check_whole(case, found, "step_8.broken")
    for case, words in (("bit flip", "with sha256"), ("missing", "is missing; expected")):
        found = results["damage", f"frozen weights, {case}"]
        for error in found["refused"]:
            assert error.startswith(found["file"]) and words in error, found
            assert "Restore it from a backup" in error
        assert found["left"] == ["step_6", "step_8"] and found["resumed"] == 8, found
        check_whole(case, found)

    for stage in (1, 2, 3):
        found = results["answers", f"ZeRO-{stage}"]
        assert found["errors"] == [None, None]
        assert found["answers"] == [8, 4, 0, 8, 8, 8, 8, 8]
        assert [loss is None for loss in found["losses"]] == [n == 0 for n in found["answers"]]
        assert found["norms"][2] == 0 and found["norms"][1] > 0 and not any(found["skipped"])
        other = results["answers", "ZeRO-1"]["losses"]
        assert found["losses"][7] == pytest.approx(other[7], abs=1e-4)

    assert {case for kind, case in results if kind == "disk"} == set(DISKS)
    full = results["disk", "full during a save"]
    assert "step 4 could not be saved" in full["said"][1] and "step_2" in full["said"][1]
    assert "No space left on device" in full["said"][1] and "goes on" in full["said"][1]
    check_whole("full", full)
    first = results["disk", "full during the first save"]
    check_whole("full at first", first)
    third = results["disk", "full during the first save, ZeRO-3"]
    assert third["errors"] == [None, None] and third["held"] == ["step_6", "step_8"]
    for found in (first, third):
        assert "step 2 could not be saved" in found["said"][0], found
        assert "frozen/unfinished.tmp" in found["said"][0] and found["frozen"], found
    alone = results["disk", "full for rank 1 alone"]
    assert "There is no older one" in alone["said"][0] and "step_2" in alone["said"][0]
    for line in alone["said"][:2]:
        assert "rank 1: [Errno 28]" in line and "engine/rank_00001.pt" in line
    check_whole("full for rank 1", alone)
    read_only = results["disk", "read-only during a save"]
    assert "Read-only file system" in read_only["said"][1]
    check_whole("read-only", read_only)
    last = results["disk", "full at the last step"]
    assert last["held"] == ["step_4", "step_6"] and last["weights"]
    for error in last["errors"]:
        assert "step 8 could not be saved" in error and "The newest one is step_6" in error
    leaving = results["disk", "full when leaving"]
    assert leaving["held"] == ["step_4", "step_6"] and leaving["left"] == "signal"
    assert "step 7 could not be saved" in leaving["said"][-1]
    assert "goes on" not in leaving["said"][-1]
