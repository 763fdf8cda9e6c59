"""What a page shows: packs of a prepared split, of a run or of an experiment, or one sample."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.compute as pc

from casa_train.config.compose import (
    compose_config,
    compose_onto,
    experiment_names,
)
from casa_train.config.data_schema import SourceConfig
from casa_train.config.micro_steps import PLANNED_RANKS, micro_steps
from casa_train.config.model_schema import TemplateConfig
from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.build import build_fits, build_planner, list_streams, open_splits
from casa_train.data.materialize import Materializer
from casa_train.data.prepared.plan import Pack, Planner
from casa_train.data.prepared.shards import META_FILE, Split
from casa_train.data.processor import build_processor
from casa_train.data.schemas.rows import BadRow
from casa_train.data.stream.lanes import block_packs
from casa_train.data.stream.stream_loader import check_lanes, draw_packs
from casa_train.errors import UserError
from casa_train.inspect.data_page import MessageView, OneSample, Page, Part
from casa_train.inspect.packs import view_packs
from casa_train.inspect.statistics import view_plan
from casa_train.inspect.streams import view_stream
from casa_train.modeling.processing_casa import ChatTemplate
from casa_train.pages import pictures
from casa_train.run.configuration import load_run_config
from casa_train.run.layout import CONFIG_FILE, PROCESSOR

# Fields that choose another tokenizer than the one a run keeps.
TOKENIZERS = ("model.tokenizer", "model.init_from", "model.backbone.pretrained")
PLANNED = 1000  # packs that statistics count at least, in whole blocks


@dataclasses.dataclass(frozen=True)
class Target:
    """What is looked at: its configuration and, if it is one, that it is a run.

    :param kept: where a run keeps its tokenizer and chat template.
    """

    title: str
    config: Config
    run: bool
    kept: Path | None = None


def find_target(
    name: str, experiment: str | None, overrides: Sequence[str], config_dir: Path | None = None
) -> Target:
    """The configuration that TARGET stands for.

    :param experiment: whose configuration a prepared split is looked at with.
    :param config_dir: a folder of the user's own with more experiments.
    :raises UserError: nothing of that name, or a configuration that does not hold.
    """
    path = Path(name)
    experiments = experiment_names(config_dir)
    chosen = [] if experiment is None else [f"+experiment={experiment}"]
    if (path / META_FILE).is_file():
        return Target(name, _split_config(path, [*chosen, *overrides], config_dir), run=False)
    if experiment is not None:
        raise UserError(
            f"--experiment says how to look at a prepared split, but {name!r} is none; expected a "
            f"directory with {META_FILE}. Leave the option out, or name a split such as DIR/train."
        )
    if (path / CONFIG_FILE).is_file():
        config = compose_onto(load_run_config(path), overrides, config_dir)
        named = any(o.lstrip("+").startswith(TOKENIZERS) for o in overrides)
        return Target(name, config, run=True, kept=None if named else path / PROCESSOR)
    if name in experiments:
        config = compose_config([f"+experiment={name}", *overrides], config_dir)
        return Target(name, config, run=True)
    splits = sorted(str(file.parent) for file in path.glob(f"*/{META_FILE}"))
    raise UserError(
        f"{name!r} is neither a prepared split (a directory with {META_FILE}), nor a run directory "
        f"(with {CONFIG_FILE}), nor an experiment ({', '.join(experiments)}). "
        + (f"It holds the splits {', '.join(splits)}: name one." if splits else "Name one of them.")
    )


def _split_config(path: Path, overrides: Sequence[str], config_dir: Path | None) -> Config:
    """One split alone as a mixture, with the tokenizer and the template it was counted with."""
    config = compose_config(overrides, config_dir)
    named = any(o.lstrip("+").startswith(("experiment=", "model", "model.")) for o in overrides)
    if not named:
        whole = path.resolve()  # retokenize puts the tokenizer of a split alone into it
        beside = [directory / "tokenizer" for directory in (whole, *whole.parents[:2])]
        found = next((directory for directory in beside if directory.is_dir()), None)
        if found is None:
            raise UserError(
                f"there is no tokenizer directory beside {path}: name the experiment that the "
                "split is for with --experiment, or set model.tokenizer=DIR."
            )
        config.model.tokenizer = str(found)
        counted_with = ChatTemplate(**Split(path, check=False).template)
        config.model.template = TemplateConfig(**dataclasses.asdict(counted_with))
    split = path.resolve()
    source = split.parent.name if split.name in ("train", "validation") else split.name
    config.data.sources = {source: SourceConfig(path=str(path))}
    return config


def inspect_plan(target: Target, packs: int, first: int | None) -> Page:
    """The mixture, and some packs as training sees them.

    :param packs: how many are drawn; :param first: the first of them, None: spread over the plan.
    """
    config = target.config
    world = config.planned_ranks or 1
    micro_steps(config.data, world, PLANNED_RANKS)
    if not config.data.sources:
        return inspect_stream(target, packs, first or 0)
    planner, splits, materializer = open_data(config, target.kept)
    whole = -(-PLANNED // planner.block_packs) * planner.block_packs
    planned = list(itertools.islice(planner, max(whole, (first or 0) + packs)))
    if first is None:
        packs = min(packs, whole)
        chosen = [planned[i * whole // packs] for i in range(packs)]
    else:
        chosen = planned[first : first + packs]
    steps = config.trainer.steps * config.data.packs_per_step
    return Page(
        title=target.title,
        settings=_settings(config, ChatTemplate(**materializer.processor.template)),
        packs=view_packs(chosen, materializer),
        packs_per_step=config.data.packs_per_step,
        world=world,
        plan=view_plan(planned[:whole], planner, splits, world, steps if target.run else None),
    )


def inspect_stream(target: Target, packs: int, first: int) -> Page:
    """Some packs of a stream as training sees them.

    :param packs: how many are drawn; :param first: the first of them.
    """
    config, data = target.config, target.config.data
    processor = build_processor(config, target.kept)
    streams = list_streams(config, lambda line: print(line, file=sys.stderr, flush=True))
    world = config.planned_ranks or 1
    check_lanes(data.stream.lanes, world)
    lanes = min(packs, data.stream.lanes)
    print(
        f"reading {packs} packs: {lanes} of {data.stream.lanes} lanes, each with "
        f"{data.stream.open_units} row groups and {block_packs(data)} packs in the making",
        file=sys.stderr,
        flush=True,
    )
    numbers = range(first, first + packs)
    drawn = draw_packs(streams, data, config.seed, processor, numbers)
    view, shown = view_stream(drawn, streams, data, processor.tokenizer)
    return Page(
        title=target.title,
        settings=_settings(config, ChatTemplate(**processor.template)),
        packs=shown,
        packs_per_step=config.data.packs_per_step,
        world=world,
        stream=view,
    )


def inspect_sample(target: Target, wanted: str) -> Page:
    """One sample: as it is stored, and as it stands in a pack.

    :param wanted: KEY or SOURCE/KEY.
    :raises UserError: no such sample, or several.
    """
    config = target.config
    planner, splits, materializer = open_data(config, target.kept)
    name, row = find_sample(splits, wanted)
    split, source = splits[name], planner.sources[name]
    lengths = int(source.text[row]), int(source.images[row])
    shard = int(split.index.column("shard")[row].as_py())
    about = [
        ("source of the mixture", name),
        ("row of the index", f"{row:,}"),
        ("shard", str(split.meta["shards"][shard]["name"])),
        ("text tokens", f"{lengths[0]:,} of {config.data.text_tokens:,}"),
        ("image tokens", f"{lengths[1]:,} of {config.data.image_tokens:,}"),
    ]
    if cut := materializer.fits[name].cut(row):
        turns, images = (len(split.index.column(n)[row]) for n in ("user_tokens", "widths"))
        trained = f"{cut.turns:,} of {turns:,} turns, {len(cut.images):,} of {images:,} images"
        if cut.images:
            trained += (
                f" of at most {cut.max_pixels // materializer.processor.token_side**2:,} tokens"
            )
        about.append(("trained", trained))
    pack = Pack(0, ((name, row, *lengths),), *lengths)
    return Page(
        title=target.title,
        settings=_settings(config, ChatTemplate(**materializer.processor.template)),
        packs=view_packs([pack], materializer),
        packs_per_step=config.data.packs_per_step,
        world=1,
        sample=OneSample(f"{split.source(row)}/{split.key(row)}", about, _messages(split, row)),
    )


def find_sample(splits: Mapping[str, Split], wanted: str) -> tuple[str, int]:
    """Source of the mixture and row of a sample.

    :param wanted: KEY or SOURCE/KEY; the source is the mixture's or the sample's own.
    :raises UserError: none, or several.
    """
    source, _, key = wanted.rpartition("/")
    found = []
    for name, split in splits.items():
        for row in pc.indices_nonzero(pc.equal(split.index.column("key"), key)).to_pylist():
            if source in ("", name, split.source(row)):
                found.append((name, row))
    if len(found) == 1:
        return found[0]
    places = ", ".join(f"{name}/{key} ({splits[name].source(row)})" for name, row in found[:5])
    raise UserError(
        f"--sample {wanted}: "
        + (
            f"{len(found)} samples have this key: {places}. Name one as SOURCE/KEY."
            if found
            else f"no such sample in {', '.join(splits)}; expected KEY or SOURCE/KEY as a pack or "
            "a quarantine file shows it."
        )
    )


def open_data(
    config: Config, kept: Path | None = None
) -> tuple[Planner, dict[str, Split], Materializer]:
    """Data as a training run opens it.

    :param kept: see `Target`.
    """
    processor = build_processor(config, kept)
    if not config.data.sources:
        raise UserError(
            f"run {config.name} streams its data, which has no index to find a sample by; expected "
            "prepared sources (data.sources). Leave --sample out to see packs of the stream, "
            "or prepare a part of it with 'python -m data_recipes NAME --limit N' "
            "and inspect that directory."
        )
    splits = open_splits(config.data.sources, processor)
    fits = build_fits(config, splits, processor)
    materializer = Materializer(splits, processor, Budget.of(config.data), fits)
    return build_planner(config, fits), splits, materializer


def _messages(split: Split, row: int) -> list[MessageView] | None:
    try:
        sample = split.read(row)
    except BadRow:
        return None  # the pack beside it says why
    messages = []
    for message in sample.messages(list(sample.images)):
        parts = []
        for part in message["content"]:
            if part["type"] == "text":
                parts.append(Part("text", part["text"]))
                continue
            for image in part["video"] if part["type"] == "video" else [part["image"]]:
                uri, about = pictures.of_file(image) or (None, "unreadable image")
                parts.append(Part("image", f"{about}, {len(image):,} bytes", uri))
        messages.append(MessageView(message["role"], parts))
    return messages


def _settings(config: Config, template: ChatTemplate) -> list[tuple[str, str]]:
    """The fields that the data depends on; :param template: what is in force."""
    data = config.data
    plain = ("text_tokens", "image_tokens", "max_pixels", "min_pixels")
    order = (
        "packs_per_step",
        "open_packs",
        "balance_block",
        "balance_group",
        "video_share",
        "locality",
    )
    return [
        ("seed", str(config.seed)),
        ("model.tokenizer", str(config.model.tokenizer or config.model.backbone.pretrained)),
        *((f"model.template.{k}", repr(v)) for k, v in template.given().items()),
        *((f"data.{field}", f"{getattr(data, field):,}") for field in (*plain, *order)),
        *((f"data.sources.{name}.path", source.path) for name, source in data.sources.items()),
        *((f"data.stream.datasets.{n}.source", d.source) for n, d in data.stream.datasets.items()),
    ]
