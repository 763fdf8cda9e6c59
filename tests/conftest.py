"""One rendered dataset for the whole session, and runs of the real commands on it."""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment()  # for the tests and the processes they start, before anything imports torch

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.commands import prepare_data


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small synthetic dataset: train, validation, tokenizer."""
    return prepare_data(tmp_path_factory.mktemp("data") / "synthetic")


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    """A process that was a rank in one test would be one to whatever library the next one calls."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    left = {name: value for name in names if (value := os.environ.get(name)) != before[name]}
    for name in left:
        os.environ.pop(name, None)
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        dist.destroy_process_group()
    assert not left and not joined, f"left behind: {left}, a process group: {joined}"
