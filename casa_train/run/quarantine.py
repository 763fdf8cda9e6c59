"""Samples that could not be used, kept by a file of each rank."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casa_train.io.log import LineFile, warn
from casa_train.run.layout import QUARANTINE_FILE


class Quarantine:
    """Appends samples that could not be used to a file of this rank.

    :param run_dir: gets the file with the first failure.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._file = LineFile(run_dir / QUARANTINE_FILE.format(rank=rank), warn)

    def add(self, failures: Sequence[Any]) -> None:
        self._file.add([json.dumps(dataclasses.asdict(failure)) for failure in failures])
