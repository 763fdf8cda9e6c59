"""What an earlier version of this code wrote is of use to this one: runs go on, exports load.

An archive of tests/fixtures has the runs and the export of one version, and what that version
computed. Everything here is done with the commands of a user.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.commands import ROOT, environment

FIXTURES = ROOT / "tests" / "fixtures"
ARCHIVES = sorted(FIXTURES.glob("*.tar.xz"))
assert ARCHIVES, f"{FIXTURES} holds no archive"  # without one every test would be skipped
RUNS = ("planned", "streamed", "two_ranks")
LEFT = 2  # the step after which the runs left
# Of losses and norms: other CPUs and versions of torch sum in another order.
CLOSE = 1e-4
# Of logits: a step of Adam turns a sign of noise into a whole rate. Steps 3 and 4 move them by 0.2.
SAME_LOGITS, TRAINED_LOGITS = 1e-4, 2e-3


@pytest.fixture(params=ARCHIVES, ids=[path.name.split(".")[0] for path in ARCHIVES])
def unpacked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with everything of one version; where it was written there is nothing any more."""
    folder = tmp_path / "moved"
    shutil.unpack_archive(request.param, folder)
    began = yaml.safe_load((folder / "planned" / "config.yaml").read_text())["run_dir"]
    assert not Path(began).parent.exists()
    return folder


def command(folder: Path, *arguments: str, **env: str) -> str:
    """`python ARGUMENTS`, given in a folder; what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment(), **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def expected_of(folder: Path) -> Any:
    return json.loads((folder / "expected.json").read_text())


def check_records(path: Path, expected: list[dict[str, Any]]) -> None:
    """Every step is there once, in order, and is what it was in a run that nothing disturbed."""
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for record, there in zip(found, expected, strict=True):
        for name, value in there.items():
            close = pytest.approx(value, rel=CLOSE) if isinstance(value, float) else value
            assert record[name] == close, (name, there)


def logits_of(folder: Path, export: str) -> list[float]:
    """What transformers computes with an export, to a question that every version encodes alike."""
    script = str(FIXTURES / "logits.py")
    printed = command(folder, script, export, PYTHONPATH="", HF_HOME=str(folder / "hf"))
    found = json.loads(printed)
    assert found["ids"] == expected_of(folder)["export"]["ids"]
    return found["logits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on(unpacked: Path, name: str) -> None:
    """One rank takes up what one or two saved; what comes of it is exported and reported."""
    expected = expected_of(unpacked)
    there = expected["runs"][name]
    printed = command(unpacked, "-m", "casa_train", *there["overrides"])
    assert f"resuming from {name}/checkpoints/step_{LEFT} at step {LEFT}" in printed, printed
    for file in {"metrics", "validation"} & there.keys():
        check_records(unpacked / name / f"{file}.jsonl", there[file])
    if name == expected["export"]["run"]:
        known = expected["export"]["logits"]
        assert "logits equal" in command(unpacked, "-m", "casa_train.export", name, "--out", "new")
        assert logits_of(unpacked, "new") == pytest.approx(known, abs=TRAINED_LOGITS)
        assert "report.html" in command(unpacked, "-m", "casa_train.report", name)


@pytest.mark.slow
def test_a_run_of_two_ranks_is_exported_and_reported_as_it_was_left(unpacked: Path) -> None:
    printed = command(unpacked, "-m", "casa_train.export", "two_ranks", "--out", "left")
    assert "logits equal" in printed
    assert f"step {LEFT}" in (unpacked / "left" / "README.md").read_text()
    assert "report.html" in command(unpacked, "-m", "casa_train.report", "two_ranks")


@pytest.mark.slow
def test_an_export_loads_and_starts_another_run(unpacked: Path) -> None:
    """By its own code, in transformers alone; and by this code, as the weights of a new run."""
    known = expected_of(unpacked)["export"]["logits"]
    assert logits_of(unpacked, "export") == pytest.approx(known, abs=SAME_LOGITS)

    expected = expected_of(unpacked)
    overrides = expected["runs"][expected["export"]["run"]]["overrides"]
    frozen = [f"optim.groups.{group}.lr=0" for group in ("fusion", "backbone", "vision")]
    later = ["run_dir=later", "model.init_from=export", "trainer.steps=1", "optim.decay_steps=0"]
    command(unpacked, "-m", "casa_train", *overrides, *later, *frozen)
    command(unpacked, "-m", "casa_train.export", "later", "--out", "again")
    assert logits_of(unpacked, "again") == pytest.approx(known, abs=SAME_LOGITS)
