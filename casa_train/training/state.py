"""What a run is made of as the loop sees it: protocols, and the counters that a checkpoint
carries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from casa_train.metrics.counts import Batch
from casa_train.metrics.meter import Meter


class Loader(Protocol):
    """Gives the micro-batches of a step and knows its consumed position."""

    def next_step(self) -> Sequence[Batch]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TrainingEngine(Protocol):
    """A sharded model with its optimiser."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...

    def forward(self, **inputs: Any) -> Any: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> None: ...

    def step_applied(self) -> bool: ...

    def gradient_norm(self) -> float: ...

    def save(self, directory: Path) -> Any: ...


class Checkpoints(Protocol):
    """Commits the state of a step; collective."""

    def save(self, step: int, write: Callable[[Path], Any], state: dict[str, Any]) -> Any: ...


class Log(Protocol):
    """Takes a line for the user; those of ranks other than the first are dropped."""

    def log(self, line: str) -> None: ...


class Failures(Protocol):
    """Keeps samples of this rank that could not be used."""

    def add(self, failures: Sequence[Any]) -> None: ...


@dataclass
class Progress:
    """Counters that a checkpoint carries."""

    step: int = 0
    answer_tokens: int = 0
    text_tokens: int = 0
    image_tokens: int = 0
    samples: int = 0
    bad_samples: int = 0
    left_out: int = 0
    skipped_steps: int = 0


@dataclass
class State:
    """What the loop works on.

    :param checkpoints: None: nothing is saved, as in a benchmark.
    :param quarantine: None: bad samples are counted alone.
    :param meter: measures time, memory and work of this rank.
    """

    engine: TrainingEngine
    loader: Loader
    log: Log
    progress: Progress = field(default_factory=Progress)
    checkpoints: Checkpoints | None = None
    quarantine: Failures | None = None
    meter: Meter = field(default_factory=Meter)
