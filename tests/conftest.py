"""One rendered dataset for the whole session, and runs of the real commands on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import prepare_data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic dataset: train, validation, tokenizer."""
    return prepare_data(tmp_path_factory.mktemp("data") / "synthetic")
