"""Where the record of a step goes."""

from casa_train.metrics.sinks.base import Record, Sink
from casa_train.metrics.sinks.console import ConsoleSink
from casa_train.metrics.sinks.jsonl import JsonlSink, keep_steps, read_metrics

__all__ = ["ConsoleSink", "JsonlSink", "Record", "Sink", "keep_steps", "read_metrics"]
