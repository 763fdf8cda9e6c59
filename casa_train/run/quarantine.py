"""Samples that could not be used, kept by a file of each rank."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from casa_train.io.log import LineFile, warn


class Quarantine:
    """Appends samples that could not be used to a file of this rank.

    :param path: made with the first failure.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path, warn)

    def add(self, failures: Sequence[Any]) -> None:
        self._file.add([json.dumps(dataclasses.asdict(failure)) for failure in failures])
