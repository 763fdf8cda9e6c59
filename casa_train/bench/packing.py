"""How full packs are, how even ranks are loaded, and how fast packs are planned."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from casa_train.bench._benchmark import Benchmark, Report
from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.fit import Fit
from casa_train.data.mixture import Mixture, SourceSize
from casa_train.data.prepared.plan import IMAGE, VIDEO, Planner, PlanSource, slowest_rank
from casa_train.io.tables import aligned
from casa_train.modeling.image_processing_casa import MAX_PIXELS, SIDE, target_size
from casa_train.modeling.tower_kinds import FIRST, TOWER_KINDS

TURNS = 3.7  # a sample, on average, in FineVision: 89M turns of 24.3M samples
LENGTHS = Path(__file__).with_name("lengths.json")
DESCRIPTION = """\
Samples are drawn from the length model in casa_train/bench/lengths.json, which says where its
numbers come from. The planner that training uses packs them; next-fit and first-fit-decreasing
(on buffers of --buffer samples) pack as many samples in their order of arrival.

efficiency   packs that a perfect packing needs at least (the larger of both totals over their
             budgets, by modality) over packs made
slowest      per micro-step the largest number of image tokens on a rank, summed, over the sum
             of means; unsorted: the same packs in random order
samples/s    planned on one core, packing and ordering included

Then the start of a rank at FineVision's size: --sources sources with --large-samples samples
together, of the length model's images and turns. Lengths are made as training makes them from the
columns of an index; resume is a plan that goes on in the middle of a block of 32 steps. Seconds are
those of the processor; GiB is what lengths and orders of one epoch take.
"""
Sizes = tuple[np.ndarray, np.ndarray]  # text tokens, image tokens


def draw_lengths(model: dict[str, Any], count: int, generator: np.random.Generator) -> Sizes:
    """Text and image tokens of `count` samples of the image mix."""
    classes = model["image_mix"]
    weights = np.array([c["weight"] for c in classes])
    chosen = generator.choice(len(classes), count, p=weights / weights.sum())
    text, images = np.zeros(count, np.int64), np.zeros(count, np.int64)
    for index, kind in enumerate(classes):
        places = np.flatnonzero(chosen == index)
        text[places] = _text(kind["text_tokens"], len(places), generator)
        numbers, shares = zip(*kind["images"], strict=True)
        drawn = generator.choice(numbers, len(places), p=shares)
        for place, number in zip(places, drawn, strict=True):
            for _ in range(number):
                width, height, sigma = kind["size"]
                size = np.array([width, height]) * np.exp(generator.normal(0, sigma, 2))
                h, w = target_size(*(max(1, round(side)) for side in size))
                images[place] += h * w // SIDE**2
    return text, images


def draw_videos(model: dict[str, Any], count: int, generator: np.random.Generator) -> Sizes:
    """Text and image tokens of `count` short videos."""
    video = model["video"]
    frames = generator.integers(video["frames"][0], video["frames"][1] + 1, count)
    low, high = video["tokens_per_frame"]
    tokens = frames * generator.integers(low, high + 1, count)
    return _text(video["text_tokens"], count, generator), tokens


def _text(median_sigma: list[float], count: int, generator: np.random.Generator) -> np.ndarray:
    median, sigma = median_sigma
    drawn = median * np.exp(generator.normal(0, sigma, count))
    return np.clip(np.rint(drawn), 8, 2048).astype(np.int64)


def next_fit(text: np.ndarray, images: np.ndarray, budget: Budget) -> int:
    """Packs that next-fit makes: one open pack, closed when a sample does not fit."""
    packs, t, i = 1, 0, 0
    for new_t, new_i in zip(text.tolist(), images.tolist(), strict=True):
        if not budget.holds(t + new_t, i + new_i):
            packs, t, i = packs + 1, 0, 0
        t, i = t + new_t, i + new_i
    return packs


def first_fit_decreasing(text: np.ndarray, images: np.ndarray, budget: Budget, buffer: int) -> int:
    """Packs of first-fit-decreasing, by the fuller budget, on one buffer after another."""
    packs = 0
    for start in range(0, len(text), buffer):
        t, i = text[start : start + buffer], images[start : start + buffer]
        order = np.argsort(-np.maximum(*budget.fills(t, i)), kind="stable")
        used_t, used_i = np.zeros(len(t), np.int64), np.zeros(len(t), np.int64)
        opened = 0
        for sample in order:
            fits = budget.holds(used_t[:opened] + t[sample], used_i[:opened] + i[sample])
            place = int(fits.argmax()) if fits.any() else opened
            opened = max(opened, place + 1)
            used_t[place] += t[sample]
            used_i[place] += i[sample]
        packs += opened
    return packs


def plan(sources: dict[str, PlanSource], budget: Budget, arguments: Any) -> dict[str, Any]:
    """Plans the steps of one stage; says how good the packs are and how long it took.

    A pack holds one modality, so the packs needed at least are counted for each of the two.

    :param budget: what the samples of a pack may fill.
    """
    planner = Planner(sources, _data(budget, arguments), arguments.seed)
    began = time.perf_counter()
    packs = [next(planner) for _ in range(arguments.steps * arguments.packs_per_step)]
    seconds = time.perf_counter() - began
    needed = others = decreasing = 0.0
    for name, source in sources.items():
        lengths = np.array([i[2:] for pack in packs for i in pack.items if i[0] == name])
        needed += max(budget.fills(*lengths.sum(0)))
        # The same number of samples in the order in which the mixture draws them.
        _, rows = Mixture({name: source.size}, arguments.seed).take(len(lengths))
        arrived = source.text[rows], source.images[rows]
        others += next_fit(*arrived, budget)
        decreasing += first_fit_decreasing(*arrived, budget, arguments.buffer)
    text = np.array([p.text_tokens for p in packs])
    images = np.array([p.image_tokens for p in packs])
    fill_text, fill_image = budget.fills(text, images)
    shuffled = np.random.default_rng(arguments.seed).permutation(images)
    samples = sum(len(p.items) for p in packs)
    return {
        "samples": samples,
        "packs": len(packs),
        "efficiency": needed / len(packs),
        "next_fit": needed / others,
        "first_fit_decreasing": needed / decreasing,
        "fill_text": float(fill_text.mean()),
        "fill_image": float(fill_image.mean()),
        "slowest": slowest_rank(images, arguments.ranks),
        "slowest_unsorted": slowest_rank(shuffled, arguments.ranks),
        "samples_per_second": samples / seconds,
    }


def _data(budget: Budget, arguments: Any) -> DataConfig:
    """Packs whose samples fill this budget, in steps as they are asked for."""
    whole = budget.of_pack()
    return DataConfig(
        text_tokens=whole.text,
        image_tokens=whole.images,
        packs_per_step=arguments.packs_per_step,
        balance_group=arguments.ranks,
    )


def _budget(model: dict[str, Any], stage: str) -> Budget:
    """What the samples of a pack may fill in a stage of the length model."""
    return Budget(model["budgets"][stage]["text"], model["budgets"][stage]["image"])


class _Columns:
    """A source's columns of an index, drawn; what `Fit` reads of a split."""

    modality = IMAGE
    meta = {"schema": "finevision"}  # noqa: RUF012

    def __init__(self, samples: int, model: dict[str, Any], generator: np.random.Generator) -> None:
        classes = model["image_mix"]
        weights = np.array([c["weight"] for c in classes])
        chosen = generator.choice(len(classes), samples, p=weights / weights.sum())
        turns = generator.geometric(1 / TURNS, samples)
        numbers, words = np.zeros(samples, np.int64), np.zeros(samples)
        sides = np.zeros((samples, 3))
        for index, kind in enumerate(classes):
            places = np.flatnonzero(chosen == index)
            counts, shares = zip(*kind["images"], strict=True)
            numbers[places] = generator.choice(counts, len(places), p=shares)
            words[places] = _text(kind["text_tokens"], len(places), generator)
            sides[places] = kind.get("size", (1, 1, 0))
        sample = np.repeat(np.arange(samples), numbers)
        width, height, sigma = sides[sample].T
        spread = np.exp(generator.normal(0, 1, (2, len(sample))) * sigma)
        self._turns = np.concatenate([[0], np.cumsum(turns)])
        self._images = np.concatenate([[0], np.cumsum(numbers)])
        each = np.repeat(words / turns, turns).astype(np.int32)
        images = np.rint(np.stack([width, height]) * spread).astype(np.int32)
        self._columns = {
            "user_tokens": (each // 4, self._turns),
            "assistant_tokens": (each - each // 4, self._turns),
            "widths": (images[0], self._images),
            "heights": (images[1], self._images),
            "image_turns": (np.zeros(len(sample), np.int32), self._images),
        }

    def __len__(self) -> int:
        return len(self._turns) - 1

    def list_column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        return self._columns[name]


class _Processor:
    """What `Fit` reads of a processor."""

    max_pixels, min_pixels = MAX_PIXELS, 0
    token_side = TOWER_KINDS[FIRST].side
    pre_image_tokens = post_image_tokens = ()

    def opening_tokens(self) -> int:
        return 1


def start(model: dict[str, Any], arguments: Any) -> dict[str, Any]:
    """Lengths and a planner for many large sources: CPU seconds, and the memory that stays."""
    generator = np.random.default_rng(arguments.seed)
    budget = _budget(model, "image_stage")
    packs, steps = arguments.packs_per_step, 16
    seconds = 0.0
    sources = {}
    processor: Any = _Processor()
    for number in range(arguments.sources):
        columns: Any = _Columns(arguments.large_samples // arguments.sources, model, generator)
        began = time.process_time()
        text, images, _ = Fit(columns, processor, budget).lengths()
        seconds += time.process_time() - began
        sources[f"source_{number:03d}"] = PlanSource(text, images, SourceSize(len(text)))
    data = _data(budget, arguments)
    began = time.process_time()
    planner = Planner(sources, data, arguments.seed)
    next(planner)
    first = time.process_time() - began
    began = time.process_time()
    for _ in range(steps * packs):
        next(planner)
    step = (time.process_time() - began) / steps
    state = planner.state_dict(steps * packs)
    again = Planner(sources, data, arguments.seed)
    began = time.process_time()
    again.load_state_dict(state)
    next(again)
    arrays = sum(source.text.nbytes + source.images.nbytes for source in sources.values())
    orders = sum(len(source.text) * np.dtype(np.uint32).itemsize for source in sources.values())
    return {
        "sources": len(sources),
        "samples": sum(len(source.text) for source in sources.values()),
        "lengths_seconds": seconds,
        "first_block_seconds": first,
        "step_milliseconds": 1000 * step,
        "resume_seconds": time.process_time() - began,
        "gib": (arrays + orders) / 2**30,
    }


def run(arguments: argparse.Namespace) -> Report:
    model = json.loads(LENGTHS.read_text())
    generator = np.random.default_rng(arguments.seed)
    image = draw_lengths(model, arguments.samples, generator)
    video = draw_videos(model, arguments.samples // 4, generator)
    image_source = {"images": PlanSource(*image, SourceSize(len(image[0])), IMAGE)}
    video_source = {"videos": PlanSource(*video, SourceSize(len(video[0])), VIDEO)}
    stages = {
        "images": (image_source, _budget(model, "image_stage")),
        "3 images : 1 video": ({**image_source, **video_source}, _budget(model, "video_stage")),
    }
    results = {name: plan(sources, budget, arguments) for name, (sources, budget) in stages.items()}
    columns = {
        "efficiency": "efficiency",
        "next-fit": "next_fit",
        "first-fit-decr.": "first_fit_decreasing",
        "text fill": "fill_text",
        "image fill": "fill_image",
        f"slowest of {arguments.ranks}": "slowest",
        "unsorted": "slowest_unsorted",
    }
    rows = [["", *columns, "samples/s"]]
    for name, found in results.items():
        cells = [f"{found[key]:.3f}" for key in columns.values()]
        rows.append([name, *cells, f"{found['samples_per_second']:,.0f}"])
    packs = arguments.steps * arguments.packs_per_step
    text = f"{aligned(rows)}\n{packs:,} packs each, planned on one core"
    if arguments.sources:
        found = results["start"] = start(model, arguments)
        text += (
            f"\nstart with {found['sources']} sources, {found['samples']:,} samples: lengths "
            f"{found['lengths_seconds']:.1f} s, first block {found['first_block_seconds']:.1f} s, "
            f"then {found['step_milliseconds']:.1f} ms a step; resume "
            f"{found['resume_seconds']:.1f} s; {found['gib']:.2f} GiB"
        )
    return Report(text, results)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=100_000, help="in the length model's source")
    parser.add_argument("--steps", type=int, default=128, help="optimiser steps to plan")
    parser.add_argument("--packs-per-step", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=64, help="also the balance group")
    parser.add_argument("--sources", type=int, default=200, help="of the start; 0 leaves it out")
    parser.add_argument("--large-samples", type=int, default=24_000_000, help="of the start")
    parser.add_argument("--buffer", type=int, default=2000, help="of first-fit-decreasing")


BENCHMARK = Benchmark(
    measures="how full packs are, how even ranks are loaded, how fast packs are planned",
    description=DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
