"""Runs of tiny models on packs made up here, put together as `train` puts its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from casa_train.config.schema import (
    Config,
    DataConfig,
    MetricsConfig,
    OptimConfig,
    ParallelConfig,
    TrainerConfig,
)
from tests.helpers.tiny import HARD_PACK, fill, packed_inputs, tiny_model


def tiny_settings(
    optim: OptimConfig,
    stage: int,
    precision: str = "fp32",
    packs: int = 2,
    checkpointed: str = "none",
    compile_blocks: str = "auto",
    joint_keys: str = "auto",
) -> Config:
    """The configuration of such a run, as far as there is one.

    :param packs: of a step, over all ranks; :param checkpointed: blocks whose activations are.
    :param compile_blocks: auto, off or on; :param joint_keys: auto or off.
    """
    return Config(
        name="tiny",
        optim=optim,
        parallel=ParallelConfig(stage, precision, checkpointed, compile_blocks, joint_keys),
        data=DataConfig(packs_per_step=packs, max_bad_share=1.0),
        trainer=TrainerConfig(worst_case=False),
        metrics=MetricsConfig(tensorboard=False),
    )


def tiny_batch(
    seed: int, sample_id: str, sources: list[tuple[str, int]], operations: int = 0
) -> Any:
    """A micro-step's data: the hard pack, filled from a seed.

    :param sources: names and answer tokens, which are the first ones of the text.
    """
    inputs = packed_inputs(fill(HARD_PACK, seed))
    count = sum(tokens for _, tokens in sources)
    inputs.logits_index = torch.arange(count)
    return SimpleNamespace(
        inputs=inputs,
        targets=inputs.input_ids[1 : count + 1],
        answer_sources=sources,
        sample_ids=[sample_id],
        text_tokens=18,
        image_tokens=10,
        fills=(1.0, 1.0),
        pairs=1,
        failures=[],
        left_out=0,
        operations=operations,
    )


class PlainEngine:
    """One process without sharding or DeepSpeed.

    :param seen: notes each update.
    """

    def __init__(self, seen: list[tuple[str, str, Any]] | None = None) -> None:
        self.module = tiny_model().train()
        self.seen = [] if seen is None else seen
        parameters = list(self.module.parameters())
        group = {"params": parameters, "name": "all", "lr": 0.0, "base_lr": 1e-3}
        self.optimizer = torch.optim.SGD([group])
        self.param_groups = self.optimizer.param_groups

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.seen.append(("engine", "step", None))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step_applied(self) -> bool:
        return True

    def gradient_norm(self) -> float:
        return 1.0

    def save(self, directory: Path) -> None: ...

    def load(self, directory: Path) -> None: ...

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        return parameter.grad

    def full_parameter(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        return parameter


class Lines:
    """A sink that keeps lines, and records where it is given a list for them."""

    def __init__(self, lines: list[str], records: list[dict[str, Any]] | None = None) -> None:
        self.lines, self.records = lines, records

    def write(self, record: dict[str, Any]) -> None:
        if self.records is not None:
            self.records.append(record)

    def validated(self, record: dict[str, Any]) -> None: ...

    def log(self, line: str) -> None:
        self.lines.append(line)

    def close(self) -> None: ...


class Packs:
    """The same pack in every step."""

    def next_step(self) -> list[Any]:
        return [tiny_batch(0, "only", [("a", 4)])]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
