"""Pretrained weights into a model's parts, with an account of every tensor.

Sources are Hugging Face directories or hub ids with safetensors weights, in one file or sharded. A
backbone's names are the model's own (`model.*`, `lm_head.weight`); a vision tower is taken out of a
Qwen2.5-VL checkpoint (`visual.*`, or `model.visual.*` as newer releases of transformers write it).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from casa_train.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A text decoder's special tokens; Qwen2.5-VL's configuration holds others beside them.
TEXT_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Tables that older checkpoints carry along; they are computed, never loaded.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")


@dataclass
class Account:
    """What became of the tensors of one part."""

    part: str
    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def line(self) -> str:
        """For the start of a run."""
        new = f", {len(self.new)} newly initialised" if self.new else ""
        unused = f", {len(self.unused)} of the checkpoint unused" if self.unused else ""
        return f"{self.part}: {len(self.loaded)} tensors loaded from {self.source}{new}{unused}"


class Pretrained:
    """A checkpoint directory; tensors are read one at a time, so memory holds one copy of none.

    :param name: directory, or hub id (owner/name), whose configuration and safetensors are fetched.
    :param setting: the configuration field, for messages.
    :raises UserError: nothing there, or not what is expected.
    """

    def __init__(self, name: str, setting: str) -> None:
        self.name = name
        self.setting = setting
        self.directory = _resolve(name, setting)
        self.config: dict[str, Any] = self._json("config.json")
        self._files = self._locate()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, file by file."""
        for file in dict.fromkeys(self._files.values()):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                    yield name, opened.get_tensor(name)

    @contextlib.contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        try:
            with safe_open(self.directory / file, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{self.setting}: {self.directory / file} cannot be read ({error}); expected a "
                "whole safetensors file. Copy or download it again."
            ) from error

    def _locate(self) -> dict[str, str]:
        if (self.directory / INDEX).is_file():
            files: dict[str, str] = self._json(INDEX)["weight_map"]
            missing = sorted({f for f in files.values() if not (self.directory / f).is_file()})
            if missing:
                raise UserError(
                    f"{self.setting}: {self.directory} lacks {missing}, which {INDEX} names. Copy "
                    "or "
                    "download them again."
                )
            return files
        if not (self.directory / SINGLE).is_file():
            raise UserError(
                f"{self.setting}: {self.directory} holds neither {SINGLE} nor {INDEX}; expected "
                "safetensors weights. Convert older formats with transformers' save_pretrained."
            )
        with self._open(SINGLE) as opened:
            return dict.fromkeys(opened.keys(), SINGLE)

    def _json(self, file: str) -> dict[str, Any]:
        path = self.directory / file
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.setting}: {path} is missing or not JSON ({type(error).__name__}); "
                "expected a "
                "Hugging Face model directory."
            ) from error
        return content


def _resolve(name: str, setting: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(
            f"{setting} is {name!r}: neither a directory nor a hub id (owner/name). Set it to one."
        )
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # network, permission and repository errors have many types
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{setting}: {name!r} cannot be fetched from the hub ({first}). Download it where "
            "there is "
            "a network and give its directory."
        ) from error


def backbone_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The text decoder's configuration out of a checkpoint's.

    Qwen2.5-VL's holds it beside the vision tower's: at the top level, or as `text_config` where
    newer releases of transformers wrote it.
    """
    if config.get("model_type") != "qwen2_5_vl":
        return dict(config)
    text = {**config, **(config.get("text_config") or {})}
    for name in list(text):
        if name.endswith(("_config", "_token_id")) and name not in TEXT_TOKENS:
            del text[name]
    return {**text, "model_type": "qwen2_5_vl_text"}


def vision_config(pretrained: Pretrained) -> dict[str, Any]:
    """The tower's configuration in a Qwen2.5-VL checkpoint's.

    :raises UserError: a checkpoint without one.
    """
    return tower_config(pretrained.config, f"{pretrained.setting}: {pretrained.name}")


def tower_config(whole: Mapping[str, Any], where: str) -> dict[str, Any]:
    """As `vision_config`, from a configuration alone; `where` names it in messages."""
    config = whole.get("vision_config")
    if not isinstance(config, dict) or "qwen2_5_vl" not in str(whole.get("model_type")):
        raise UserError(
            f"{where} is of type {whole.get('model_type')!r}; expected a Qwen2.5-VL checkpoint "
            "with a vision_config."
        )
    return {k: v for k, v in config.items() if k not in ("model_type", "dtype", "torch_dtype")}


def load_backbone(model: Any, pretrained: Pretrained) -> Account:
    """Loads `model.*` and `lm_head.weight`; fusion layers keep their own start.

    :raises UserError: missing, unexpected or misshapen tensors.
    """
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters()
        if name.startswith(("model.", "lm_head.")) and ".fusion." not in name
    }
    account = _load(parameters, pretrained, "backbone", {name: name for name in pretrained.names})
    account.new = sorted(n for n, _ in model.named_parameters() if ".fusion." in n)
    return account


def load_vision(model: Any, pretrained: Pretrained) -> Account:
    """Loads the vision tower out of a Qwen2.5-VL checkpoint; its language model stays unused.

    :raises UserError: missing, unexpected or misshapen tensors.
    """
    names = {}
    for name in pretrained.names:
        plain = name.removeprefix("model.")
        if plain.startswith("visual."):
            names[name] = plain
    parameters = dict(model.visual.named_parameters(prefix="visual"))
    account = _load(parameters, pretrained, "vision tower", names)
    account.unused = sorted(set(pretrained.names) - set(names))
    return account


def load_export(model: Any, pretrained: Pretrained) -> Account:
    """Loads every parameter from an export of this project, for a later stage of training.

    :raises UserError: missing, unexpected or misshapen tensors.
    """
    return _load(
        dict(model.named_parameters()),
        pretrained,
        "model",
        {name: name for name in pretrained.names},
    )


@torch.no_grad()
def _load(
    parameters: dict[str, nn.Parameter], pretrained: Pretrained, part: str, names: dict[str, str]
) -> Account:
    """Copies tensors into parameters.

    :param names: checkpoint name -> parameter name, of every tensor that belongs to the part.
    """
    account = Account(part, pretrained.name)
    problems: list[str] = []
    wanted = set(parameters)
    for name, target in names.items():
        tied = target == "lm_head.weight" and target not in parameters
        if target not in parameters and not tied and not target.endswith(COMPUTED):
            problems.append(f"unexpected {name}")
    for name, tensor in pretrained.tensors():
        target = names.get(name, "")
        if target not in parameters:
            continue
        parameter = parameters[target]
        if tensor.shape != parameter.shape:
            found, expected = list(tensor.shape), list(parameter.shape)
            problems.append(f"{name} has shape {found}, expected {expected}")
            continue
        parameter.copy_(tensor)
        account.loaded.append(target)
    problems += [f"missing {name}" for name in sorted(wanted - set(account.loaded))]
    if problems:
        shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(
            f"{pretrained.setting}: {pretrained.name} does not fit the {part} in {len(problems)} "
            f"tensors: {shown}. Expected its own sizes: leave model.*.config fields to the "
            "checkpoint."
        )
    return account
