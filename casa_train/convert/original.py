"""A published checkpoint run by its own code, and what its modules put out on the way."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoProcessor
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from casa_train.errors import UserError
from casa_train.export.loading import DTYPE_OPTION
from casa_train.io.caches import check_cache


@dataclass(frozen=True)
class Places:
    """Names of modules whose outputs are compared, as patterns of whole names.

    :param layer: of decoder layers, with the layer's number as its first group.
    :param vision: of the vision tower.
    """

    layer: re.Pattern[str]
    vision: re.Pattern[str]


VISION = "vision tower"
# Of an export of this project.
OURS = Places(re.compile(r"model\.layers\.(\d+)"), re.compile(r"visual"))


def load_original(
    directory: Path, dtype: torch.dtype, device: str, attention: str | None
) -> tuple[Any, Any]:
    """Model and processor of a published checkpoint. Its own code runs in this process.

    :param attention: `attn_implementation`; None: the code's own choice.
    :raises UserError: code that cannot be loaded or fails.
    """
    check_cache(HF_MODULES_CACHE)  # transformers copies the code there
    options: dict[str, Any] = {"trust_remote_code": True, DTYPE_OPTION: dtype}
    if attention is not None:
        options["attn_implementation"] = attention
    try:
        model = AutoModel.from_pretrained(str(directory), **options).to(device).eval()
        processor = AutoProcessor.from_pretrained(str(directory), trust_remote_code=True)
    except Exception as error:  # another's code raises what it will
        raise UserError(
            f"SOURCE {directory}: its own code does not load ({_first(error)}). It may want other "
            "packages or another release of transformers (the authors' scripts name 4.51.3); "
            "--attention sdpa and --device choose what it runs on."
        ) from error
    return model, processor


def run_original(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """(1, T, vocabulary) logits.

    :raises UserError: the code fails.
    """
    try:
        logits: Tensor = model(**inputs).logits
    except Exception as error:  # another's code raises what it will
        raise UserError(
            f"SOURCE: its own code fails on the test conversation ({_first(error)}). "
            "FlashAttention needs --device cuda --precision bf16; elsewhere try --attention sdpa."
        ) from error
    return logits


def tokenized(processor: Any, messages: Any) -> dict[str, Any]:
    """A conversation as a processor gives it to its model.

    :raises UserError: the code fails.
    """
    try:
        return dict(processor.tokenize_messages(messages))
    except Exception as error:  # another's code raises what it will
        raise UserError(
            f"SOURCE: the code of its processor fails on a test conversation ({_first(error)}); "
            "expected tokenize_messages(messages) as the published processors have it."
        ) from error


@contextmanager
def listening(model: nn.Module, places: Places) -> Iterator[dict[str, Tensor]]:
    """Takes the outputs of the vision tower and of every decoder layer of the next forward pass.

    A tower that is called once an image puts out all of them, one after another.

    :return: "vision tower" and "layer N" -> (rows, width) in float32 on the CPU.
    """
    heard: dict[str, Tensor] = {}
    handles = []

    def listener(name: str) -> Any:
        def take(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = tensor_of(output)
            if tensor is None or (name in heard and name != VISION):
                return
            new = tensor.detach().float().cpu().flatten(0, -2)
            heard[name] = torch.cat([heard[name], new]) if name in heard else new

        return take

    for name, module in model.named_modules():
        layer = places.layer.fullmatch(name)
        if layer is not None:
            handles.append(module.register_forward_hook(listener(f"layer {int(layer[1])}")))
        elif places.vision.fullmatch(name):
            handles.append(module.register_forward_hook(listener(VISION)))
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def tensor_of(output: Any) -> Tensor | None:
    """The tensor that a module puts out: alone, first of a tuple, or a field of an output."""
    for name in ("pooler_output", "last_hidden_state"):  # a tower's, after and before its merger
        if isinstance(getattr(output, name, None), Tensor):
            tensor: Tensor = getattr(output, name)
            return tensor
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return output if isinstance(output, Tensor) and output.ndim > 1 else None


def _first(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else repr(error)
