"""Where a vision tower lies in pretrained checkpoints: one entry for each layout that is published.

A Qwen2.5-VL checkpoint (`visual.*`, or `model.visual.*` as newer releases of transformers write
it), a SigLIP2 checkpoint of any aspect (NaFlex), whole or its vision model alone, or an export of
this project with either tower.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from casa_train.errors import UserError
from casa_train.modeling.tower_kinds import TOWER_KINDS, name_of_kind
from casa_train.setup.pretrained import Account, Pretrained, Stored, find_parameters
from casa_train.setup.text_config import EXPORT

# Keys of a vision configuration that say nothing of its sizes.
NOT_SIZES = ("model_type", "dtype", "torch_dtype", "transformers_version", "_attn_implementation")


@dataclass(frozen=True)
class Layout:
    """A kind of checkpoint with a tower.

    :param title: for people.
    :param model_types: of config.json.
    :param nested: whether that holds the tower's configuration as `vision_config`, or is it.
    :param tower: `model.vision.type`; None: its `vision_config` tells.
    :param prefix: of the tower's tensors.
    :param names: replacements that lead to the tower's own names, in order; None: left out.
    """

    title: str
    model_types: Sequence[str]
    nested: bool
    tower: str | None
    prefix: str
    names: Sequence[tuple[str, str | None]] = ()

    def name_here(self, name: str) -> str | None:
        """What a tensor of the checkpoint is called in a model; None: none of the tower's."""
        found = re.match(self.prefix, name)
        if found is None:
            return None
        rest = name[found.end() :]
        for theirs, ours in self.names:
            if rest.startswith(theirs):
                return None if ours is None else f"visual.{ours}{rest[len(theirs) :]}"
        return f"visual.{rest}" if not self.names else None


SIGLIP_NAMES = (
    ("embeddings.", "patch_embed."),
    ("encoder.layers.", "blocks."),
    ("post_layernorm.", "merger.post_layernorm."),
    ("head.", None),  # makes one vector of an image
)
LAYOUTS = (
    Layout("Qwen2.5-VL", ["qwen2_5_vl"], True, "qwen2_5_vl", r"(model\.)?visual\."),
    Layout("SigLIP2", ["siglip2"], True, "siglip2", r"vision_model\.", SIGLIP_NAMES),
    Layout(
        "SigLIP2's vision model",
        ["siglip2_vision_model"],
        False,
        "siglip2",
        r"(vision_model\.)?(?=embeddings|encoder|post_layernorm|head)",
        SIGLIP_NAMES,
    ),
    Layout("export of this project", [EXPORT], True, None, r"visual\."),
)


def layout_of(whole: Mapping[str, Any], where: str) -> Layout:
    """Of a checkpoint's configuration; `where` names it in messages.

    :raises UserError: none that holds a tower.
    """
    model_type = whole.get("model_type")
    for layout in LAYOUTS:
        if model_type in layout.model_types:
            if not layout.nested or isinstance(whole.get("vision_config"), dict):
                return layout
    titles = ", ".join(layout.title for layout in LAYOUTS)
    hint = " SigLIP2's checkpoints of a fixed size call themselves siglip: take a NaFlex one."
    raise UserError(
        f"{where} is of type {model_type!r}; expected a Qwen2.5-VL checkpoint with a "
        f"vision_config, or another that holds a vision tower (known: {titles})."
        + (hint if model_type in ("siglip", "siglip_vision_model") else "")
    )


def tower_config(whole: Mapping[str, Any], where: str, wanted: str) -> dict[str, Any]:
    """The tower's sizes out of a checkpoint's configuration.

    :param where: names it in messages; :param wanted: `model.vision.type`.
    :raises UserError: a checkpoint without a tower, or with another.
    """
    layout = layout_of(whole, where)
    config = dict(whole["vision_config"]) if layout.nested else dict(whole)
    refuse_other_tower(layout.tower or _type_of(config, where), wanted, where)
    if layout.nested:
        return {name: value for name, value in config.items() if name not in NOT_SIZES}
    fields = TOWER_KINDS[wanted].config_class().to_dict()
    return {n: v for n, v in config.items() if n in fields and n not in NOT_SIZES}


def _type_of(config: Mapping[str, Any], where: str) -> str:
    try:
        return name_of_kind(config.get("model_type"))
    except ValueError as error:
        raise UserError(f"{where}: {error}. Take a checkpoint with one of these.") from error


def refuse_other_tower(found: str, wanted: str, where: str) -> None:
    """:raises UserError: they differ; :param where: names what holds `found`."""
    if found != wanted:
        raise UserError(
            f"{where} holds a vision tower of type {found!r}, but model.vision.type is {wanted!r}. "
            f"Set model.vision.type={found}, or name another checkpoint."
        )


def export_tower(whole: Mapping[str, Any], where: str, wanted: str) -> dict[str, Any]:
    """The tower's configuration in an export that a later stage starts from.

    :raises UserError: another tower than `model.vision.type` names.
    """
    config = dict(whole.get("vision_config") or {})
    refuse_other_tower(_type_of(config, where), wanted, where)
    return {name: value for name, value in config.items() if name != "model_type"}


def vision_config(pretrained: Pretrained, wanted: str) -> dict[str, Any]:
    """`tower_config` of an opened checkpoint."""
    where = f"{pretrained.setting}: {pretrained.name}"
    return tower_config(pretrained.config, where, wanted)


def find_vision(model: Any, pretrained: Pretrained, stored: Stored) -> Account:
    """Finds the vision tower in a checkpoint; whatever else that holds stays unused.

    The adapter is not taken, not even out of an export, whose adapter leads to another text.

    :raises UserError: missing, unexpected or misshapen tensors.
    """
    layout = layout_of(pretrained.config, f"{pretrained.setting}: {pretrained.name}")
    names = {
        name: here for name in pretrained.names if (here := layout.name_here(name)) is not None
    }
    parameters = dict(model.visual.named_parameters(prefix="visual"))
    account = find_parameters(parameters, pretrained, "vision tower", names, stored)
    account.unused = sorted(set(pretrained.names) - set(names))
    for part, word in (("adapter.", "its adapter"), (".head.", "its pooling head")):
        if any(part in f".{name}" for name in account.unused):
            account.notes.append(f"{word} is not used")
    return account
