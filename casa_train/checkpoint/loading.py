"""Exports as their users load them, with plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoProcessor

# The older name works everywhere, with a warning from 4.56 on.
DTYPE_OPTION = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    """The model of an export, by its own remote code.

    :param dtype: of the parameters; "auto" is that of the files.
    """
    options: dict[str, Any] = {"trust_remote_code": True, DTYPE_OPTION: dtype}
    return AutoModel.from_pretrained(str(directory), **options)


def load_processor(directory: Path) -> Any:
    """The processor of an export, by its own remote code."""
    return AutoProcessor.from_pretrained(str(directory), trust_remote_code=True)
