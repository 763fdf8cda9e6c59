"""Where a model's parts lie in pretrained checkpoints, with an account of every tensor.

Sources are Hugging Face directories or hub ids with safetensors weights, in one file or sharded. A
backbone's names are the model's own (`model.*`, `lm_head.weight`); where a vision tower lies stands
in `tower_weights.py`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from casa_train.errors import UserError
from casa_train.io.caches import unwritable_cache
from casa_train.modeling.windowed import HEAD_NORMS
from casa_train.setup.kept_adapters import KeptAdapters
from casa_train.setup.lora import plain_parameters

GENERATION = "generation_config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WEIGHTS = ("*.json", "*.safetensors")
# The same weights once more, in a format of Mistral's own, beside them.
TWICE = ("consolidated*",)
# The tower of a Qwen2.5-VL checkpoint, as its releases write it.
VISUAL = re.compile(r"(model\.)?visual\.")
# Tables that older checkpoints carry along; they are computed, never loaded.
COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
# A row a token.
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
# What to do about tensors that do not fit.
SIZES = "Expected its own sizes: leave model.*.config fields to the checkpoint."


@dataclass
class Account:
    """What became of the tensors of one part."""

    part: str
    source: str
    loaded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)  # fusion's, from their blocks' own layers
    unused: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)  # settings of an export that this run changes
    notes: list[str] = field(default_factory=list)
    # Embedding and head that gained rows: how many there are there, how many here.
    resized: dict[str, tuple[int, int]] = field(default_factory=dict)

    def line(self) -> str:
        """For the start of a run."""
        copied = f", {len(self.copied)} copied from the blocks they stand in" if self.copied else ""
        new = f", {len(self.new)} newly initialised" if self.new else ""
        unused = f", {len(self.unused)} of the checkpoint unused" if self.unused else ""
        said = [*self.changed, *self.notes]
        changed = f"; {', '.join(said)}" if said else ""
        for name, (old, rows) in self.resized.items():
            changed += f"; {name} has {rows} rows instead of {old}, new ones start as their mean"
        loaded = f"{len(self.loaded)} tensors loaded from {self.source}"
        return f"{self.part}: {loaded}{copied}{new}{unused}{changed}"


class Pretrained:
    """A checkpoint directory, whose tensors are read one at a time.

    :param name: directory, or hub id (owner/name), whose configuration and safetensors are fetched.
    :param setting: the configuration field, for messages.
    :param files: patterns of what is fetched of a hub id.
    :raises UserError: nothing there, or not what is expected.
    """

    def __init__(self, name: str, setting: str, files: Sequence[str] = WEIGHTS) -> None:
        self.name = name
        self.setting = setting
        self.directory = _resolve(name, setting, files)
        self.config: dict[str, Any] = self._json("config.json")
        self._files = self._locate()

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @property
    def strays(self) -> list[str]:
        """Safetensors files in the directory that none of its tensors is read from."""
        there = {path.name for path in self.directory.glob("*.safetensors")}
        return sorted(there - set(self._files.values()))

    @property
    def generation(self) -> dict[str, Any]:
        """What generation_config.json holds, if there is one."""
        there = (self.directory / GENERATION).is_file()
        return self._json(GENERATION) if there else {}

    def shapes(self) -> dict[str, list[int]]:
        """The shape of every tensor, from the files' headers.

        :raises UserError: a file that cannot be read, or lacks what the index says it holds.
        """
        shapes: dict[str, list[int]] = {}
        for file in dict.fromkeys(self._files.values()):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                    shapes[name] = opened.get_slice(name).get_shape()
        absent = sorted(set(self._files) - set(shapes))
        if absent:
            raise UserError(
                f"{self.setting}: {self.directory} lacks tensors that {INDEX} names: {absent[:5]}. "
                "Copy or download it again."
            )
        return shapes

    def dtypes(self) -> dict[str, str]:
        """What every tensor is stored as, by safetensors' names: F32, BF16."""
        dtypes: dict[str, str] = {}
        for file in dict.fromkeys(self._files.values()):
            with self._open(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - a handle, not a dict
                    dtypes[name] = opened.get_slice(name).get_dtype()
        return dtypes

    def tensor(self, name: str) -> Tensor:
        """One tensor, mapped from its file: copy what is to stay.

        The file is opened for it alone, so that no pages of other tensors stay in memory.
        """
        with self._open(self._files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

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
            files: dict[str, str] | None = self._json(INDEX).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(f, str) for f in files.values()):
                raise UserError(
                    f"{self.setting}: {self.directory / INDEX} has no weight_map from the name of "
                    "each tensor to its file. Copy or download it again."
                )
            missing = sorted({f for f in files.values() if not (self.directory / f).is_file()})
            if missing:
                raise UserError(
                    f"{self.setting}: {self.directory} lacks {missing}, which {INDEX} names. Copy "
                    "or download them again."
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
            if not isinstance(content, dict):
                raise ValueError("no object")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.setting}: {path} is missing or no JSON object ({type(error).__name__}); "
                "expected a Hugging Face model directory."
            ) from error
        return content


def _resolve(name: str, setting: str, files: Sequence[str]) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/")) or name.count("/") != 1:
        raise UserError(
            f"{setting} is {name!r}: neither a directory nor a hub id (owner/name). Set it to one."
        )
    try:
        return Path(
            snapshot_download(name, allow_patterns=list(files), ignore_patterns=list(TWICE))
        )
    except Exception as error:  # network, permission and repository errors have many types
        if cache := unwritable_cache(error):
            raise UserError(
                f"{setting}: {name!r} cannot be fetched from the hub: {cache}"
            ) from error
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UserError(
            f"{setting}: {name!r} cannot be fetched from the hub ({first}). Download it where "
            "there is a network and give its directory."
        ) from error


class Stored:
    """Where the values of a model's parameters lie: parameter name -> checkpoint and name there."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[Pretrained, str]] = {}
        self._adapters: KeptAdapters | None = None

    def add(self, pretrained: Pretrained, places: dict[str, str]) -> None:
        """:param places: parameter name -> name in the checkpoint."""
        self._places.update({name: (pretrained, place) for name, place in places.items()})

    def add_adapters(self, adapters: KeptAdapters) -> None:
        """What is read from now on comes with these merged into it."""
        self._adapters = adapters

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Tensor:
        """The stored value of a parameter, mapped from its file, or merged with its adapter."""
        pretrained, place = self._places[name]
        value = pretrained.tensor(place)
        return value if self._adapters is None else self._adapters.merged(place, value)


def find_backbone(
    model: Any, pretrained: Pretrained, stored: Stored, resize: bool = False
) -> Account:
    """Finds `model.*` and `lm_head.weight`; what the plain backbone has not keeps its own start.

    Of a Qwen2.5-VL checkpoint it takes the language model, whatever this mechanism has room for.

    :param model: the model, on any device: only names and shapes count.
    :param resize: whether embedding and head may have more rows than the checkpoint's.
    :raises UserError: missing, unexpected or misshapen tensors.
    """
    names: dict[str, str] = {}
    unused = []
    for name in pretrained.names:
        plain = name.replace("model.language_model.", "model.", 1)  # as some releases write it
        target = None if VISUAL.match(name) else model.mechanism.adopt(plain)
        if target is None:
            unused.append(name)
        else:
            names[name] = target
    whole = plain_parameters(model)
    parameters = {
        name: parameter
        for name, parameter in whole.items()
        if name.startswith(("model.", "lm_head."))
        and (".fusion." not in name or _adopted(model, name))
    }
    account = find_parameters(parameters, pretrained, "backbone", names, stored, resize=resize)
    account.unused = sorted(unused)
    rest = sorted(
        name for name in whole if name not in parameters and not name.startswith("visual.")
    )
    account.copied = [name for name in rest if model.mechanism.copied(name)]
    account.new = [name for name in rest if not model.mechanism.copied(name)]
    return account


def _adopted(model: Any, name: str) -> bool:
    """Whether a fusion layer takes the place of self-attention, and so this projection of it, or
    this norm of heads.
    """
    plain = name.replace(".fusion.", ".self_attn.")
    part = name.split(".fusion.")[-1].split(".")[0]
    taken = part.endswith("_proj") or part in HEAD_NORMS
    return taken and model.mechanism.adopt(plain) == name


def find_export(
    model: Any, pretrained: Pretrained, stored: Stored, resize: bool = False
) -> Account:
    """Finds every parameter in an export of this project, for a later stage of training.

    :raises UserError: missing, unexpected or misshapen tensors.
    """
    theirs = pretrained.config.get("fusion")
    if not isinstance(theirs, dict) or "mechanism" not in theirs:
        raise UserError(
            f"{pretrained.setting}: {pretrained.name} is of type "
            f"{pretrained.config.get('model_type')!r}; expected an export of this project. A plain "
            "backbone is named by model.backbone.pretrained."
        )
    if theirs["mechanism"] != model.mechanism.name:
        raise UserError(
            f"{pretrained.setting}: {pretrained.name} holds the fusion mechanism "
            f"{theirs['mechanism']!r}, this run has {model.mechanism.name!r}; expected the same. "
            f"Set fusion={theirs['mechanism']}, or leave model.init_from out."
        )
    before = {**model.mechanism.options, **theirs}
    changed = [
        f"fusion.{key} {before[key]!r} there, {value!r} here"
        for key, value in model.mechanism.fusion.items()
        if before[key] != value
    ]
    adapter = pretrained.config.get("adapter", "linear")
    if adapter != model.config.adapter:
        raise UserError(
            f"{pretrained.setting}: {pretrained.name} holds an adapter of type {adapter!r}, but "
            f"model.vision.adapter is {model.config.adapter!r}. Set model.vision.adapter={adapter}."
        )
    names = {name: name for name in pretrained.names}
    hint = f"These settings differ: {'; '.join(changed)}." if changed else SIZES
    parameters = plain_parameters(model)
    account = find_parameters(parameters, pretrained, "model", names, stored, hint, resize)
    if folder := pretrained.config.get("kept_adapter"):
        adapters = KeptAdapters(pretrained.directory / folder, pretrained.setting)
        adapters.check(pretrained.shapes())
        stored.add_adapters(adapters)
        changed.append("its adapters merged into the weights")
    account.changed = changed
    return account


def find_parameters(
    parameters: dict[str, nn.Parameter],
    pretrained: Pretrained,
    part: str,
    names: dict[str, str],
    stored: Stored,
    hint: str = SIZES,
    resize: bool = False,
) -> Account:
    """Adds to `stored` where every one of the parameters lies; for one part of a model.

    :param names: checkpoint name -> parameter name, of every tensor that belongs to the part.
    :param hint: what to do if they do not fit.
    """
    places: dict[str, str] = {}
    resized: dict[str, tuple[int, int]] = {}
    problems: list[str] = []
    shapes = pretrained.shapes()
    for name, target in names.items():
        parameter = parameters.get(target)
        if parameter is None:
            # A tied head is the embedding; some checkpoints hold it all the same.
            if target != "lm_head.weight" and not target.endswith(COMPUTED):
                problems.append(f"unexpected {name}")
            continue
        places[target] = name
        expected = list(parameter.shape)
        if resize and target in ROWS and shapes[name][1:] == expected[1:]:
            if shapes[name][0] < expected[0]:
                resized[target] = shapes[name][0], expected[0]
                continue
        if shapes[name] != expected:
            problems.append(f"{name} has shape {shapes[name]}, expected {expected}")
    problems += [f"missing {name}" for name in sorted(set(parameters) - set(places))]
    if problems:
        shown = "; ".join(problems[:5]) + (" ..." if len(problems) > 5 else "")
        raise UserError(
            f"{pretrained.setting}: {pretrained.name} does not fit the {part} in {len(problems)} "
            f"tensors: {shown}. {hint}"
        )
    stored.add(pretrained, places)
    return Account(part, pretrained.name, loaded=sorted(places), resized=resized)
