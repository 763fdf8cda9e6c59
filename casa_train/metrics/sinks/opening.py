"""All sinks of a run as one, opened as its configuration has them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.metrics.sinks.base import Record, Sink
from casa_train.metrics.sinks.console import ConsoleSink
from casa_train.metrics.sinks.guarded import Guarded
from casa_train.metrics.sinks.jsonl import JsonlSink, keep_steps
from casa_train.metrics.sinks.tensorboard import TensorBoardSink
from casa_train.metrics.sinks.wandb import WandbSink, switched_off


class Sinks:
    """The sinks of a run: a sink itself. The first rank alone has any.

    Before they are opened and once they are closed, lines are printed: a run speaks before its
    first step, and exports after its last one.

    :param more: others than those that the configuration names; open already.
    """

    def __init__(self, ranks: Ranks, more: Sequence[Sink] = ()) -> None:
        self.ranks = ranks
        self._sinks = list(more)

    def open(self, config: Config, metrics: Path, after_step: int) -> None:
        """See `open_sinks`."""
        if self.ranks.first:
            self._sinks = [*open_sinks(config, metrics, after_step), *self._sinks]

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def validated(self, record: Record) -> None:
        for sink in self._sinks:
            sink.validated(record)

    def log(self, line: str) -> None:
        for sink in self._sinks:
            sink.log(line)
        if not self._sinks:
            self.ranks.log(line)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
        self._sinks = []


def open_sinks(config: Config, metrics: Path, after_step: int) -> list[Sink]:
    """All sinks of a run as its configuration has them; what it reported earlier is continued.

    :param metrics: the file of metrics.jsonl.
    :param after_step: last step that is not repeated; lines of later ones are dropped.
    """
    keep_steps(metrics, after_step)
    wanted, run_dir = config.metrics, metrics.parent
    console = Guarded(
        "the console",
        lambda: ConsoleSink(config.trainer.steps, after_step, config.trainer.log_every),
        warn=lambda line: None,  # there is nobody left to tell
    )
    sinks: list[Sink] = [JsonlSink(metrics, warn=console.log), console]
    if wanted.tensorboard:
        sinks.append(
            Guarded(
                "metrics.tensorboard",
                lambda: TensorBoardSink(run_dir / "tensorboard", after_step),
                warn=console.log,
            )
        )
    if wanted.wandb and switched_off():
        console.log("wandb: nothing is reported, WANDB_MODE=disabled")
    elif wanted.wandb:
        sinks.append(
            Guarded(
                "metrics.wandb",
                lambda: WandbSink(run_dir, config, console.log),
                warn=console.log,
            )
        )
    return sinks
