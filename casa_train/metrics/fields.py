"""The fields of metrics.jsonl: one line a step, one object a line; this is their only list.

Tokens and samples are counted over all ranks and micro-steps of the step; in a pack without images
one text and one image token are a dummy's. A field without a value is null.
"""

from __future__ import annotations

FIELDS: dict[str, str] = {
    "step": "optimiser step, from 1",
    "start": "which start of the run did it, from 1; starts.jsonl describes each start",
    "time": "Unix time at the end of the step, in seconds",
    "loss": "mean cross-entropy of the answer tokens of the step; null if not finite",
    "sources": "by source, every trainer.log_every steps: `loss`, the mean over its answer tokens "
    "since the last such record, and `answer_tokens`, their number",
    "gradient_norm": "global, before clipping; null if not finite",
    "skipped": "whether the update was left out because its numbers were not finite",
    "rates": "learning rate by parameter group",
    "answer_tokens": "text tokens that the loss is over",
    "text_tokens": "text tokens of all samples",
    "image_tokens": "image tokens of all samples",
    "samples": "samples of the step",
    "samples_digest": "identifies the samples in global order; the same on any number of ranks",
    "bad_samples": "samples of the run so far that could not be used; quarantine_R.jsonl has them",
    "left_out": "samples of the run so far that exceed the budgets; prepared data says so at the "
    "start instead",
    "fill_text": "used share of the text budget, mean over packs",
    "fill_image": "used share of the image budget, mean over packs",
    "pack_efficiency": "used share of the fuller budget of each pack, mean over packs",
    "balance": "mean over ranks of the floating-point work, over the most of any rank; 1: even",
    "seconds": "of the step, on rank 0",
    "data_seconds": "longest wait of any rank for its data",
    "rank_seconds_min": "shortest time any rank needed by itself: waiting for data and forward "
    "passes; in backward passes (and all through ZeRO-3) ranks wait for each other",
    "rank_seconds_max": "longest such time",
    "slowest_rank": "the rank that needed the longest",
    "text_tokens_per_second": "over all ranks",
    "image_tokens_per_second": "over all ranks",
    "operations": "floating-point operations of the step over all ranks, forward and backward, "
    "attended pairs only, nothing recomputed; dummy samples count, for they run",
    "tflops": "operations per second and rank, in 10^12",
    "mfu": "tflops as a share of the device's peak (metrics/peak.py, metrics.peak_tflops); null "
    "where the peak is not known",
    "memory_bytes": "at the end of the step, most of any rank: allocated by torch on a GPU, "
    "resident set size on a CPU",
    "memory_peak_bytes": "peak of the step, most of any rank: of torch on a GPU, of the process "
    "on a CPU",
}
"""What every field means, by name."""

SOMETIMES = {"sources"}
"""Fields that not every record has."""
