"""What a run directory holds: the names of its files and folders."""

from __future__ import annotations

CONFIG_FILE = "config.yaml"
MODEL_CONFIG_FILE = "model_config.json"
ENVIRONMENT_FILE = "environment.json"
PROCESSOR = "processor"
LOCK_FILE = "lock"
STARTS_FILE = "starts.jsonl"
METRICS_FILE = "metrics.jsonl"
LOST_METRICS_FILE = "metrics_lost.jsonl"
VALIDATION_FILE = "validation.jsonl"
# Steps that were taken apart: tables, numbers, a trace.
PROFILE = "profile"
QUARANTINE_FILE = "quarantine_{rank}.jsonl"
REQUEUE_FILE = "requeue.json"
FAILURE_FILE = "failure.txt"
# What a sweep's job printed that ran beside others, one start after another.
CONSOLE_FILE = "console.log"
CHECKPOINTS = "checkpoints"
# What a run exports itself, by step, and its log; the one that is written for an evaluation.
EXPORTS = "exports"
EXPORT_LOG = "exports.log"
EXPORT = "export"
EVALUATION_FILE = "evaluation.json"
TEXT_FILE = "text_answers.json"
REPORT_FILE = "report.html"
# Beside the runs of a sweep: what streams of their exports cost.
STREAMING_FILE = "streaming.json"
