"""Start-up lines of libraries that a command's own lines would drown in."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

import torch

ACCELERATOR = "DS_ACCELERATOR"


def quiet_deepspeed() -> None:
    """Before it is imported, by us or by accelerate: what it says of the machine and its start."""
    os.environ.setdefault(ACCELERATOR, "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


@contextlib.contextmanager
def deepspeed_imported_quietly() -> Iterator[None]:
    """For an import of it that leaves the environment as it is."""
    before = os.environ.get(ACCELERATOR)
    quiet_deepspeed()
    try:
        yield
    finally:
        if before is None:
            del os.environ[ACCELERATOR]


def quiet_libraries() -> None:
    """For a command that saves or loads: also transformers' progress bars.

    accelerate imports DeepSpeed to save a model.
    """
    from transformers.utils.logging import disable_progress_bar

    quiet_deepspeed()
    disable_progress_bar()
