"""How full packs are, how even ranks are loaded, and how fast packs are planned."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from casa_train.bench._benchmark import Benchmark, Report, aligned
from casa_train.data.mixture import Mixture, SourceSize
from casa_train.data.plan import IMAGE, RESERVED, VIDEO, Planner, PlanSettings, PlanSource
from casa_train.modeling.image_processing_casa import SIDE, target_size

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


def next_fit(text: np.ndarray, images: np.ndarray, budgets: tuple[int, int]) -> int:
    """Packs that next-fit makes: one open pack, closed when a sample does not fit."""
    packs, t, i = 1, 0, 0
    for new_t, new_i in zip(text.tolist(), images.tolist(), strict=True):
        if t + new_t > budgets[0] or i + new_i > budgets[1]:
            packs, t, i = packs + 1, 0, 0
        t, i = t + new_t, i + new_i
    return packs


def first_fit_decreasing(
    text: np.ndarray, images: np.ndarray, budgets: tuple[int, int], buffer: int
) -> int:
    """Packs of first-fit-decreasing, by the fuller budget, on one buffer after another."""
    packs = 0
    for start in range(0, len(text), buffer):
        t, i = text[start : start + buffer], images[start : start + buffer]
        order = np.argsort(-np.maximum(t / budgets[0], i / budgets[1]), kind="stable")
        used_t, used_i = np.zeros(len(t), np.int64), np.zeros(len(t), np.int64)
        opened = 0
        for sample in order:
            fits = (used_t[:opened] + t[sample] <= budgets[0]) & (
                used_i[:opened] + i[sample] <= budgets[1]
            )
            place = int(fits.argmax()) if fits.any() else opened
            opened = max(opened, place + 1)
            used_t[place] += t[sample]
            used_i[place] += i[sample]
        packs += opened
    return packs


def slowest_rank(images: np.ndarray, ranks: int) -> float:
    """Sum over micro-steps of the largest load over the sum of means."""
    whole = images[: len(images) // ranks * ranks].reshape(-1, ranks)
    return float(whole.max(1).sum() / whole.mean(1).sum())


def plan(sources: dict[str, PlanSource], budgets: dict[str, int], arguments: Any) -> dict[str, Any]:
    """Plans the steps of one stage; says how good the packs are and how long it took.

    A pack holds one modality, so the packs needed at least are counted for each of the two.
    """
    settings = PlanSettings(
        text_budget=budgets["text"] + RESERVED,
        image_budget=budgets["image"] + RESERVED,
        packs_per_step=arguments.packs_per_step,
        seed=arguments.seed,
        balance_group=arguments.ranks,
    )
    planner = Planner(sources, settings)
    began = time.perf_counter()
    packs = [next(planner) for _ in range(arguments.steps * arguments.packs_per_step)]
    seconds = time.perf_counter() - began
    pair = budgets["text"], budgets["image"]
    needed = others = decreasing = 0.0
    for name, source in sources.items():
        lengths = np.array([i[2:] for pack in packs for i in pack.items if i[0] == name])
        needed += max(lengths.sum(0) / pair)
        # The same number of samples in the order in which the mixture draws them.
        _, rows = Mixture({name: source.size}, arguments.seed).take(len(lengths))
        arrived = source.text[rows], source.images[rows]
        others += next_fit(*arrived, pair)
        decreasing += first_fit_decreasing(*arrived, pair, arguments.buffer)
    text = np.array([p.text_tokens for p in packs])
    images = np.array([p.image_tokens for p in packs])
    shuffled = np.random.default_rng(arguments.seed).permutation(images)
    samples = sum(len(p.items) for p in packs)
    return {
        "samples": samples,
        "packs": len(packs),
        "efficiency": needed / len(packs),
        "next_fit": needed / others,
        "first_fit_decreasing": needed / decreasing,
        "fill_text": float(text.mean() / pair[0]),
        "fill_image": float(images.mean() / pair[1]),
        "slowest": slowest_rank(images, arguments.ranks),
        "slowest_unsorted": slowest_rank(shuffled, arguments.ranks),
        "samples_per_second": samples / seconds,
    }


def run(arguments: argparse.Namespace) -> Report:
    model = json.loads(LENGTHS.read_text())
    generator = np.random.default_rng(arguments.seed)
    image = draw_lengths(model, arguments.samples, generator)
    video = draw_videos(model, arguments.samples // 4, generator)
    image_source = {"images": PlanSource(*image, SourceSize(len(image[0])), IMAGE)}
    video_source = {"videos": PlanSource(*video, SourceSize(len(video[0])), VIDEO)}
    stages = {
        "images": (image_source, model["budgets"]["image_stage"]),
        "3 images : 1 video": ({**image_source, **video_source}, model["budgets"]["video_stage"]),
    }
    results = {
        name: plan(sources, budgets, arguments) for name, (sources, budgets) in stages.items()
    }
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
    return Report(f"{aligned(rows)}\n{packs:,} packs each, planned on one core", results)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--samples", type=int, default=100_000, help="in the length model's source")
    parser.add_argument("--steps", type=int, default=128, help="optimiser steps to plan")
    parser.add_argument("--packs-per-step", type=int, default=128)
    parser.add_argument("--ranks", type=int, default=64, help="also the balance group")
    parser.add_argument("--buffer", type=int, default=2000, help="of first-fit-decreasing")


BENCHMARK = Benchmark(
    measures="how full packs are, how even ranks are loaded, how fast packs are planned",
    description=DESCRIPTION,
    add_arguments=add_arguments,
    run=run,
)
