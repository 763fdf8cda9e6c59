"""All sinks of a run, opened as its configuration has them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from casa_train.config.schema import Config
from casa_train.metrics.sinks.base import Sink
from casa_train.metrics.sinks.console import ConsoleSink
from casa_train.metrics.sinks.guarded import Guarded
from casa_train.metrics.sinks.jsonl import JsonlSink, keep_steps
from casa_train.metrics.sinks.tensorboard import TensorBoardSink
from casa_train.metrics.sinks.wandb import WandbSink, run_name, switched_off


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
                lambda: WandbSink(
                    run_dir,
                    run_name(config.name, run_dir),
                    wanted.wandb_project,
                    wanted.wandb_entity,
                    wanted.wandb_tags,
                    asdict(config),
                    console.log,
                ),
                warn=console.log,
            )
        )
    return sinks
