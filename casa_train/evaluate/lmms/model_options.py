"""What `--model_args` may say, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from casa_train.errors import UserError

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class ModelOptions:
    """The arguments of the model `casa`.

    :param pretrained: an export's directory.
    :param batch_size: conversations that are answered at a time.
    :param device: cuda where there is one; under a launcher each rank has its own.
    :param dtype: auto is that of the files.
    :param image_size: an image has at most image_size * image_size pixels; None: as the export
        says. The paper's benchmarks use 896.
    :param max_new_tokens: where a task does not say.
    :param max_num_frames: of a video file, at most, evenly over it.
    :param system_prompt: a text, or a file that holds it, in front of every conversation.
    """

    pretrained: Path
    batch_size: int = 1
    device: str | None = None
    dtype: str = "auto"
    image_size: int | None = None
    max_new_tokens: int = 1024
    max_num_frames: int = 32
    system_prompt: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype | str:
        return DTYPES[self.dtype]

    def place(self) -> torch.device:
        """:raises UserError: no device of this machine."""
        cuda = torch.cuda.is_available()
        name = self.device or ("cuda" if cuda else "cpu")
        try:
            device = torch.device(name)
        except RuntimeError as error:
            raise UserError(f"--model_args: device={name!r}: {error}") from error
        if device.type == "cuda" and not cuda:
            raise UserError(
                f"--model_args: device={name}, but no GPU is found; expected device=cpu"
            )
        if device.type == "cuda" and device.index is None:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        return device


def read_options(given: dict[str, Any]) -> ModelOptions:
    """As lmms-eval read them from a command line: numbers are numbers.

    :raises UserError: an argument that is unknown or out of bounds, or no export.
    """
    names = [field.name for field in fields(ModelOptions)]
    if unknown := [f"{name}={value}" for name, value in given.items() if name not in names]:
        raise UserError(
            f"--model_args: {', '.join(unknown)} is unknown to the model casa; expected "
            f"{', '.join(names)}"
        )
    values = {name: value for name, value in given.items() if value is not None}
    if not values.get("pretrained"):
        raise UserError(
            "--model_args: pretrained is missing; expected the directory of an export: "
            "--model_args pretrained=runs/demo/export"
        )
    for name in ("batch_size", "image_size", "max_new_tokens", "max_num_frames"):
        if name in values:
            values[name] = _positive(name, values[name])
    values["pretrained"] = Path(str(values["pretrained"]))
    for name in ("device", "system_prompt", "dtype"):
        if name in values:
            values[name] = str(values[name])
    if (dtype := values.get("dtype", "auto")) not in DTYPES:
        raise UserError(f"--model_args: dtype={dtype}; expected one of {', '.join(DTYPES)}")
    return ModelOptions(**values)


def _positive(name: str, value: Any) -> int:
    """A whole number above 0; lmms-eval hands its own --batch_size as text."""
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--model_args: {name}={value}; expected a whole number, 1 or more")
    return int(text)
