"""Start-up lines of libraries that a command's own lines would drown in."""

from __future__ import annotations

import logging
import os

import torch


def quiet_deepspeed() -> None:
    """Before it is imported, by us or by accelerate: what it says of the machine and its start."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """For a command that saves or loads: also transformers' progress bars.

    accelerate imports DeepSpeed to save a model.
    """
    from transformers.utils.logging import disable_progress_bar

    quiet_deepspeed()
    disable_progress_bar()
