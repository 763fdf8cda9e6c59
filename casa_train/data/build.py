"""Configuration -> the data of a run: prepared splits behind a plan, or a stream of lanes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_train.config.data_schema import DataConfig, SourceConfig, StreamDatasetConfig
from casa_train.config.schema import Config
from casa_train.data.budget import Budget
from casa_train.data.fit import Fit
from casa_train.data.loader import PackLoader
from casa_train.data.materialize import CountWork, Materializer
from casa_train.data.mixture import SourceSize
from casa_train.data.overlap import refuse_double_counting
from casa_train.data.prepared.plan import Planner, PlanSource
from casa_train.data.prepared.shards import Split
from casa_train.data.schemas.rows import MODALITIES
from casa_train.data.stream.row_groups import Retries
from casa_train.data.stream.stream_loader import StreamLoader, check_lanes
from casa_train.data.stream.stream_source import StreamSource
from casa_train.data.stream.subsets import copied_subsets, is_local, open_subset, subset_names
from casa_train.data.tokens import tokenizer_fingerprint, turns_fingerprint
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError, named
from casa_train.io.numbers import GIB, MIB
from casa_train.modeling.processing_casa import CasaProcessor

STREAMED = [schema for schema, modality in MODALITIES.items() if modality == "image"]
"""Schemas whose rows hold their images; videos are prepared by a recipe."""


@dataclass(frozen=True)
class Data:
    """What a run trains on.

    :param fingerprints: by source, what identifies its content.
    :param notes: lines for the start of the run.
    :param loader: makes the loader of a rank.
    """

    fingerprints: Mapping[str, str]
    notes: Sequence[str]
    loader: Callable[[int], PackLoader | StreamLoader]


def list_streams(config: Config, log: Callable[[str], None]) -> dict[str, StreamSource]:
    """The published subsets that the configuration streams, their files and row groups.

    :param log: prints one line for the user, since a hub may take minutes.
    :raises UserError: datasets, subsets or files that are not there, or the same samples twice.
    """
    retries = Retries.of(config.data.stream)
    datasets = config.data.stream.datasets
    if datasets and config.data.ratings:
        raise UserError(
            f"data.ratings is {config.data.ratings}, which streams do not filter by; expected none "
            "with data.stream.datasets. Leave it out, or prepare the data (python -m data_recipes)."
        )
    chosen = []
    # What is here first: a mistake in it shows before the hub is asked.
    for name, dataset in sorted(datasets.items(), key=lambda item: not is_local(item[1].source)):
        if dataset.schema not in STREAMED:
            raise UserError(
                f"data.stream.datasets.{name}.schema is {dataset.schema!r}; expected one of "
                f"{STREAMED}."
            )
        if not is_local(dataset.source):
            log(
                f"asking the hub for {dataset.source}: data.stream.datasets.{name}.source=DIR "
                f"would read a local copy, data.stream.datasets.{name}=null leaves it out"
            )
        chosen += [(name, subset) for subset in _chosen(name, dataset, retries, log)]
    # In the order of the configuration, which decides that of the samples.
    chosen.sort(key=lambda pair: list(datasets).index(pair[0]))
    refuse_double_counting(
        {
            f"data.stream.datasets.{name}.subsets, {subset}": (datasets[name].schema, subset)
            for name, subset in chosen
        }
    )
    if chosen:
        log(f"listing the files of {len(chosen)} subsets of {', '.join(datasets)}")
    return {
        f"{name}/{subset}": open_subset(datasets[name], subset, retries) for name, subset in chosen
    }


def ask_for_streams(config: Config, ranks: Ranks) -> dict[str, StreamSource]:
    """`list_streams` by one rank, since a hub may take minutes; it tells the others. Collective."""
    return ranks.broadcast(ranks.first_does(lambda: list_streams(config, ranks.log))) or {}


def open_data(
    config: Config,
    processor: CasaProcessor,
    streams: Mapping[str, StreamSource],
    world: int,
    gather: Callable[[Any], Sequence[Any]],
    count_work: CountWork | None = None,
) -> Data:
    """The data that the configuration names.

    :param streams: from `list_streams`; :param gather: the value of every rank, in rank order.
    :param count_work: counts the floating-point work of a pack.
    :raises UserError: sources, budgets or a number of ranks that do not fit.
    """
    if streams:
        return _streamed(config, processor, streams, world, gather, count_work)
    data = config.data
    splits = open_splits(data.sources, processor)
    fits = build_fits(config, splits, processor)
    planner = build_planner(config, fits)
    notes = _planned_notes(planner, splits, processor)

    def loader(rank: int) -> PackLoader:
        return PackLoader(
            planner,
            Materializer(splits, processor, Budget.of(data), fits, count_work),
            rank,
            world,
        )

    return Data({name: split.fingerprint for name, split in splits.items()}, notes, loader)


def _planned_notes(
    planner: Planner, splits: Mapping[str, Split], processor: CasaProcessor
) -> list[str]:
    """What budgets and ratings leave out or shorten."""
    notes = [
        f"source {name}: {dropped} of {total} samples exceed the budgets and are left out; "
        "to keep them raise data.text_tokens or data.image_tokens, or lower data.max_pixels"
        for name, (dropped, total) in planner.dropped().items()
        if dropped
    ]
    for name, source in planner.sources.items():
        for number, fate in (
            (source.shortened, "exceed the budgets and lose trailing turns or frames"),
            (source.rated_out, "have no turn left by data.ratings"),
            (
                source.without_captions,
                "are live captions that could end behind a frame, but their index does not say "
                f"where: to train them, too, count it anew with\n"
                f"  {_recount_command(splits[name], processor)}\n(images stay where they are) and "
                f"set data.sources.{name}.path=NEW",
            ),
        ):
            if number:
                notes.append(f"source {name}: {number} of {len(source.text)} samples {fate}")
    return notes


def _streamed(
    config: Config,
    processor: CasaProcessor,
    streams: Mapping[str, StreamSource],
    world: int,
    gather: Callable[[Any], Sequence[Any]],
    count_work: CountWork | None,
) -> Data:
    data = config.data
    check_lanes(data.stream.lanes, world)

    def loader(rank: int) -> StreamLoader:
        return StreamLoader(
            streams,
            data,
            config.seed,
            processor,
            rank,
            world,
            gather=gather,
            count_work=count_work,
        )

    fingerprints = {name: source.fingerprint for name, source in streams.items()}
    return Data(fingerprints, _notes(data, streams, world), loader)


def _notes(data: DataConfig, streams: Mapping[str, StreamSource], world: int) -> list[str]:
    """How much is streamed, and whether a loader process has the memory for its lanes."""
    files = [file for source in streams.values() for file in source.files]
    sizes = [size for file in files for size in file.sizes]
    rows = sum(source.rows for source in streams.values())
    per_process = -(-data.stream.lanes // world // max(1, data.workers))
    # Of row groups alone: what the samples of open packs weigh shows once they are read.
    need = per_process * data.stream.open_units * sum(sizes) // max(1, len(sizes)) // MIB
    given = data.stream.memory_mib
    lines = [
        f"streaming {len(streams)} subsets: {rows:,} rows in {len(sizes):,} row groups of "
        f"{len(files):,} files, {sum(sizes) / GIB:,.1f} GiB, through {data.stream.lanes} lanes",
        f"the {per_process} lanes of a loader process keep about {need:,} MiB of row groups open, "
        f"{max(sizes) // MIB:,} MiB the largest; data.stream.memory_mib is {given:,}",
    ]
    if need > given:
        lines[-1] += (
            ": row groups will be read again and again. Raise it, start more ranks or workers, or "
            "lower data.stream.lanes or data.stream.open_units"
        )
    return lines


def _chosen(
    name: str, dataset: StreamDatasetConfig, retries: Retries, log: Callable[[str], None]
) -> list[str]:
    """The subsets to read, each once; of a partial copy those that it holds.

    :param log: is told what a partial copy leaves out.
    :raises UserError: names that the dataset does not have, or none left.
    """
    field = f"data.stream.datasets.{name}"
    local = is_local(dataset.source)
    there = subset_names(dataset.source, dataset.revision, retries)
    if local:
        named, there = there, copied_subsets(dataset.source, there, retries)
        absent = [s for s in named if s not in [*there, *dataset.exclude]]
        if absent and not dataset.subsets and there:
            log(
                f"{field}: {dataset.source} holds no files of {len(absent)} of its {len(named)} "
                f"subsets, which are left out: {', '.join(absent)}"
            )
    for kind, names in (
        ("subsets", dataset.subsets),
        ("exclude", dataset.exclude),
        ("repeats", list(dataset.repeats)),
    ):
        unknown = [subset for subset in names if subset not in there]
        if unknown and local and kind != "subsets":
            log(f"{field}.{kind} names {unknown}, which {dataset.source} does not hold: ignored")
        elif unknown:
            raise UserError(
                f"{field}.{kind} names {unknown}, which {dataset.source} does not have; its "
                f"subsets are {there}. Mend the names"
                + (", or copy their files and the dataset's README.md." if local else ".")
            )
    if not there:
        raise UserError(
            f"{field}: {dataset.source} holds no file of any subset; expected the dataset's "
            "README.md and folders as they are published. Copy them, or mend the path."
        )
    wanted = dataset.subsets or there
    chosen = [subset for subset in dict.fromkeys(wanted) if subset not in dataset.exclude]
    if not chosen:
        raise UserError(
            f"{field} leaves every subset of {dataset.source} out; expected at least one. "
            "Shorten exclude, or delete the dataset."
        )
    return chosen


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
                f"({expected[:12]}...): run its recipe again with --tokenizer, run 'python -m "
                "data_recipes retokenize', or set model.tokenizer to the one it used."
            )
        if split.turns_fingerprint != turns:
            found = (
                f"with another chat template ({split.turns_fingerprint[:12]}...) than "
                f"model.template ({turns[:12]}...)"
                if split.turns_fingerprint
                else "before lengths had the chat template in them"
            )
            raise UserError(
                f"{section}.{name} ({source.path}) was counted {found}: count it anew with\n"
                f"  {_recount_command(split, processor)}\n(images stay where they are) and set "
                f"{section}.{name}.path=NEW, or choose the template it was counted with."
            )
    origins = {f"{section}.{name}": split.origin for name, split in splits.items()}
    refuse_double_counting({n: (o["dataset"], o["subset"]) for n, o in origins.items() if o})
    return splits


def _recount_command(split: Split, processor: CasaProcessor) -> str:
    """The command that counts a split for this processor; the user names NEW."""
    # Every field: one that is not given would be the tokenizer's own.
    fields = json.dumps(processor.template, ensure_ascii=False)
    count = [*"python -m data_recipes retokenize --data".split(), str(split.directory)]
    count += ["--tokenizer", str(processor.tokenizer.name_or_path or "NAME")]
    return shlex.join([*count, "--template", fields, "--out", "NEW"])


def build_fits(
    config: Config, splits: Mapping[str, Split], processor: CasaProcessor
) -> dict[str, Fit]:
    """By source, what of its samples is trained under the budgets and ratings."""
    budget, ratings = Budget.of(config.data).for_samples(), config.data.ratings
    return {name: Fit(split, processor, budget, ratings) for name, split in splits.items()}


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
        sources[name] = PlanSource(text, images, size, split.modality, **counts)
    return Planner(sources, data, config.seed)
