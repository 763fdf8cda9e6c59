"""Exports as their users load them, with plain transformers."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoProcessor
from transformers.utils.logging import disable_progress_bar

# The older name works everywhere, with a warning from 4.56 on.
DTYPE_OPTION = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def quiet_libraries() -> None:
    """For a command that saves or loads: transformers' progress bars are off, and so is what
    DeepSpeed, which accelerate imports to save a model, says of the machine.
    """
    disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    """The model of an export, by its own remote code.

    :param dtype: of the parameters; "auto" is that of the files.
    """
    options: dict[str, Any] = {"trust_remote_code": True, DTYPE_OPTION: dtype}
    return AutoModel.from_pretrained(str(directory), **options)


def load_processor(directory: Path) -> Any:
    """The processor of an export, by its own remote code."""
    return AutoProcessor.from_pretrained(str(directory), trust_remote_code=True)
