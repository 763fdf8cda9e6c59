"""Training with and without validations on two ranks, in every ZeRO stage.

`python -m tests.helpers.validation_steps DATA OUT`, under torchrun: each case trains the same tiny
model on the same data twice, validating in one life only, and compares. One launch runs all cases,
since starting DeepSpeed takes longer than any of them. Prints one JSON line a case.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

import casa_train.engine.engine
from casa_train.config.compose import compose_config
from casa_train.config.schema import Config
from casa_train.data.build import open_data
from casa_train.distributed.random_state import rng_state, seed_all
from casa_train.distributed.ranks import gather
from casa_train.engine.engine import Engine, init_processes, leave_processes
from casa_train.evaluate.held_out import open_held_out, score
from casa_train.evaluate.questions import Questions
from casa_train.evaluate.validation import Validator
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.setup.optim import build_groups, build_optimizer, set_rates
from casa_train.setup.precision import DTYPES
from casa_train.setup.weights import find_weights, open_sources, start_weights
from casa_train.train import check_inputs
from casa_train.training.loop import Trainer
from tests.helpers.commands import TINY, on_data

CASES = {
    "stage 1": ["parallel.zero_stage=1"],
    "stage 2": ["parallel.zero_stage=2"],
    "stage 3": ["parallel.zero_stage=3"],
    "stage 3, insertion": ["parallel.zero_stage=3", "fusion=insertion"],
    "stage 2, bf16": ["parallel.zero_stage=2", "parallel.precision=bf16"],
}
STEPS = 4
# What two lives must have in common, bit for bit.
EXACT = ("loss", "gradient_norm", "rates", "samples_digest", "answer_tokens", "sources")


def draw_everywhere() -> None:
    """What a model with dropout does: it uses up random numbers."""
    torch.rand(1), random.random(), np.random.rand()


def life(config: Config, path: Path | None, rank: int, world: int) -> dict[str, Any]:
    """One run of a few steps.

    :param path: of the validation records; None: without validations.
    :return: the records of its steps, its random generators at the end, and what its last
        validation has to equal: the same computed by one process with the whole weights.
    """
    device = torch.device("cpu")
    checked = check_inputs(config, world)
    model, processor = checked.model, checked.processor
    data = open_data(config, processor, {}, world, gather)
    dtype = DTYPES[config.parallel.precision]
    start_weights(model, checked.start, config.seed, device, dtype, lambda block: None)
    seed_all(config.seed + rank)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    engine = Engine(
        model,
        build_optimizer(groups, config.optim),
        config.parallel.zero_stage,
        config.parallel.precision,
        config.data.packs_per_step // world,
        config.optim.clip,
    )
    engine.train()
    forward = engine.forward

    def random_forward(**inputs: Any) -> Any:
        draw_everywhere()
        return forward(**inputs)

    engine.forward = random_forward  # type: ignore[method-assign]
    validator = None
    if path is not None:
        held_out = open_held_out(config, processor, world)
        assert held_out is not None
        questions = Questions(held_out, processor, config)
        validator = Validator(
            engine, held_out, questions, path, 2, STEPS, 0, rank, world, device, gather, [], int
        )
    records: list[dict[str, Any]] = []

    class Keep:
        def write(self, record: dict[str, Any]) -> None:
            records.append({"step": record["step"], **{k: record.get(k) for k in EXACT}})

        def validated(self, record: dict[str, Any]) -> None: ...

        def log(self, line: str) -> None: ...

        def close(self) -> None: ...

    Trainer(
        engine=engine,
        loader=data.loader(rank),
        device=device,
        world=world,
        steps=STEPS,
        save_every=100,
        max_bad_share=1.0,
        set_rates=lambda step: set_rates(engine.param_groups, 1.0),
        save=lambda *arguments: None,
        quarantine=lambda failures: None,
        gather=gather,
        sinks=[Keep()],
        source_every=2,
        validate=validator or (lambda step: False),
    ).run()
    result: dict[str, Any] = {"records": records, "generators": rng_state()}
    if path is not None:
        weights = {n: engine.full_parameter(p).clone() for n, p in model.named_parameters()}
        plain = check_inputs(config, world).model
        start = find_weights(plain, open_sources(config))
        start_weights(plain, start, config.seed, device, dtype, lambda block: None)
        plain.load_state_dict(weights, strict=False)
        plain.eval()
        alone = open_held_out(config, processor, 1)
        assert alone is not None and alone.digest == held_out.digest
        result["expected"] = score(alone, plain, 0, 1, device, lambda value: [value])
        result["answers"] = questions.answer(plain, device)
        result["packs"] = [len(alone.packs), len(held_out.packs)]
    engine.close()
    return result


def main() -> None:
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    casa_train.engine.engine.PERSISTENT_BELOW = (
        0  # so that ZeRO-3 cuts and gathers tiny tensors, too
    )
    rank, world, _ = init_processes()
    settings = ["evaluation.every=2", "evaluation.loss_samples=20", "evaluation.max_new_tokens=4"]
    for name, more in CASES.items():
        config = compose_config(
            ["+experiment=demo", *TINY, *on_data(data), "data.packs_per_step=4", *settings, *more]
        )
        path = out / f"{name}.jsonl"
        with_it = life(config, path, rank, world)
        without = life(config, None, rank, world)
        generators = (with_it["generators"], without["generators"])
        same = {
            "records": with_it["records"] == without["records"],
            "python": generators[0]["python"] == generators[1]["python"],
            "torch": torch.equal(generators[0]["torch"], generators[1]["torch"]),
            "numpy": str(generators[0]["numpy"]) == str(generators[1]["numpy"]),
        }
        ranks = gather((same, with_it["expected"], with_it["answers"]))
        if rank == 0:
            line = {
                "case": name,
                "same": [theirs for theirs, _, _ in ranks],
                "loss": [r["loss"] for r in with_it["records"]],
                "validated": read_metrics(path),
                "expected": with_it["expected"],
                "answers": with_it["answers"],
                "packs": with_it["packs"],
            }
            print(json.dumps(line), flush=True)
    leave_processes()


if __name__ == "__main__":
    main()
