"""Sources of random lengths, and the settings by which their samples are packed."""

from __future__ import annotations

import numpy as np

from casa_train.config.data_schema import DataConfig
from casa_train.data.mixture import SourceSize
from casa_train.data.prepared.plan import IMAGE, VIDEO, PlanSource

SEED = 5
SETTINGS = DataConfig(
    text_tokens=201,
    image_tokens=101,
    packs_per_step=6,
    open_packs=4,
    balance_block=4,
    balance_group=3,
)


def source(samples: int, seed: int, modality: str = IMAGE, repeats: int = 1) -> PlanSource:
    """Random lengths; some samples have no image, some exceed the budgets."""
    generator = np.random.default_rng(seed)
    text = generator.integers(1, 230, samples)
    images = generator.integers(0, 110, samples) * (generator.random(samples) < 0.8)
    size = SourceSize(samples, repeats=repeats)
    return PlanSource(text.astype(np.int32), images.astype(np.int32), size, modality)


SOURCES = {"a": source(300, 1), "b": source(40, 2, repeats=6)}
MIXED = {**SOURCES, "v": source(200, 3, VIDEO)}
