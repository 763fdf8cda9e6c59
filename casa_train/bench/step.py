"""Training steps of whole experiments at full size and budgets, random weights, side by side."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch

from casa_train.bench._arm import Arm
from casa_train.bench._benchmark import (
    Benchmark,
    Report,
    describe_machine,
    machine,
)
from casa_train.config.bounds import local_path
from casa_train.config.compose import add_config_dir
from casa_train.distributed.ranks import Ranks
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.io.numbers import GIB, count
from casa_train.io.precision import DTYPES
from casa_train.io.tables import aligned

METHOD = """\
Builds each experiment at its own sizes, with random weights, as a run would: the same engine, loop,
optimiser, precision and ZeRO stage. Every pack is full in both budgets, with images of the largest
size and a loss on every text token; the packs are made before the clock starts, so nothing waits
for data. A rank does as many micro-steps as in the experiment with its own number of ranks
(planned_ranks). Experiments run one after another, --rounds times in turn; times are medians over
all steps after the warm-up. Work counts attended pairs and nothing that activation checkpointing
repeats (cost/work.py). Sizes come from config.json where it can be read, from recorded_sizes.json
otherwise. With --compile every experiment runs twice, with eager and with compiled blocks; the
compilation falls into the warm-up. With --profile, some more steps are taken apart after the timed
ones: where their milliseconds go, beside the least that each part could take by its work or its
bytes; one more is recorded as DIR/EXPERIMENT.trace.json, for Perfetto. The packs are ready, so that
data wait is nothing there.

An experiment is a name in conf/experiment (or --config-dir), with overrides behind commas:
    python -m casa_train.bench step helium_casa helium_insertion
    python -m casa_train.bench step demo demo,fusion=insertion --set parallel.precision=bf16
    python -m casa_train.bench step demo --compile
    torchrun --standalone --nproc_per_node=8 -m casa_train.bench step
Helium1-2B with its whole optimiser fits on one GPU of 80 GB by the estimate of dry_run with
    python -m casa_train.bench step --set parallel.activation_checkpointing=vision
"""

DEFAULT = ["helium_casa", "helium_insertion"]


def run(arguments: argparse.Namespace) -> Report:
    """:raises UserError: an experiment that cannot be built or does not fit."""
    for name in ("steps", "rounds"):
        if getattr(arguments, name) < 1:
            raise UserError(
                f"--{name} is {getattr(arguments, name)}; it must be at least 1. Raise it."
            )
    for name in ("device", "dtype"):
        if getattr(arguments, name) is not None:
            raise UserError(
                f"--{name} is {getattr(arguments, name)!r}; expected none: a step runs as a run "
                "would. Hide the GPUs with CUDA_VISIBLE_DEVICES, or write "
                "--set parallel.precision=fp32."
            )
    if arguments.profile is not None:
        try:
            arguments.profile.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--profile {arguments.profile}: it cannot be made ({error}); expected a folder "
                "that can be written. Name another."
            ) from error
    ranks = init_processes()
    try:
        return _measure(arguments, ranks)
    except UserError:  # on all ranks alike
        leave_processes()
        raise


def _measure(arguments: argparse.Namespace, ranks: Ranks) -> Report:
    world, device = ranks.world, ranks.device
    arms = [
        Arm(name, arguments.set, world, arguments.config_dir, compiled)
        for name in arguments.experiments or DEFAULT
        for compiled in ((False, True) if arguments.compile else (None,))
    ]
    for _ in range(arguments.rounds):
        for arm in arms:
            numbers = arguments.steps, arguments.warm_up, ranks, arguments.seed
            arm.measure(*numbers, traces=arguments.profile)
            if ranks.first:  # what is known if a later one fails
                print(f"{arm.name}: {arm.said()}", file=sys.stderr, flush=True)
                if arguments.json:
                    done = _data([arm for arm in arms if arm.records], ranks)
                    write_atomic(arguments.json, json.dumps(done, indent=1) + "\n")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    data = _data(arms, ranks)
    results, facts = data["results"], data["machine"]
    ranks.barrier()
    leave_processes()
    if not ranks.first:
        return Report("", data)
    lines = [_table(arms, results, facts, world)]
    for arm in arms:
        lines += arm.parts_lines()
    return Report("\n".join(lines), data)


def _data(arms: Sequence[Arm], ranks: Ranks) -> dict[str, Any]:
    """What was measured of these, and where."""
    results = [arm.result() for arm in arms]
    facts = machine(ranks.device, DTYPES[arms[0].config.parallel.precision])
    threads = [result["threads"] for result in results]
    facts["threads"] = threads[0] if len(set(threads)) == 1 else threads  # one of each
    return {"machine": facts, "ranks": ranks.world, "results": results}


def _table(
    arms: Sequence[Arm], results: Sequence[dict[str, Any]], facts: dict[str, Any], world: int
) -> str:
    """Two experiments as columns with their ratio; more of them as rows."""
    measures = (
        ("seconds a step", "s/step", "seconds", 1, "{:.3f}"),
        ("text tokens/s", "text/s", "text_tokens_per_second", 1, "{:,.0f}"),
        ("image tokens/s", "image/s", "image_tokens_per_second", 1, "{:,.0f}"),
        ("GFLOP of a pack", "GFLOP/pack", "operations_per_pack", 1e9, "{:,.1f}"),
        ("GFLOP/s of a rank", "GFLOP/s", "tflops", 1e-3, "{:,.1f}"),
        ("MFU, %", "MFU %", "mfu", 0.01, "{:.1f}"),
        ("peak memory of a rank, GiB", "peak GiB", "peak_bytes", GIB, "{:.3f}"),
        ("parameters, million", "M params", "parameters", 1e6, "{:,.1f}"),
    )
    first = results[0]
    known = [measure for measure in measures if first[measure[2]] is not None]
    if len(results) > 2:
        rows = [["", "time", *(short for _, short, *_ in known)]]
        for result in results:
            ratio = f"{result['seconds'] / first['seconds']:.2f}"
            numbers = [form.format(result[key] / unit) for *_, key, unit, form in known]
            rows.append([result["experiment"], ratio, *numbers])
    else:
        ratios = results[1:]
        rows = [["", *(result["experiment"] for result in results), *("ratio" for _ in ratios)]]
        for label, _, key, unit, form in known:
            numbers = [form.format(result[key] / unit) for result in results]
            rows.append(
                [label, *numbers, *(f"{result[key] / first[key]:.2f}" for result in ratios)]
            )
    notes = [
        f"{arm.name}: {arm.micro_steps} micro-steps a rank and step, packs of "
        f"{result['text_tokens'] // arm.micro_steps // world} text and "
        f"{result['image_tokens'] // arm.micro_steps // world} image tokens"
        + (
            f"; {count(result['graphs'], 'graph')} compiled in {result['compile_seconds']:.1f} s"
            if result.get("graphs")
            else ""
        )
        + "".join(f"; {note}" for note in dict.fromkeys(arm.notes))
        for arm, result in zip(arms, results, strict=True)
    ]
    return "\n".join(
        [aligned(rows), "", *notes, f"{count(world, 'rank')}; {describe_machine(facts)}"]
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "experiments",
        nargs="*",
        metavar="EXPERIMENT",
        help=f"name,override,... (default: {' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="overrides for every experiment, such as parallel.zero_stage=3",
    )
    parser.add_argument(
        "--compile", action="store_true", help="each experiment with eager and with compiled blocks"
    )
    add_config_dir(parser)
    parser.add_argument("--steps", type=int, default=5, help="that are timed (default: 5)")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them (default: 2)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each (default: 1)")
    parser.add_argument(
        "--profile",
        type=local_path,
        metavar="DIR",
        help="also take steps apart: milliseconds by part, and a trace of a step in DIR",
    )


BENCHMARK = Benchmark(
    measures="training steps of experiments at full size: tokens/s, MFU and peak memory",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
