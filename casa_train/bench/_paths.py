"""Ways to decode, side by side: steps, whole forward passes, and the backbone without images."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from casa_train.bench._timing import synchronise
from casa_train.io.tables import aligned

WARM_UP_ROUNDS = 2
STEPS, PASSES, BACKBONE = "decode steps", "whole passes", "backbone alone"


class TokenClock(BaseStreamer):
    """Notes when the prompt and then each new token reach the host."""

    def __init__(self) -> None:
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        self.arrivals.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""

    def tokens_per_second(self) -> float:
        """Of the new tokens after the first; the prompt comes back before it."""
        _, first, *rest = self.arrivals
        return len(rest) / (rest[-1] - first)


def compare_paths(models: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of each model, new streams of one turn that take turns in one process.

    :return: by model the median of each way, in tokens/s; no backbone where transformers has no
        text model of its kind.
    """
    ways = {
        (label, way): call
        for label, model in models.items()
        for way, call in ways_of(model, arguments).items()
    }
    speeds: dict[Any, list[float]] = {name: [] for name in ways}
    for round_ in tqdm(range(WARM_UP_ROUNDS + arguments.turns), desc="rounds", disable=None):
        for name, call in ways.items():
            found = call()
            if round_ >= WARM_UP_ROUNDS:
                speeds[name].append(found)
    return {
        label: {
            way: statistics.median(speeds[label, way])
            for way in (STEPS, PASSES, BACKBONE)
            if (label, way) in speeds
        }
        for label in models
    }


def ways_of(model: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], float]]:
    """What decodes one turn and returns tokens/s, by way."""
    weight = model.lm_head.weight
    generator = torch.Generator().manual_seed(arguments.seed)
    side, text = arguments.image_size, model.config.text_config
    frame = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    shape = (1, arguments.prompt_tokens + arguments.text_tokens)
    ids = torch.randint(0, text.vocab_size, shape, generator=generator).to(weight.device)
    options = dict(max_new_tokens=arguments.new_tokens, do_sample=False)

    def stream(steps: bool) -> float:
        clock, points = TokenClock(), [[arguments.prompt_tokens]]
        model.decode_steps = steps
        try:
            model.generate_from_image(ids, [frame], points, streamer=clock, **options)
        finally:
            model.decode_steps = True
        synchronise(weight.device)
        return clock.tokens_per_second()

    ways = {STEPS: lambda: stream(True), PASSES: lambda: stream(False)}
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a decoder that only comes with its images
        return ways
    backbone = AutoModelForCausalLM.from_config(text).to(weight.device, weight.dtype).eval()
    backbone.generation_config.eos_token_id = None

    def plain() -> float:
        clock = TokenClock()
        backbone.generate(input_ids=ids, streamer=clock, **options)
        synchronise(weight.device)
        return clock.tokens_per_second()

    return {**ways, BACKBONE: plain}


def table(found: dict[str, Any]) -> str:
    """A row a model: each way, and what steps are of the others."""
    rows = [["tokens/s", STEPS, PASSES, "ratio", BACKBONE, "ratio"]]
    for label, speeds in found.items():
        steps = speeds[STEPS]
        others = [
            cell
            for way in (PASSES, BACKBONE)
            for cell in (
                (f"{speeds[way]:.1f}", f"{steps / speeds[way]:.2f}") if way in speeds else ("", "")
            )
        ]
        rows.append([label, f"{steps:.1f}", *others])
    return aligned(rows)
