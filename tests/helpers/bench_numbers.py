"""Runs a benchmark in this process and reads the numbers that it kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from casa_train.bench.__main__ import main


def bench(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark in this process; returns what it wrote."""
    out = tmp_path / "numbers.json"
    assert main([*arguments, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    assert all(math.isfinite(number) for number in numbers(found))
    return found


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [x for item in value.values() for x in numbers(item)]
    if isinstance(value, list):
        return [x for item in value for x in numbers(item)]
    return [value] if isinstance(value, int | float) else []
