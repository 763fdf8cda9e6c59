"""`evaluate --benchmarks` where something is in the way: folders, disks, other commands, odd data."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from casa_train.errors import UserError
from casa_train.evaluate.__main__ import main
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.reading import read_benchmark
from casa_train.evaluate.benchmarks.results import join
from tests.helpers.benchmark_copies import file_of, rows_of, write_benchmark
from tests.helpers.tiny_export import write_tiny_export

COUNT = 5
CASA = PROTOCOLS["casa"].tasks


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache for `datasets`, which tests of several processes would share."""
    import datasets

    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("datasets"))
    patch.setenv("HF_DATASETS_CACHE", folder)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    for name in ("ai2d", "chartqa"):
        write_benchmark(folder, name, COUNT)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("benchmarks") / "tiny")


def words(export: Path | str, copies: Path, *more: str | Path, names: str = "ai2d") -> list[str]:
    base = (export, "--benchmarks", names, "--source", copies, "--batch-size", "3")
    return [str(word) for word in (*base, *more)]


# Answers that are not there.


def test_an_answer_that_is_not_found_is_no_picture_that_cannot_be_read(tmp_path: Path) -> None:
    rows = rows_of("chartqa", COUNT)
    rows[4]["image"] = file_of(b"no picture")
    write_benchmark(tmp_path, "chartqa", rows=rows)
    benchmark = read_benchmark("chartqa", tmp_path)
    kept: dict[int, dict[str, Any]] = {i: {"answer": "red"} for i in range(4)}
    _, entry = join(benchmark, CASA["chartqa"], kept)
    assert entry["unreadable"] == 1 and entry["score"] == 50
    del kept[1], kept[2]  # another machine kept them on a disk of its own
    with pytest.raises(UserError, match=r"no answer to 2 of 5 questions.*--out .* share"):
        join(benchmark, CASA["chartqa"], kept)
