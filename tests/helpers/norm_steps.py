"""Steps of a model of many tensors, with gradients handled as the engine has it and as DeepSpeed.

Run by zero_steps.py, in its launch of two ranks: one JSON line a ZeRO stage and precision.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from casa_train.config.schema import ParallelConfig
from casa_train.distributed.ranks import Ranks
from casa_train.engine import engine as engine_file
from casa_train.engine.engine import Engine
from casa_train.engine.engine import _settings as engine_settings
from casa_train.io.precision import DTYPES

LAYERS = 30  # in two groups
WIDTH = 12
CLIP = 0.5
MICRO_STEPS = 2
# What the losses of the two ranks are multiplied with. Squares of 1e22 overflow fp32.
STEPS = {
    "usual": (1.0, 1.0),
    "not a number on one": (1.0, float("nan")),
    "below the clip": (1e-6, 1e-6),
    "infinite on the other": (float("inf"), 1.0),
    "large": (1e17, 1e17),
    "too large for squares": (1e22, 1e22),
    "usual again": (1.0, 1.0),
}


def scattering(parallel: ParallelConfig) -> dict[str, Any]:
    """The engine's settings, but for DeepSpeed's defaults of two of them."""
    settings = engine_settings(parallel)
    settings.pop("prescale_gradients", None)
    settings["zero_optimization"].pop("reduce_scatter", None)
    return settings


DEEPSPEEDS_WAY = {
    "fuse_norms": lambda optimizer: False,
    "fuse_sums": lambda optimizer: False,
    "_settings": scattering,
}


class Operations(TorchDispatchMode):
    """Counts what is dispatched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Many(nn.Module):
    """The sum of layers of different sizes; the last one is never used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 1 + i % 5, bias=False) for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([layer(x).float().sum() for layer in self.layers[:-1]]).sum()


def steps(ranks: Ranks, stage: int, precision: str, fused: bool) -> list[dict[str, Any]]:
    """What each step did: whether it was applied on each rank, norm, weights and operations.

    :param fused: whether as the engine does it, or as DeepSpeed does.
    """
    dtype = DTYPES[precision]
    model = Many().to(dtype)
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": weights[:10]}, {"params": weights[10:]}], lr=1e-2, eps=1e-2
    )
    parallel = ParallelConfig(stage, precision)
    replaced = {} if fused else DEEPSPEEDS_WAY
    with mock.patch.dict(vars(engine_file), replaced):
        engine = Engine(model, optimizer, ranks, parallel, MICRO_STEPS, CLIP)
    found = []
    for number, factors in enumerate(STEPS.values()):
        drawn = torch.Generator().manual_seed(2 * number + ranks.rank)
        counts: list[Counter[str]] = []
        for _ in range(MICRO_STEPS):
            inputs = torch.randn(4, WIDTH, generator=drawn).to(dtype)
            loss = engine.forward(x=inputs) * factors[ranks.rank]
            with Operations() as backward:
                engine.backward(loss)
            with Operations() as update:
                engine.step()
            counts = [backward.counts, update.counts]
        found.append(
            {
                "applied": ranks.gather(engine.step_applied()),
                "norm": engine.gradient_norm(),
                "weights": [engine.full_parameter(p).clone() for p in weights],
                "backward": counts[0],
                "update": counts[1],
            }
        )
    engine.close()
    return found


def lines(ranks: Ranks) -> Iterator[dict[str, Any]]:
    """For each stage and precision what both ways did, and how far their weights are apart."""
    for stage, precision in itertools.product((1, 2, 3), ("fp32", "bf16")):
        fused, own = (steps(ranks, stage, precision, way) for way in (True, False))
        both = zip(fused, own, strict=True)
        pairs = [zip(a.pop("weights"), b.pop("weights"), strict=True) for a, b in both]
        yield {
            "norms": f"stage {stage}, {precision}",
            "fused": dict(zip(STEPS, fused, strict=True)),
            "own": dict(zip(STEPS, own, strict=True)),
            "apart": [max(float((a - b).abs().max()) for a, b in step) for step in pairs],
        }
