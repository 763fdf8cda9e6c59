"""What tests of benchmarks stand on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.tiny_export import write_tiny_export


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for `datasets`, which tests of several processes would share."""
    import datasets

    patch = pytest.MonkeyPatch()
    folder = str(tmp_path_factory.mktemp("datasets"))
    patch.setenv("HF_DATASETS_CACHE", folder)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", Path(folder))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_export(tmp_path_factory.mktemp("benchmarks") / "tiny")
