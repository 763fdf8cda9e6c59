"""Training with and without validations on two ranks, in every ZeRO stage.

`python -m tests.helpers.validation_steps DATA COPIES OUT`, under torchrun: each case trains the
same tiny model on the same data twice, validating in one run only, and compares. One launch runs
all cases, since starting DeepSpeed takes longer than any of them. Prints one JSON line a case.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

import casa_train.engine.engine
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.data.build import open_data
from casa_train.distributed.random_state import rng_state
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine, start_model
from casa_train.evaluate.attention_while_training import WatchedSamples
from casa_train.evaluate.benchmarks.while_training import open_benchmarks
from casa_train.evaluate.held_out import open_held_out, score
from casa_train.evaluate.measured import open_measured
from casa_train.evaluate.questions import Questions
from casa_train.io.precision import DTYPES
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.setup.inputs import check_inputs
from casa_train.setup.weights import find_weights, open_sources, start_weights
from casa_train.train import build_run
from tests.helpers.commands import TINY, on_data

T = TypeVar("T")
CASES = {
    "stage 1": ["parallel.zero_stage=1"],
    "stage 2": ["parallel.zero_stage=2"],
    "stage 3": ["parallel.zero_stage=3"],
    "stage 3, insertion": ["parallel.zero_stage=3", "fusion=insertion", "evaluation.ask=last"],
    "stage 3, gated": ["parallel.zero_stage=3", "fusion=gated_cross_attention"],
    "stage 2, bf16": ["parallel.zero_stage=2", "parallel.precision=bf16"],
}
STEPS = 4
ATTENTION = 1  # samples of each source: an odd number of them all
# What both runs must have in common, bit for bit.
EXACT = ("loss", "gradient_norm", "rates", "samples_digest", "answer_tokens", "sources")


def draw_everywhere(*_: Any) -> None:
    """What a model with dropout does: it uses up random numbers."""
    torch.rand(1), random.random(), np.random.rand()


class Alone(Ranks):
    """One process by itself, whatever process group it is in."""

    def gather(self, value: T) -> list[T]:
        return [value]


def train(config: Config, ranks: Ranks, run_dir: Path, validates: bool) -> dict[str, Any]:
    """One run of a few steps, with validations or without.

    :return: the records of its steps, its random generators at the end, and what its last
        validation has to equal: the same computed by one process with the whole weights.
    """
    checked = check_inputs(config, ranks.world)
    model, processor = checked.model, checked.processor
    data = open_data(config, processor, {}, ranks.world, ranks.gather)
    start_model(config, model, checked.start, ranks)
    model.register_forward_hook(draw_everywhere)
    engine, loader = build_engine(config, model, ranks), data.loader(ranks.rank)
    measured = open_measured(config, processor, ranks)
    assert measured is not None and measured.held_out is not None
    held_out = measured.held_out
    run_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = CheckpointManager(run_dir / "checkpoints", config.checkpoint, {}, ranks)
    whole = config, ranks, engine, loader, run_dir, checkpoints
    run = build_run(*whole, measured=measured if validates else None)
    run.trainer.run()
    result: dict[str, Any] = {"generators": rng_state()}
    ranks.barrier()
    result["records"] = [
        {"step": record["step"], **{k: record.get(k) for k in EXACT}}
        for record in read_metrics(run_dir / "metrics.jsonl")
    ]
    if validates:
        weights = {n: engine.full_parameter(p).clone() for n, p in model.named_parameters()}
        plain = check_inputs(config, ranks.world).model
        start = find_weights(plain, open_sources(config))
        dtype = DTYPES[config.parallel.precision]
        start_weights(plain, start, config.seed, ranks.device, dtype, lambda block: None)
        plain.load_state_dict(weights, strict=False)
        plain.eval()
        alone = open_held_out(config, processor, 1)
        assert alone is not None and alone.digest == held_out.digest
        result["expected"] = score(alone, plain, Alone())
        questions = Questions(held_out, processor, config)
        result["answers"] = questions.answer(plain, ranks.device)
        result["attention"] = WatchedSamples(alone, ATTENTION).measure(plain, Alone())
        result["benchmarks"] = {
            benchmark.name: benchmark.measure(plain, Alone(device=ranks.device))
            for benchmark in open_benchmarks(config, processor, Alone())
        }
        result["batches"] = [len(benchmark.batches) for benchmark in measured.benchmarks]
        result["packs"] = [len(alone.packs), len(held_out.packs)]
    engine.close()
    return result


def main() -> None:
    data, copies, out = map(Path, sys.argv[1:4])
    torch.set_num_threads(1)
    # So that ZeRO-3 cuts and gathers tiny tensors, too.
    casa_train.engine.engine.PERSISTENT_BELOW = 0
    ranks = init_processes()
    settings = ["evaluation.every=2", "evaluation.loss_samples=20", "evaluation.max_new_tokens=12"]
    settings += [f"evaluation.attention_while_training={ATTENTION}"]
    settings += [f"trainer.steps={STEPS}", "trainer.log_every=2", "checkpoint.every=100"]
    asked = f"chartqa: {{source: {copies}, samples: 5}}, mme: {{source: {copies}, samples: 4}}"
    settings += [f"evaluation.benchmarks={{{asked}}}", "evaluation.questions=5"]
    settings += ["optim.warmup_steps=0", "optim.decay_steps=0", "metrics.tensorboard=false"]
    for name, more in CASES.items():
        config = compose_config(
            ["+experiment=demo", *TINY, *on_data(data), "data.packs_per_step=4", *settings, *more]
        )
        with_it = train(config, ranks, out / name, validates=True)
        without = train(config, ranks, out / f"{name}, without", validates=False)
        generators = (with_it["generators"], without["generators"])
        same = {
            "records": with_it["records"] == without["records"],
            "python": generators[0]["python"] == generators[1]["python"],
            "torch": torch.equal(generators[0]["torch"], generators[1]["torch"]),
            "numpy": str(generators[0]["numpy"]) == str(generators[1]["numpy"]),
        }
        everyone = ranks.gather((same, with_it["expected"], with_it["answers"]))
        if ranks.first:
            line = {
                "case": name,
                "same": [theirs for theirs, _, _ in everyone],
                "loss": [r["loss"] for r in with_it["records"]],
                "validated": read_metrics(out / name / "validation.jsonl"),
                "expected": with_it["expected"],
                "answers": with_it["answers"],
                "attention": with_it["attention"],
                "benchmarks": with_it["benchmarks"],
                "batches": with_it["batches"],
                "packs": with_it["packs"],
            }
            print(json.dumps(line), flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
