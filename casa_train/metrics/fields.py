"""The fields of metrics.jsonl: one line a step, one object a line; this is their only list.

Tokens and samples are counted over all ranks and micro-steps of the step; in a pack without images
one text and one image token are a dummy's. A field without a value is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SECTIONS: dict[str, dict[str, str]] = {
    "run": {
        "step": "optimiser step, from 1",
        "start": "which start of the run did it, from 1; starts.jsonl describes each start",
        "time": "Unix time at the end of the step, in seconds",
    },
    "training": {
        "loss": "mean cross-entropy of the answer tokens; null if not finite, or if there are none",
        "sources": (
            "by source, every trainer.log_every steps: `loss`, the mean over its answer tokens "
            "since the last such record, and `answer_tokens`, their number"
        ),
        "gradient_norm": "global, before clipping; null if not finite",
        "skipped": "whether the update was left out because its numbers were not finite",
        "rates": "learning rate by parameter group",
    },
    "data": {
        "answer_tokens": "text tokens that the loss is over",
        "text_tokens": "text tokens of all samples",
        "image_tokens": "image tokens of all samples",
        "samples": "samples of the step",
        "samples_digest": "identifies the samples in global order; the same on any number of ranks",
        "bad_samples": (
            "samples of the run so far that could not be used; quarantine_R.jsonl has them"
        ),
        "left_out": (
            "samples of the run so far that exceed the budgets; prepared data says so "
            "at the start instead"
        ),
        "fill_text": "used share of the text budget, mean over packs",
        "fill_image": "used share of the image budget, mean over packs",
        "pack_efficiency": "used share of the fuller budget of each pack, mean over packs",
        "balance": "mean over ranks of the floating-point work, over the most of any rank; 1: even",
    },
    "speed": {
        "seconds": "of the step, on rank 0",
        "data_seconds": "longest wait of any rank for its data",
        "rank_seconds_min": (
            "shortest time any rank needed by itself: waiting for data and forward passes; in "
            "backward passes (and all through ZeRO-3) ranks wait for each other"
        ),
        "rank_seconds_max": "longest such time",
        "slowest_rank": "the rank that needed the longest",
        "text_tokens_per_second": "over all ranks",
        "image_tokens_per_second": "over all ranks",
        "operations": (
            "floating-point operations of the step over all ranks, forward and backward, attended "
            "pairs only, without what activation checkpointing repeats; dummy samples count, for "
            "they run"
        ),
        "tflops": "operations per second and rank, in 10^12",
        "mfu": (
            "tflops as a share of the device's peak (metrics/peak.py, metrics.peak_tflops); null "
            "where the peak is not known"
        ),
    },
    "memory": {
        "memory_bytes": (
            "at the end of the step, most of any rank: allocated by torch on a GPU, resident set "
            "size on a CPU"
        ),
        "memory_peak_bytes": (
            "peak of the step, most of any rank: of torch on a GPU, of the process on a CPU"
        ),
    },
}
"""By section, what every field means."""

FIELDS = {name: meaning for fields in SECTIONS.values() for name, meaning in fields.items()}

SOMETIMES = {"sources"}
"""Fields that not every record has."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a record by "section/field", nested ones by further slashes."""
    sections = {name: section for section, fields in SECTIONS.items() for name in fields}
    found: dict[str, float] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{name}/{key}", inner)
        elif isinstance(value, (int, float)) and math.isfinite(value):
            found[name] = float(value)

    for name, value in record.items():
        if name not in ("step", "time"):
            walk(f"{sections[name]}/{name}" if name in sections else name, value)
    return found
