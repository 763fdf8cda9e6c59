"""Exports as their users load them, with plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from casa_train.errors import UserError
from casa_train.io.caches import check_cache
from casa_train.io.files import EXPORT_MARKER
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.setup.lora import attach_adapters

# The older name works everywhere, with a warning from 4.56 on.
DTYPE_OPTION = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load_model(directory: Path, dtype: torch.dtype | str) -> Any:
    """The model of an export, by its own remote code, with the adapters that it keeps apart.

    :param dtype: of the parameters; "auto" is that of the files.
    :raises UserError: a directory that is no export, or adapters without peft.
    """
    _trust(directory)
    options: dict[str, Any] = {"trust_remote_code": True, DTYPE_OPTION: dtype}
    model = AutoModel.from_pretrained(str(directory), **options)
    folder = model.config.kept_adapter if hasattr(model.config, "kept_adapter") else None
    return model if folder is None else attach_adapters(model, directory / folder).eval()


def load_processor(directory: Path, **options: Any) -> Any:
    """The processor of an export, by its own remote code.

    :param options: of the processor, such as `image_size`, in place of what the directory says.
    :raises UserError: a directory that is no export, or an `image_size` below its image token.
    :raises ValueError: options that the processor does not take.
    """
    _trust(directory)
    try:
        return AutoProcessor.from_pretrained(str(directory), trust_remote_code=True, **options)
    except ValueError as error:  # only the processor knows how large its tower's tokens are
        if "image_size" in options and "one image token is" in str(error):
            raise UserError(f"{directory}: {error}. Name a larger --image-size.") from error
        raise


def side_of_tokens(processor: Any) -> int:
    """Pixels of an image token's side, of an export's own processor: those from when there was one
    vision tower do not tell, and have its side.
    """
    return int(getattr(processor, "token_side", SIDE))


def _trust(directory: Path) -> None:
    """Only code that this project wrote into a directory is run.

    :raises UserError: a directory that is no export, or no cache to run its code from.
    """
    check_cache(HF_MODULES_CACHE)  # transformers copies the code there
    if not (directory / EXPORT_MARKER).is_file():
        raise UserError(
            f"{directory} is no export of this project ({EXPORT_MARKER} is missing), and the code "
            "of other directories is never run. Name a directory that 'python -m "
            f"casa_train.export' wrote; if it is a copy of one, copy {EXPORT_MARKER} as well."
        )
