"""Configuration -> processor, data and model: the parts of a run, each checked as it is built."""

from __future__ import annotations

import contextlib
import difflib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from casa_train import __version__
from casa_train.config import Config, SourceConfig
from casa_train.data.fit import Fit
from casa_train.data.mixture import SourceSize
from casa_train.data.overlap import refuse_double_counting
from casa_train.data.plan import RESERVED, Planner, PlanSettings, PlanSource
from casa_train.data.shards import Split
from casa_train.data.templates import Resolved, resolve
from casa_train.data.tokens import load_tokenizer, tokenizer_fingerprint, turns_fingerprint
from casa_train.errors import UserError
from casa_train.first_values import FirstValues, blocks
from casa_train.lines import count
from casa_train.modeling.attention import choose_backend
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.decoder import ALIASES, BACKBONES
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.optim import fit_schedule
from casa_train.warm_start import (
    Account,
    Pretrained,
    Stored,
    backbone_config,
    find_backbone,
    find_export,
    find_vision,
    vision_config,
)

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


NO_BACKBONE = (
    "model.backbone names no model: model.backbone.pretrained, model.init_from and "
    "model.backbone.config.model_type are all empty; expected one of them. Set it."
)


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
    resolved = resolve(asdict(config.model.template), tokenizer, name, "model.template")
    try:
        processor = CasaProcessor(
            tokenizer,
            config.data.max_pixels,
            asdict(resolved.template),
            min_pixels=config.data.min_pixels,
        )
    except ValueError as error:
        raise UserError(f"model.template: {error}") from error
    return processor, resolved


@contextlib.contextmanager
def named(field: str) -> Iterator[None]:
    """Puts the configuration's field in front of what is wrong with the data that it names."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{field}: {error}") from error


def open_splits(
    sources: Mapping[str, SourceConfig], processor: CasaProcessor, section: str = "data.sources"
) -> dict[str, Split]:
    """Opens prepared splits by source name.

    :param section: of the configuration, for messages.
    :raises UserError: a missing, empty or damaged split, one prepared with another tokenizer, or
        two that hold the same samples.
    """
    splits = {}
    expected = tokenizer_fingerprint(processor.tokenizer)
    turns = turns_fingerprint(processor)
    for name, source in sources.items():
        with named(f"{section}.{name}.path"):
            split = splits[name] = Split(Path(source.path), uncounted=True)
        if split.tokenizer_fingerprint != expected:
            raise UserError(
                f"{section}.{name} ({source.path}) was prepared with another tokenizer "
                f"({split.tokenizer_fingerprint[:12]}...) than model.tokenizer "
                f"({expected[:12]}...): "
                "run its recipe again with --tokenizer, run 'python -m data_recipes retokenize', "
                "or set model.tokenizer to the one it used."
            )
        if split.turns_fingerprint != turns:
            # Every field: one that is not given would be the tokenizer's own.
            fields = json.dumps(processor.template, ensure_ascii=False)
            count = [*"python -m data_recipes retokenize --data".split(), str(source.path)]
            count += ["--tokenizer", str(processor.tokenizer.name_or_path or "NAME")]
            count += ["--template", fields, "--out", "NEW"]
            found = (
                f"with another chat template ({split.turns_fingerprint[:12]}...) than "
                f"model.template ({turns[:12]}...)"
                if split.turns_fingerprint
                else "before lengths had the chat template in them"
            )
            raise UserError(
                f"{section}.{name} ({source.path}) was counted {found}: count "
                f"it anew with\n  {shlex.join(count)}\n(images stay where they are) and set "
                f"{section}.{name}.path=NEW, or choose the template it was counted with."
            )
    origins = {f"{section}.{name}": split.origin for name, split in splits.items()}
    refuse_double_counting({n: (o["dataset"], o["subset"]) for n, o in origins.items() if o})
    return splits


def build_fits(
    config: Config, splits: Mapping[str, Split], processor: CasaProcessor
) -> dict[str, Fit]:
    """By source, what of its samples is trained under the budgets and ratings."""
    data = config.data
    text, images = data.text_tokens - RESERVED, data.image_tokens - RESERVED
    return {n: Fit(split, processor, text, images, data.ratings) for n, split in splits.items()}


def build_planner(config: Config, fits: Mapping[str, Fit]) -> Planner:
    """The plan of packs over all sources."""
    data = config.data
    sources = {}
    for name, fit in fits.items():
        given, split = data.sources[name], fit.split
        count = len(split) if given.limit is None else min(len(split), given.limit)
        text, images, counts = fit.lengths(count)
        shards = split.index.column("shard").to_numpy()[:count] if data.locality else None
        size = SourceSize(count, given.weight, given.repeats, shards)
        sources[name] = PlanSource(
            text, images, size, split.modality, counts["shortened"], counts["ratings"]
        )
    settings = PlanSettings(
        text_budget=data.text_tokens,
        image_budget=data.image_tokens,
        packs_per_step=data.packs_per_step,
        seed=config.seed,
        open_packs=data.open_packs,
        balance_block=data.balance_block,
        balance_group=data.balance_group,
        video_share=data.video_share,
        locality=data.locality,
    )
    return Planner(sources, settings)


@dataclass(frozen=True)
class Sources:
    """The checkpoints that a run starts from, opened; None where its part starts at random."""

    backbone: Pretrained | None = None
    vision: Pretrained | None = None
    whole: Pretrained | None = None


def open_sources(config: Config) -> Sources:
    """Opens what `pretrained` or `init_from` names; reads configurations, no weights yet.

    :raises UserError: something that is not there, or nothing named.
    """
    backbone, vision, whole = (
        config.model.backbone.pretrained,
        config.model.vision.pretrained,
        config.model.init_from,
    )
    if whole is not None:
        return Sources(whole=Pretrained(whole, "model.init_from"))
    if backbone is None and "model_type" not in config.model.backbone.config:
        raise UserError(NO_BACKBONE)
    return Sources(
        None if backbone is None else Pretrained(backbone, "model.backbone.pretrained"),
        None if vision is None else Pretrained(vision, "model.vision.pretrained"),
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
        base_vision = dict(sources.whole.config.get("vision_config") or {})
    if sources.backbone is not None:
        base_text = backbone_config(sources.backbone.config)
    origin = sources.whole or sources.backbone
    if origin is not None:
        files = (base_text, origin.generation)  # they may differ
        ends = _ends(*(file.get("eos_token_id") for file in files))
        if ends is not None:
            base_text["eos_token_id"] = ends
    if sources.vision is not None:
        base_vision = vision_config(sources.vision)
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
    if model_type not in BACKBONES:
        raise UserError(
            f"model.backbone.config.model_type: backbone {model_type!r} is not supported; choose "
            f"one of {sorted(BACKBONES)}."
        )
    default: Any = CasaConfig(text_config={"model_type": model_type}).text_config
    # Some configurations do not list what their model reads all the same.
    more = ("rope_theta", "rope_scaling", "rope_parameters", "head_dim", "tie_word_embeddings")
    refuse_unknown("model.backbone.config", text, [*default.to_dict(), *more])
    refuse_unknown("model.vision.config", vision, list(Qwen2_5_VLVisionConfig().to_dict()))
    text = {k: v for k, v in {**base_text, **text}.items() if k not in NOT_SIZES}
    vision = {k: v for k, v in {**base_vision, **vision}.items() if k not in NOT_SIZES}
    if tokenizer is not None:
        text["vocab_size"] = rows_for(config, base_text.get("vocab_size"), len(tokenizer))
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            text.setdefault(name, getattr(tokenizer, name))
    try:
        return CasaConfig(
            text_config={**text, "model_type": model_type},
            vision_config=vision,
            fusion=dict(config.fusion),
            architectures=["CasaForConditionalGeneration"],
        )
    except Exception as error:  # transformers' validation raises types of its own
        first = " ".join(line.strip() for line in str(error).splitlines()[:2])
        raise UserError(
            "model.backbone.config or model.vision.config holds a value that transformers refuses: "
            f"{first.rstrip('.')}. Mend it in conf/model or on the command line."
        ) from error


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


def tokenizer_name(config: Config) -> str:
    """The tokenizer that `config` names: its own, or the backbone's."""
    model = config.model
    named = model.tokenizer or model.init_from or model.backbone.pretrained
    if named is None:
        raise UserError(
            "model.tokenizer has no value and there is no pretrained backbone to take it from; "
            "set it "
            "to a directory or a hub id."
        )
    return named


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
    model.generation_config.eos_token_id = _ends(
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


def _ends(*given: int | Sequence[int] | None) -> int | list[int] | None:
    """Tokens that end a text, each given as one, as several or not at all; in the same forms."""
    ids: dict[int, None] = {}
    for value in given:
        ids |= dict.fromkeys([value] if isinstance(value, int) else value or ())
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def meta_model(config: Config, model_config: CasaConfig) -> CasaForConditionalGeneration:
    """The model on the meta device, shapes without values, frozen where the run freezes it.

    :raises UserError: an unknown mechanism, backbone or setting.
    """
    try:
        with torch.device("meta"):
            model = CasaForConditionalGeneration(model_config)
        set_trainable(model, config)
    except ValueError as error:
        raise UserError(str(error)) from error
    except (ArithmeticError, RuntimeError, TypeError) as error:  # sizes that torch cannot make
        raise UserError(
            f"a model with the sizes of model.backbone.config and model.vision.config cannot be "
            f"built: {str(error).splitlines()[0]}. Mend them in conf/model or on the command line."
        ) from error
    return model


@dataclass(frozen=True)
class Start:
    """What the run starts from, found and checked, but not read.

    :param copies: whether fusion layers start from their blocks rather than from `stored`.
    """

    stored: Stored
    accounts: list[Account]
    copies: bool


def find_weights(
    model: CasaForConditionalGeneration, sources: Sources, resize: bool = False
) -> Start:
    """Finds the model's parameters in the checkpoints that the run starts from.

    :param resize: whether embedding and head may have more rows than there.
    :raises UserError: checkpoints that do not fit.
    """
    stored, accounts = Stored(), []
    if sources.whole is not None:
        accounts.append(find_export(model, sources.whole, stored, resize))
    if sources.backbone is not None:
        accounts.append(find_backbone(model, sources.backbone, stored, resize))
    if sources.vision is not None:
        accounts.append(find_vision(model, sources.vision, stored))
    return Start(stored, accounts, copies=sources.whole is None)


def start_weights(
    model: CasaForConditionalGeneration,
    start: Start | None,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    finish: Callable[[nn.Module], None],
) -> None:
    """Gives a model on the meta device its first values, the same on every rank, block by block.

    :param start: None leaves NaN everywhere, for a checkpoint of the run to replace.
    :param finish: called with every block that is complete, before the next one is begun.
    """
    if start is None:
        values = FirstValues(None, Stored(), seed, device, dtype)
    else:
        values = FirstValues(model._init_weights, start.stored, seed, device, dtype)
    decoder = set(model.model.layers)
    for name, block in blocks(model):
        values.fill(name, block)
        if start is not None and start.copies and block in decoder:
            model.mechanism.initialise(block)
        finish(block)


def set_trainable(model: CasaForConditionalGeneration, config: Config) -> None:
    """Freezes what the configuration freezes; fusion, resampler and adapter always train."""
    trainable = config.model.backbone.trainable
    for part in (model.model, model.lm_head):
        part.requires_grad_(trainable)
    for layer in model.model.layers:
        if layer.fusion is not None:
            layer.fusion.requires_grad_(True)
    model.visual.set_trainable(config.model.vision.train_last_blocks)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"nothing trains: model.backbone.trainable is false, model.vision.train_last_blocks "
            "is 0 "
            f"and the mechanism {config.fusion['mechanism']!r} adds no parameters."
        )


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to: the rows of every account of sizes."""
    if name.startswith("visual."):
        return "vision tower"
    if ".fusion." in name or name.startswith(("resampler.", "adapter.")):
        return "fusion"
    return "text backbone"


def part_sizes(model: nn.Module) -> dict[str, int]:
    """Parameters of each part; tied ones count once."""
    sizes = dict.fromkeys(("text backbone", "vision tower", "fusion"), 0)
    for name, parameter in model.named_parameters():
        sizes[part_of(name)] += parameter.numel()
    return sizes


def banner(
    config: Config,
    model: CasaForConditionalGeneration,
    notes: Sequence[str],
    world: int,
    device: torch.device,
) -> list[str]:
    """What the run is, in a few lines; `notes` are those of its data."""
    vision, backbone = model.config.vision_config, model.config.text_config
    accumulation = config.data.packs_per_step // world
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    backend = choose_backend("auto", device, dtype)
    sizes = part_sizes(model)
    adapter = vision.out_hidden_size != backbone.hidden_size
    lines = [
        f"casa_train {__version__}: run {config.name} in {config.run_dir}",
        f"backbone {backbone.model_type}: {backbone.num_hidden_layers} layers, width "
        f"{backbone.hidden_size}, {sizes['text backbone']:,} parameters",
        f"vision tower: {vision.depth} blocks, width {vision.hidden_size}, "
        f"{sizes['vision tower']:,} parameters, {model.visual.frozen_blocks} frozen blocks"
        + (
            ", random at the start: neither model.vision.pretrained nor model.init_from is set"
            if config.model.vision.pretrained is None and config.model.init_from is None
            else ""
        ),
        f"fusion {config.fusion['mechanism']}: {sizes['fusion']:,} parameters"
        + (
            f", an adapter from width {vision.out_hidden_size} to {backbone.hidden_size} among them"
            if adapter
            else ""
        ),
        f"attention backend: {backend} on {device.type}",
        f"{count(world, 'rank')} x {count(accumulation, 'micro-step')}, "
        f"ZeRO-{config.parallel.zero_stage}, {config.parallel.precision}, "
        f"{count(torch.get_num_threads(), 'thread')}; a pack holds "
        f"{config.data.text_tokens} text and {config.data.image_tokens} image tokens",
    ]
    optim, steps = config.optim, config.trainer.steps
    wanted = (optim.warmup_steps, optim.decay_steps)
    fitted = fit_schedule(steps, *wanted)
    lines.append(f"{steps} steps: {fitted[0]} of warm-up, {fitted[1]} of decay at the end")
    if fitted != wanted:
        lines[-1] += f" (asked for {wanted[0]} and {wanted[1]}, more than there are steps)"
    return [*lines, *notes]
