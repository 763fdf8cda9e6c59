"""An experiment that is measured: built as a run would be, on full packs that are there already."""

from __future__ import annotations

import gc
import hashlib
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from casa_train.bench._timing import peak_bytes, synchronise, tensor_bytes
from casa_train.config.compose import compose_config
from casa_train.config.micro_steps import PLANNED_RANKS, micro_steps
from casa_train.cost.full_pack import full_inputs, full_pack
from casa_train.cost.sizes import size_model, work_counter
from casa_train.data.materialize import PackedBatch
from casa_train.data.processor import token_side_of
from casa_train.distributed.ranks import Ranks
from casa_train.distributed.threads import use_threads
from casa_train.engine.starting import build_engine, start_model
from casa_train.errors import UserError
from casa_train.io.numbers import GIB, count
from casa_train.modeling.windows import Chunk
from casa_train.setup.equal_parameters import match_parameters
from casa_train.setup.model import meta_model
from casa_train.setup.pretrained import Stored
from casa_train.setup.weights import Start
from casa_train.train import Run, build_run
from casa_train.training.roofline import Roofline
from casa_train.training.step_profile import StepParts, WatchedStep, mean_of, parts_table

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


def batch_of(
    pack: Sequence[Chunk], vocabulary: int, operations: int, seed: int, side: int
) -> PackedBatch:
    """A micro-step of random text and pictures with these lengths; every token is an answer.

    :param side: pixels of an image token's side.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = full_inputs(pack, "cpu", side)
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
        matching = match_parameters(self.config, size_model(self.config, self.notes))
        self.config, self.model_config = matching.config, matching.model_config
        self.notes += matching.notes
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
            trace = traces / trace_name(self.name) if traced else None
            meter.watch = watched = WatchedStep(model, ranks.device, trace)
            run.trainer.train_step(run.state.progress.step + 1)
            if not last:
                self.parts.append(list(ranks.gather(watched.parts(roofline))))
            elif ranks.first:
                try:
                    watched.write_trace()
                except OSError as error:
                    self.notes.append(f"the trace was not written: {error}")

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
        batch = batch_of(
            self.pack, text.vocab_size, self.operations, seed, token_side_of(self.config)
        )
        if ranks.device.type == "cuda":
            batch = batch.pin_memory()  # as loaders do
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

    def said(self) -> str:
        """What was measured, in short."""
        seconds = statistics.median(record["seconds"] for record in self.records)
        compiled = f", {self.compile_seconds:.0f} s of compilation" if self.graphs else ""
        return f"{seconds:.3f} s a step, {self.peak / GIB:.2f} GiB at the peak{compiled}"

    def parts_lines(self) -> list[str]:
        """The steps taken apart, as a table with its title."""
        if not self.parts:
            return []
        title = f"{self.name} by part, means of {count(len(self.parts), 'step')} of their own"
        table = parts_table([mean_of(steps) for steps in zip(*self.parts, strict=True)])
        return ["", title, table, self.floors]


def trace_name(experiment: str) -> str:
    """The file of an experiment's trace; many overrides are cut short, and told apart by a hash."""
    name = experiment.replace("/", "_")
    if len(name) > 100:
        name = f"{name[:90]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return f"{name}.trace.json"


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
