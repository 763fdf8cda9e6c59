"""What the exports of a sweep cost while images come in, by `bench streaming --sweep`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from casa_train.io.numbers import MISSING, count, duration, memory
from casa_train.report.comparison import Comparison
from casa_train.report.jobs import BROKEN
from casa_train.run.layout import EXPORT

STREAMING_FILE = "streaming.json"
IMAGES = (1, 16, 64, 256)
MEDIAN_OF = 8  # turns up to the one that is told, and at most a quarter of them


@dataclass(frozen=True)
class StreamColumn:
    """:param key: of a turn; :param sized: whether it is exact, not a time."""

    key: str
    title: str
    write: Callable[[float], str]
    sized: bool


def _memory(size: float) -> str:
    return memory(size) if size else "0"


COLUMNS = (
    StreamColumn("first_token", "time to first token", duration, False),
    StreamColumn("tokens_per_second", "decoding, tokens/s", lambda x: f"{x:.3g}", False),
    StreamColumn("cache_bytes", "KV cache", _memory, True),
    StreamColumn("state_bytes", "state beside the cache", _memory, True),
    StreamColumn("memory_bytes", "memory at the peak", _memory, True),
)


@dataclass
class StreamCosts:
    """:param values: by (variant, quantity, images), the mean of its exports."""

    machine: str
    images: list[int]
    values: dict[tuple[str, str, int], float] = field(default_factory=dict)

    @property
    def columns(self) -> list[StreamColumn]:
        """Those that were measured: memory is not on a CPU."""
        return [c for c in COLUMNS if any(key == c.key for _, key, _ in self.values)]

    def row(self, label: str, column: StreamColumn) -> list[str]:
        """What stands at each number of images."""
        found = [self.values.get((label, column.key, images)) for images in self.images]
        return [MISSING if value is None else column.write(value) for value in found]


def read_streaming(
    result: Comparison, sweep: Path, say: Callable[[str], None]
) -> StreamCosts | None:
    """The inference costs of the variants that are compared; None where nothing can be told.

    :param say: takes what is broken, missing or of other exports.
    """
    path = sweep / STREAMING_FILE
    if not path.is_file():
        return None
    again = f"Measure again: python -m casa_train.bench streaming --sweep {sweep}"
    try:
        content = json.loads(path.read_text())
        streams: Mapping[str, Any] = content["streams"]
        machine = _machine(content["machine"])
        measured: dict[str, list[dict[tuple[str, int], float]]] = {}
        for variant in [*result.variants, *result.apart]:
            for trial in variant.trials:
                stream = streams.get(trial.name)
                if stream is None:
                    continue
                if changed := _changed(sweep / trial.name / EXPORT, stream, path):
                    say(f"{STREAMING_FILE} is not of {trial.name} as it is: {changed}. {again}.")
                    continue
                measured.setdefault(variant.label, []).append(_of_turns(stream["turns"]))
    except BROKEN as error:
        say(f"{STREAMING_FILE} cannot be read ({type(error).__name__} {error}). {again}.")
        return None
    missing = [v.label for v in result.variants if v.label not in measured]
    if missing:
        say(f"{STREAMING_FILE} holds no stream of {', '.join(missing)}. {again}.")
    if not any(any(exports) for exports in measured.values()):
        return None
    seen = {images for streams in measured.values() for one in streams for _, images in one}
    costs = StreamCosts(machine, sorted(seen))
    for label, exports in measured.items():
        for key, images in {place for export in exports for place in export}:
            found = [export[key, images] for export in exports if (key, images) in export]
            costs.values[label, key, images] = statistics.fmean(found)
    return costs


def _of_turns(turns: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], float]:
    """By quantity and images seen: times as the median of the turns up to there, sizes exactly.

    A turn is one image.
    """
    found = {}
    for images in (n for n in IMAGES if n <= len(turns)):
        k = max(1, min(MEDIAN_OF, images // 4))
        for column in COLUMNS:
            values = [turn.get(column.key) for turn in turns[images - k : images]]
            known = [float(value) for value in values if value is not None]
            if known:
                value = known[-1] if column.sized else statistics.median(known)
                found[column.key, images] = value
    return found


def _changed(export: Path, stream: Mapping[str, Any], measured: Path) -> str | None:
    """Why a stream is not the export's of now; None: it is, as far as can be told."""
    weights = sorted(export.rglob("*.safetensors"))
    if not weights:
        return None  # exports may be deleted once they are measured
    newest = max(file.stat().st_mtime for file in weights)
    if newest > measured.stat().st_mtime:
        return "its export was written later"
    return None


def _machine(facts: Mapping[str, Any]) -> str:
    threads = facts["threads"]
    said = count(threads, "thread") if isinstance(threads, int) else f"threads {threads}"
    return f"{facts['device']}, {said}, {facts['dtype']}, torch {facts['torch']}"
