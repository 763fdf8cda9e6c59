"""Exports between the two generations of transformers that this project supports.

`make test-compat` runs the core tests and these with the older one, and names the interpreter of
the newer one in OTHER_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment


@pytest.fixture(scope="module")
def other_python() -> str:
    """The other environment's interpreter; without it CI fails and anything else skips."""
    python = os.environ.get("OTHER_PYTHON")
    if python is None:
        reason = "OTHER_PYTHON is not set: `make test-compat` sets it"
        if os.environ.get("CI_REQUIRED") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return python


def call(python: str, home: Path, *arguments: str) -> str:
    """Runs `python ARGUMENTS`; fails with its output."""
    done = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env={**environment(), "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_the_two_environments_hold_two_generations(other_python: str, tmp_path: Path) -> None:
    ask = "import transformers; print(transformers.__version__)"
    versions = {call(python, tmp_path, "-c", ask) for python in (sys.executable, other_python)}
    majors = sorted(version.split(".")[0] for version in versions)
    assert majors == ["4", "5"], f"expected transformers 4.51.3 and 5.x, found {versions}"
    assert "4.51.3\n" in versions


@pytest.mark.parametrize("direction", ["here_to_there", "there_to_here"])
def test_an_export_of_one_generation_runs_in_the_other(
    other_python: str, tmp_path: Path, direction: str
) -> None:
    writer, reader = sys.executable, other_python
    if direction == "there_to_here":
        writer, reader = reader, writer
    for part in ("exports", "writer", "reader"):
        (tmp_path / part).mkdir()
    script = ["-m", "tests.helpers.compat_export"]
    call(writer, tmp_path / "writer", *script, "write", str(tmp_path / "exports"))
    said = call(reader, tmp_path / "reader", *script, "read", str(tmp_path / "exports"))
    assert " exports" in said
