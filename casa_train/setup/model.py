"""Configuration -> processor, data and model: the parts of a run, each checked as it is built."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from casa_train.config.model_schema import LORA
from casa_train.config.schema import Config, ParallelConfig
from casa_train.data.processor import tokenizer_name
from casa_train.errors import UserError
from casa_train.modeling.backbones import backbone_named
from casa_train.modeling.configuration_casa import ALIASES, UNTURNED, CasaConfig, rope_apart
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.modeling.tower_kinds import TOWER_KINDS
from casa_train.setup.lora import add_adapters, is_adapter
from casa_train.setup.own_mechanisms import register_own
from casa_train.setup.text_config import backbone_config
from casa_train.setup.tower_weights import export_tower, vision_config
from casa_train.setup.weights import NO_BACKBONE, Sources

# Keys of a checkpoint's configuration that say nothing of the model's sizes.
NOT_SIZES = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def build_model_config(config: Config, processor: CasaProcessor, sources: Sources) -> CasaConfig:
    """The Hugging Face configuration of the model that `config` describes.

    Sizes come from the checkpoints where there are any; the configuration's fields come on top.

    :raises UserError: fields that no supported model has.
    """
    base_text: dict[str, Any] = {}
    base_vision: dict[str, Any] = {}
    if sources.whole is not None:
        base_text = dict(sources.whole.config.get("text_config") or {})
        where = f"model.init_from: {sources.whole.name}"
        base_vision = export_tower(sources.whole.config, where, config.model.vision.type)
    if sources.backbone is not None:
        base_text = backbone_config(sources.backbone.config)
    origin = sources.whole or sources.backbone
    if origin is not None:
        files = (base_text, origin.generation)  # they may differ
        ends = ends_of(*(file.get("eos_token_id") for file in files))
        if ends is not None:
            base_text["eos_token_id"] = ends
    if sources.vision is not None:
        base_vision = vision_config(sources.vision, config.model.vision.type)
    return describe_model(config, base_text, base_vision, processor.tokenizer)


def describe_model(
    config: Config, base_text: Mapping[str, Any], base_vision: Mapping[str, Any], tokenizer: Any
) -> CasaConfig:
    """Puts the configuration's fields on top of the sizes of what the model starts from.

    :param tokenizer: gives the vocabulary size, where nothing else does, and special tokens; None
        where only sizes matter and the vocabulary is known.
    :raises UserError: fields that no supported model has.
    """
    text, vision = dict(config.model.backbone.config), dict(config.model.vision.config)
    model_type = text.pop("model_type", base_text.get("model_type"))
    model_type = ALIASES.get(model_type, model_type)
    if model_type is None:
        raise UserError(NO_BACKBONE)
    try:
        backbone_named(model_type)
    except ValueError as error:
        raise UserError(f"model.backbone.config.model_type: {error}.") from error
    default: Any = CasaConfig(text_config={"model_type": model_type}).text_config
    # Some configurations do not list what their model reads all the same.
    more = ("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "tie_word_embeddings")
    refuse_unknown("model.backbone.config", text, [*default.to_dict(), *more])
    tower = TOWER_KINDS[config.model.vision.type]
    refuse_unknown("model.vision.config", vision, list(tower.config_class().to_dict()))
    text = {k: v for k, v in _on_top(base_text, text).items() if k not in NOT_SIZES}
    vision = {k: v for k, v in {**base_vision, **vision}.items() if k not in NOT_SIZES}
    if tokenizer is not None:
        text["vocab_size"] = rows_for(config, base_text.get("vocab_size"), len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        # Not what a backbone has by default, such as SmolLM3's: a small vocabulary may lack it.
        text.setdefault(name, getattr(tokenizer, name, None))
    try:
        return CasaConfig(
            text_config={**text, "model_type": model_type},
            vision_config=tower.config_class(**vision),
            fusion=dict(config.fusion),
            adapter=config.model.vision.adapter,
            architectures=["CasaForConditionalGeneration"],
        )
    except Exception as error:  # transformers' validation raises types of its own
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(
            "model.backbone.config or model.vision.config holds a value that transformers refuses: "
            f"{first.rstrip('.')}. Mend it in conf/model or on the command line."
        ) from error


def _on_top(base: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's configuration with the user's fields in place of the same ones there, by
    whichever name either has them: the library would follow one of the names alone.
    """
    base, fields = ({**values, **rope_apart(values)} for values in (base, fields))
    if fields.get("no_rope_layer_interval") is not None and UNTURNED not in fields:
        base.pop(UNTURNED, None)  # what followed from another interval
    merged = {**base, **fields}
    if rope_apart(merged):  # said by the other names now
        merged.pop("rope_parameters", None)
    return merged


def rows_for(config: Config, rows: int | None, tokens: int) -> int:
    """Rows of the model's embedding and head.

    :param rows: of the pretrained ones; None where they start at random.
    :param tokens: of the tokenizer.
    :raises UserError: fewer rows than tokens.
    """
    backbone, name = config.model.backbone, tokenizer_name(config)
    if rows is not None and rows < tokens and not backbone.resize_embeddings:
        raise UserError(
            f"the tokenizer {name} has {tokens} tokens, the backbone's embedding {rows} rows; "
            "expected a row for each. Set model.backbone.resize_embeddings=true to give the new "
            "tokens rows, or use the backbone's own tokenizer (model.tokenizer)."
        )
    given: int | None = backbone.config.get("vocab_size")
    if given is not None and given < tokens:
        raise UserError(
            f"model.backbone.config.vocab_size is {given}, but the tokenizer {name} has {tokens} "
            "tokens; leave it out: it follows from the tokenizer."
        )
    return max(rows or 0, tokens) if given is None else given


def refuse_unknown(section: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    """Free-form sections are checked against what reads them.

    :raises UserError: naming the keys, with what resembles them.
    """
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {sorted(known)}."
            raise UserError(f"unknown configuration key {section}.{key}: {hint}")


def build_model(
    config: Config, processor: CasaProcessor, model_config: CasaConfig
) -> CasaForConditionalGeneration:
    """`meta_model` with the tokens that begin, end and pad what it generates."""
    model = meta_model(config, model_config)
    # The template's own end first; whatever else ends a text does so, too.
    model.generation_config.eos_token_id = ends_of(
        processor.answer_end_token,
        model.config.text_config.eos_token_id,
        processor.tokenizer.eos_token_id,
    )
    model.config.pre_image_tokens = processor.pre_image_tokens
    model.config.post_image_tokens = processor.post_image_tokens
    model.config.answer_end_token = processor.answer_end_token
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
    return model


def ends_of(*given: int | Sequence[int] | None) -> int | list[int] | None:
    """Tokens that end a text, each given as one, as several or not at all; in the same forms."""
    ids: dict[int, None] = {}
    for value in given:
        ids |= dict.fromkeys([value] if isinstance(value, int) else value or ())
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def meta_model(config: Config, model_config: CasaConfig) -> CasaForConditionalGeneration:
    """The model on the meta device, shapes without values, frozen where the run freezes it.

    :raises UserError: an unknown mechanism, backbone or setting.
    """
    model = unfrozen_model(config, model_config)
    with _told_to_users():
        set_trainable(model, config)
    return model


def unfrozen_model(config: Config, model_config: CasaConfig) -> CasaForConditionalGeneration:
    """`meta_model` before anything is frozen: for counts of what may have nothing to train.

    :raises UserError: an unknown mechanism, backbone or setting.
    """
    register_own()
    with _told_to_users(), torch.device("meta"):
        model = CasaForConditionalGeneration(model_config)
        if config.model.backbone.trainable == LORA:
            add_adapters(model, config.model.backbone)
    return model


@contextlib.contextmanager
def _told_to_users() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, RuntimeError, TypeError) as error:  # sizes that torch cannot make
        raise UserError(
            "a model with the sizes of model.backbone.config and model.vision.config cannot be "
            f"built: {str(error).splitlines()[0]}. Mend them in conf/model or on the command line."
        ) from error


def joins_image_keys(parallel: ParallelConfig) -> bool:
    """Whether a run asks its model for joint image keys; what is checkpointed the model knows."""
    return parallel.joint_image_keys == "auto" and parallel.zero_stage < 3


def set_trainable(model: CasaForConditionalGeneration, config: Config) -> None:
    """Freezes what the configuration freezes; fusion, resampler, the adapter between tower and
    decoder, and LoRA's adapters always train.
    """
    trainable = config.model.backbone.trainable
    for part in (model.model, model.lm_head):
        part.requires_grad_(trainable is True)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            parameter.requires_grad_(True)
    for layer in model.model.layers:
        if layer.fusion is not None:
            layer.fusion.requires_grad_(True)
    model.visual.set_trainable(config.model.vision.train_last_blocks)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            "nothing trains: model.backbone.trainable is false, model.vision.train_last_blocks is "
            f"0 and the mechanism {config.fusion['mechanism']!r} adds no parameters."
        )
