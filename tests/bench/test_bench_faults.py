"""bench faults: kills are real, phases are read from what they leave, differences are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from casa_train.bench.__main__ import main
from casa_train.bench.faults import PHASES, differences, phase_of
from casa_train.io.files import sha256


def test_the_phase_is_read_from_what_a_kill_left(tmp_path: Path) -> None:
    assert phase_of(tmp_path, 2) == "in a step"
    (tmp_path / "step_10").mkdir()
    (tmp_path / "step_5.deleted").mkdir()
    assert phase_of(tmp_path, 2) == "pruning"
    unfinished = tmp_path / "step_15.tmp"
    unfinished.mkdir()
    (unfinished / "rng_0.pt").touch()
    (unfinished / "state.json").touch()
    assert phase_of(tmp_path, 2) == "writing"
    (unfinished / "rng_1.pt").touch()
    assert phase_of(tmp_path, 2) == "hashing"
    (unfinished / "manifest.json").touch()
    assert phase_of(tmp_path, 2) == "committing"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kills", "0"], "--kills is 0"),
        (["--processes", "3"], "--processes 3"),
        (["--directory", "."], "--directory . exists"),
    ],
)
def test_what_cannot_run_is_refused(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["faults", *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_three_kills_of_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, runs = tmp_path / "numbers.json", tmp_path / "runs"
    command = ["faults", "--kills", "3", "--directory", str(runs), "--json", str(out)]
    assert main(command) == 0, capsys.readouterr().err
    assert "bit for bit" in capsys.readouterr().out
    numbers = json.loads(out.read_text())
    kills = numbers["kills"]
    assert len(kills) == 3 and {kill["phase"] for kill in kills} <= set(PHASES)
    assert any(kill["reached"] > 0 for kill in kills), "no kill came after the first step"
    assert all(0 <= kill["steps_repeated"] <= 10 and kill["seconds_lost"] > 0 for kill in kills)
    starts = (runs / "killed" / "starts.jsonl").read_text().splitlines()
    # The others were killed; a rank whose peer died first may have had time to say so.
    assert sum(json.loads(line).get("left") == "finished" for line in starts) == 1

    # The comparison sees a step and a generator's state that differ.
    metrics = runs / "killed" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[3]["loss"] *= 1 + 1e-9
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = runs / "killed" / "checkpoints" / f"step_{numbers['steps']}"
    manifest = (last / "manifest.json").read_text()
    digest = sha256(last / "rng_1.pt")
    (last / "manifest.json").write_text(manifest.replace(digest, "0" * 64))
    found = differences(runs / "undisturbed", runs / "killed")
    assert found[0].startswith("metrics of steps [4]") and found[1:] == ["rng_1.pt"]
