"""Training steps of whole experiments at full size and budgets, random weights, side by side."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from casa_train.bench._benchmark import (
    Benchmark,
    Report,
    describe_machine,
    machine,
)
from casa_train.bench._timing import peak_bytes, synchronise, tensor_bytes
from casa_train.config.bounds import local_path
from casa_train.config.compose import add_config_dir, compose_config
from casa_train.config.micro_steps import PLANNED_RANKS, micro_steps
from casa_train.cost.full_pack import full_inputs, full_pack
from casa_train.cost.sizes import size_model, work_counter
from casa_train.data.materialize import PackedBatch
from casa_train.distributed.ranks import Ranks
from casa_train.distributed.threads import use_threads
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine, start_model
from casa_train.errors import UserError
from casa_train.io.numbers import GIB, count
from casa_train.io.precision import DTYPES
from casa_train.io.tables import aligned
from casa_train.modeling.windows import Chunk
from casa_train.setup.model import meta_model
from casa_train.setup.pretrained import Stored
from casa_train.setup.weights import Start
from casa_train.train import Run, build_run
from casa_train.training.roofline import Roofline
from casa_train.training.step_profile import StepParts, WatchedStep, mean_of, parts_table

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
TAKEN_APART = 3  # steps


class FullPacks:
    """A loader whose every micro-step is the same full pack."""

    def __init__(self, pack: PackedBatch, micro_steps: int) -> None:
        self.pack, self.micro_steps = pack, micro_steps

    def next_step(self) -> Sequence[PackedBatch]:
        return [self.pack] * self.micro_steps

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no position: every step is the same."""


def batch_of(pack: Sequence[Chunk], vocabulary: int, operations: int, seed: int) -> PackedBatch:
    """A micro-step of random text and pictures with these lengths; every token is an answer."""
    generator = torch.Generator().manual_seed(seed)
    inputs = full_inputs(pack, "cpu")
    for image in inputs.images:
        image.random_(256, generator=generator)
    inputs.input_ids.random_(vocabulary, generator=generator)
    return PackedBatch(
        index=0,
        inputs=inputs,
        targets=inputs.input_ids.roll(-1),
        answer_sources=[("random", sample.text) for sample in pack],
        sample_ids=[f"random/{i}" for i in range(len(pack))],
        sources=["random"] * len(pack),
        text_tokens=len(inputs.input_ids),
        image_tokens=sum(sample.image_tokens for sample in pack),
        fills=(1.0, 1.0),
        pairs=len(pack),
        operations=operations,
    )


class Arm:
    """One experiment that is measured.

    :param name: an experiment, with overrides behind commas.
    :param overrides: for every experiment.
    :param config_dir: a folder of the user's own with more experiments.
    :param compiled: whether its blocks are; None: as its configuration has it.
    :raises UserError: naming what does not hold.
    """

    def __init__(
        self,
        name: str,
        overrides: Sequence[str],
        world: int,
        config_dir: Path | None = None,
        compiled: bool | None = None,
    ) -> None:
        experiment, *own = name.split(",")
        # A dry run may leave paths open.
        more = [*overrides, *own, "dry_run=true"]
        if compiled is not None:
            more.append(f"parallel.compile={'on' if compiled else 'off'}")
        self.name = f"{name}, compiled" if compiled else name
        self.graphs, self.compile_seconds = 0, 0.0
        self.config = compose_config([f"+experiment={experiment}", *more], config_dir)
        if planned := self.config.planned_ranks:
            self.micro_steps = micro_steps(self.config.data, planned, PLANNED_RANKS)
        else:
            self.micro_steps = micro_steps(self.config.data, world)
        self.notes: list[str] = []
        self.model_config = size_model(self.config, self.notes)
        self.pack = full_pack(self.config)
        model = meta_model(self.config, self.model_config)
        self.operations = work_counter(self.config, model)(self.pack, self.config.data.text_tokens)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.records: list[dict[str, Any]] = []
        self.parts: list[list[StepParts]] = []  # of each step taken apart those of each rank
        self.floors = ""  # what they come from
        self.peak = self.threads = 0

    def measure(
        self, steps: int, warm_up: int, ranks: Ranks, seed: int, traces: Path | None = None
    ) -> None:
        """Builds the model, takes steps and leaves nothing behind; collective.

        :param traces: takes a trace, and steps are taken apart; None: they are not.
        :raises UserError: the memory of the device does not hold it.
        """
        use_threads(self.config.parallel.threads)
        self.threads = torch.get_num_threads()
        try:
            more = 0 if traces is None else TAKEN_APART + 1
            run = self._build(ranks, seed, last=warm_up + steps + more + 1)
            for step in range(1, warm_up + steps + 1):
                synchronise(ranks.device)
                record = run.trainer.train_step(step)
                if step > warm_up:
                    self.records.append(record)
            if traces is not None:
                self._take_apart(run, ranks, traces)
            self.peak = max(self.peak, _peak(run, ranks.device))
            if (clock := run.engine.clock) is not None:
                self.graphs += clock.graphs
                self.compile_seconds += clock.seconds
            ranks.barrier()
            run.engine.close()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.name} does not fit: {str(error).splitlines()[0]} Expected enough memory "
                f"for a pack of {self.config.data.text_tokens} text and "
                f"{self.config.data.image_tokens} image tokens. Start more ranks with torchrun, or "
                "write --set parallel.activation_checkpointing=vision, or lower data.image_tokens "
                "and data.text_tokens."
            ) from error

    def _take_apart(self, run: Run, ranks: Ranks, traces: Path) -> None:
        """Steps part by part, and one more for the trace, whose recorder costs time."""
        model, meter = run.engine.module, run.state.meter
        roofline = Roofline(self.config, model, ranks)
        self.floors = roofline.words()
        for last in [False] * TAKEN_APART + [True]:
            traced = last and ranks.first
            trace = traces / f"{self.name.replace('/', '_')}.trace.json" if traced else None
            meter.watch = watched = WatchedStep(model, ranks.device, trace)
            run.trainer.train_step(run.state.progress.step + 1)
            if not last:
                self.parts.append(list(ranks.gather(watched.parts(roofline))))
            elif ranks.first:
                watched.write_trace()

    def _build(self, ranks: Ranks, seed: int, last: int) -> Run:
        """A run as `train` builds it, from random weights, on full packs and without a directory.

        Rates stay at their peak, and nothing is looked at but the steps.
        """
        config = replace(
            self.config,
            seed=seed,
            optim=replace(self.config.optim, warmup_steps=0, decay_steps=0),
            trainer=replace(self.config.trainer, steps=last, log_every=last, audit=False),
            data=replace(self.config.data, packs_per_step=self.micro_steps * ranks.world),
        )
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        model = meta_model(config, self.model_config)
        # Silent: a benchmark says what it measured, not how a run starts.
        silent = replace(ranks, out=_nothing)
        start_model(config, model, Start(Stored(), [], copies=True), silent)
        text: Any = self.model_config.text_config
        batch = batch_of(self.pack, text.vocab_size, self.operations, seed)
        loader = FullPacks(batch, self.micro_steps)
        return build_run(config, ranks, build_engine(config, model, silent), loader)

    def result(self) -> dict[str, Any]:
        """What was measured: over all ranks, but memory and TFLOP/s of one."""

        def median(field: str) -> float | None:
            values = [record[field] for record in self.records]
            return None if None in values else statistics.median(values)

        seconds = [record["seconds"] for record in self.records]
        last = self.records[-1]
        of_ranks = [mean_of(steps) for steps in zip(*self.parts, strict=True)]
        profile = {"parts": [asdict(rank) for rank in of_ranks]} if of_ranks else {}
        return {
            "experiment": self.name,
            "parameters": self.parameters,
            "micro_steps": self.micro_steps,
            "threads": self.threads,
            "text_tokens": last["text_tokens"],
            "image_tokens": last["image_tokens"],
            "seconds": statistics.median(seconds),
            "fastest_seconds": min(seconds),
            "slowest_seconds": max(seconds),
            "text_tokens_per_second": median("text_tokens_per_second"),
            "image_tokens_per_second": median("image_tokens_per_second"),
            "operations_per_pack": self.operations,
            "tflops": median("tflops"),
            "mfu": median("mfu"),
            "peak_bytes": self.peak,
            "graphs": self.graphs,
            "compile_seconds": self.compile_seconds,
            "loss": last["loss"],
            **profile,
        }

    def parts_lines(self) -> list[str]:
        """The steps taken apart, as a table with its title."""
        if not self.parts:
            return []
        title = f"{self.name} by part, means of {count(len(self.parts), 'step')} of their own"
        table = parts_table([mean_of(steps) for steps in zip(*self.parts, strict=True)])
        return ["", title, table, self.floors]


def _nothing(line: str) -> None:
    """Prints nothing."""


def _peak(run: Run, device: torch.device) -> int:
    """The most memory that tensors take; on the CPU of one more step, each allocation counted."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    gc.collect()
    kinds = [(item, type(item)) for item in gc.get_objects()]
    # Those that torch.compile reasons with hold nothing.
    alive = [item for item, kind in kinds if issubclass(kind, Tensor) and kind is not FakeTensor]
    del kinds
    held = tensor_bytes(alive)
    del alive
    following = run.state.progress.step + 1
    return held + peak_bytes(lambda: run.trainer.train_step(following), device)


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
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    results = [arm.result() for arm in arms]
    facts = machine(device, DTYPES[arms[0].config.parallel.precision])
    threads = [result["threads"] for result in results]
    facts["threads"] = threads[0] if len(set(threads)) == 1 else threads  # one of each
    data = {"machine": facts, "ranks": world, "results": results}
    ranks.barrier()
    leave_processes()
    if not ranks.first:
        return Report("", data)
    lines = [_table(arms, results, facts, world)]
    for arm in arms:
        lines += arm.parts_lines()
    return Report("\n".join(lines), data)


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
