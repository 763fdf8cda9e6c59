"""Configuration -> the processor: whose tokenizer, and whose chat template."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from casa_train.config.schema import Config
from casa_train.data.templates import Resolved, resolve
from casa_train.data.tokens import load_tokenizer
from casa_train.errors import UserError
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.tower_kinds import TOWER_KINDS


def build_processor(config: Config, kept: Path | None = None) -> CasaProcessor:
    """Tokenizer, chat template and image code; see `open_processor`."""
    return open_processor(config, kept)[0]


def open_processor(config: Config, kept: Path | None = None) -> tuple[CasaProcessor, Resolved]:
    """The processor, and where its chat template comes from.

    :param kept: where a run keeps tokenizer and template; of an earlier version it does not, and
        they are those that `config` names.
    :raises UserError: a tokenizer that cannot be loaded or lacks the template's tokens, or no
        template.
    """
    name = str(kept) if kept is not None and kept.is_dir() else tokenizer_name(config)
    tokenizer = load_tokenizer(name)
    side, data = token_side_of(config), config.data
    if data.max_pixels < side**2:
        raise UserError(
            f"data.max_pixels is {data.max_pixels}; one image token of model.vision.type="
            f"{config.model.vision.type} needs {side**2} pixels ({side}x{side}). Raise it."
        )
    resolved = resolve(asdict(config.model.template), tokenizer, name, "model.template")
    try:
        processor = CasaProcessor(
            tokenizer,
            data.max_pixels,
            asdict(resolved.template),
            min_pixels=data.min_pixels,
            token_side=side,
        )
    except ValueError as error:
        raise UserError(f"model.template: {error}") from error
    return processor, resolved


def token_side_of(config: Config) -> int:
    """Pixels of an image token's side: the vision tower's that `config` names."""
    return TOWER_KINDS[config.model.vision.type].side


def tokenizer_name(config: Config) -> str:
    """The tokenizer that `config` names: its own, or the backbone's."""
    model = config.model
    named = model.tokenizer or model.init_from or model.backbone.pretrained
    if named is None:
        raise UserError(
            "model.tokenizer has no value and there is no pretrained backbone to take it from; "
            "set it to a directory or a hub id."
        )
    return named
