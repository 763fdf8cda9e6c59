"""What the exports of a sweep cost while images come in, by `bench streaming --sweep`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa_train.io.numbers import MISSING, count, duration, memory
from casa_train.report.comparison import Comparison
from casa_train.report.jobs import BROKEN
from casa_train.report.variants import Trial
from casa_train.run.layout import EXPORT, STREAMING_FILE


@dataclass(frozen=True)
class StreamColumn:
    """:param key: of what is measured at each number of images."""

    key: str
    title: str
    write: Callable[[float], str]


def _memory(size: float) -> str:
    return memory(size) if size else "0"


COLUMNS = (
    StreamColumn("first_token", "time to first token", duration),
    StreamColumn("tokens_per_second", "decoding, tokens/s", lambda x: f"{x:.3g}"),
    StreamColumn("cache_bytes", "KV cache", _memory),
    StreamColumn("state_bytes", "state beside the cache", _memory),
    StreamColumn("memory_bytes", "memory", _memory),
)


@dataclass
class StreamCosts:
    """What was measured, where.

    :param images: that had come in; :param memory: what is meant by it, as the benchmark says.
    :param values: by (variant, quantity, images), the mean of the variant's exports.
    """

    machine: str
    images: list[int]
    memory: str
    values: dict[tuple[str, str, int], float] = field(default_factory=dict)

    @property
    def columns(self) -> list[StreamColumn]:
        """Those that were measured."""
        return [c for c in COLUMNS if any(key == c.key for _, key, _ in self.values)]

    def row(self, label: str, column: StreamColumn) -> list[str]:
        """What stands at each number of images."""
        found = [self.values.get((label, column.key, images)) for images in self.images]
        return [MISSING if value is None else column.write(value) for value in found]


def read_streaming(
    result: Comparison, sweep: Path, command: str, say: Callable[[str], None]
) -> StreamCosts | None:
    """The inference costs of the variants that are compared; None where nothing can be told.

    :param command: that measures them.
    :param say: takes what is broken, missing or of other exports.
    """
    path = sweep / STREAMING_FILE
    if not path.is_file():
        return None
    again = f"Measure again: {command}"
    measured: dict[str, list[dict[tuple[str, int], float]]] = {}
    kinds: set[str] = set()
    try:
        content = json.loads(path.read_text())
        machine = _machine(content["machine"])
        for variant in [*result.variants, *result.apart]:
            for trial in variant.trials:
                stream = content["streams"].get(trial.name)
                if stream is None:
                    continue
                exported = (content.get("exports") or {}).get(trial.name) or {}
                if changed := _changed(trial, sweep, exported.get("step"), path):
                    say(f"{STREAMING_FILE} is not of {trial.name} as it is: {changed}. {again}.")
                    continue
                marks = {int(images): found for images, found in stream["marks"].items()}
                kinds |= {str(found["memory"]) for found in marks.values()}
                measured.setdefault(variant.label, []).append(_values(marks))
    except BROKEN as error:
        say(f"{STREAMING_FILE} cannot be read ({type(error).__name__} {error}). {again}.")
        return None
    missing = [v.label for v in result.variants if not any(measured.get(v.label, []))]
    if missing:
        say(f"{STREAMING_FILE} holds no stream of {'; '.join(missing)}. {again}.")
    seen = {images for streams in measured.values() for one in streams for _, images in one}
    if not seen:
        return None
    costs = StreamCosts(machine, sorted(seen), " or ".join(sorted(kinds)))
    for label, exports in measured.items():
        for key, images in {place for export in exports for place in export}:
            found = [export[key, images] for export in exports if (key, images) in export]
            costs.values[label, key, images] = statistics.fmean(found)
    return costs


def _values(marks: Mapping[int, Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """By quantity and images."""
    return {
        (column.key, images): float(found[column.key])
        for images, found in marks.items()
        for column in COLUMNS
        if found[column.key] is not None
    }


def _changed(trial: Trial, sweep: Path, step: int | None, measured: Path) -> str | None:
    """Why a stream is not the export's of now; None: it is, as far as can be told."""
    if step is not None and step != trial.job.step:
        return f"its export was of step {step:,}, the job came to step {trial.job.step:,}"
    weights = sorted((sweep / trial.name / EXPORT).rglob("*.safetensors"))
    if weights and max(w.stat().st_mtime for w in weights) > measured.stat().st_mtime:
        return "its export was written later"
    return None  # exports may be deleted once they are measured


def _machine(facts: Mapping[str, Any]) -> str:
    threads = facts["threads"]
    said = count(threads, "thread") if isinstance(threads, int) else f"threads {threads}"
    return f"{facts['device']}, {said}, {facts['dtype']}, torch {facts['torch']}"
