"""What a run directory holds: the names of its files and folders."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"


METRICS_FILE = "metrics.jsonl"


LOST_METRICS_FILE = "metrics_lost.jsonl"


MODEL_CONFIG_FILE = "model_config.json"


REQUEUE_FILE = "requeue.json"


FAILURE_FILE = "failure.txt"


EVALUATION_FILE = "evaluation.json"


LOCK_FILE = "lock"


CHECKPOINTS = "checkpoints"


EXPORTS = "exports"


PROCESSOR = "processor"


EXPORT_LOG = "exports.log"


VALIDATION_FILE = "validation.jsonl"
