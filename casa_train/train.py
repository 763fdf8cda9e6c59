"""Runs a training from top to bottom; the only file that knows every folder.

Everything that a user can get wrong is checked on every rank, with the model on the meta device,
before the run directory is touched and before the first weight is made.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from casa_train.checkpoint.disk_space import check_room, check_writable
from casa_train.checkpoint.manager import CheckpointManager, SavedCheckpoint, Write
from casa_train.config.micro_steps import micro_steps
from casa_train.config.places import absolute, as_before, places
from casa_train.config.schema import Config, fingerprint
from casa_train.cost.peak import peak_tflops
from casa_train.cost.sizes import work_counter
from casa_train.data.build import list_streams, open_data
from casa_train.data.loader import PackLoader, dead_workers_named
from casa_train.data.processor import open_processor
from casa_train.data.shared_memory import check_shared_memory, ranks_beside
from casa_train.data.stream.stream_loader import StreamLoader
from casa_train.data.templates import verdict
from casa_train.distributed.determinism import set_determinism
from casa_train.distributed.random_state import derive_seed, seed_all
from casa_train.distributed.ranks import agree, gather
from casa_train.distributed.threads import use_threads
from casa_train.engine.engine import Engine, init_processes, leave_processes, shard
from casa_train.errors import SaveError, UserError
from casa_train.evaluate.held_out import open_held_out
from casa_train.evaluate.questions import Questions
from casa_train.evaluate.validation import Validator
from casa_train.evaluate.validation import describe as describe_validation
from casa_train.export.background_exports import BackgroundExports
from casa_train.io import log as lines
from casa_train.io.numbers import count
from casa_train.metrics.meter import Meter
from casa_train.metrics.sinks.base import Sink
from casa_train.metrics.sinks.jsonl import last_step
from casa_train.metrics.sinks.opening import open_sinks
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.run.configuration import load_run_config
from casa_train.run.directory import (
    keep_lost_records,
    keep_processor,
    prepare_run_directory,
    record_run,
    request_requeue,
)
from casa_train.run.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    METRICS_FILE,
    PROCESSOR,
    VALIDATION_FILE,
)
from casa_train.run.lock import RunLock
from casa_train.run.quarantine import Quarantine
from casa_train.run.resume_fields import plan_record, refuse_changes
from casa_train.run.starts import STARTS_FILE, StartLog
from casa_train.setup.fusion_start import start_warning
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.optim import (
    build_groups,
    build_optimizer,
    describe,
    fit_schedule,
    rate_factor,
    set_rates,
)
from casa_train.setup.parts import banner
from casa_train.setup.precision import DTYPES
from casa_train.setup.weights import Start, find_weights, open_sources, start_weights
from casa_train.training import memory_probe as worst_case
from casa_train.training.audit import Audit
from casa_train.training.garbage import ScheduledCollection
from casa_train.training.loop import Progress, Trainer
from casa_train.training.signals import EXIT_REQUEUE, StopRequest
from casa_train.training.watchdog import Watchdog


def train(config: Config, stop: StopRequest, last: bool = True) -> int:
    """Runs, or goes on with, the run that `config` describes. Every rank calls it.

    :param stop: listens since before the heavy imports.
    :param last: no other run follows in these processes.
    :return: the exit code: 0 after the last step, 75 when the run left early and wants to be
        started again.
    :raises UserError: on every rank alike, whatever the user can mend.
    """
    use_threads(config.parallel.threads)
    set_determinism(config.trainer.deterministic)
    given, run_dir = config, Path(config.run_dir)
    config = find_places(config, run_dir)
    # Longer than the watchdog waits, which says where each rank hangs; the libraries' own timeouts
    # would abort the processes without a word of that.
    rank, world, device = init_processes(max(30.0, 2 * config.trainer.watchdog_minutes))
    log = lines.log if rank == 0 else _silent
    kept = run_dir / PROCESSOR if config.checkpoint.resume == "auto" else None
    checked = agree(lambda: check_inputs(config, world, kept))
    model = checked.model
    # One rank asks the hub, which may take minutes, and tells the others.
    listed = [agree(lambda: list_streams(config, log) if rank == 0 else {})]
    dist.broadcast_object_list(listed, src=0)
    count_work = work_counter(config, model)
    data = agree(lambda: open_data(config, checked.processor, listed[0], world, gather, count_work))
    beside, pinned = ranks_beside(gather), torch.cuda.is_available()
    agree(lambda: check_shared_memory(config.data, world, beside, pinned))
    held_out = agree(lambda: open_held_out(config, checked.processor, world))
    described = model.config.to_json_string()
    lock = agree(lambda: RunLock(run_dir) if rank == 0 else None)
    stored = replace(config, run_dir=str(run_dir.absolute()))
    agree(lambda: prepare_run_directory(run_dir, stored) if rank == 0 else None)
    fingerprints = {
        "config": fingerprint(config, [name for name, *_ in places(config)]),
        "data": json.dumps(data.fingerprints, sort_keys=True),
        "plan": plan_record(config, checked.processor),
    }
    watchdog = Watchdog(
        60 * config.trainer.watchdog_minutes,
        run_dir / f"stacks_{rank}.txt",
        ask=lambda: _hung(run_dir, checkpoints, this_start),
    )
    checkpoints = CheckpointManager(
        run_dir / CHECKPOINTS,
        config.checkpoint.keep_last,
        config.checkpoint.keep_every,
        fingerprints,
        log,
        phase=watchdog.heartbeat,
    )
    found = checkpoints.latest()
    if found is not None:
        check_resume(found, fingerprints, config, fingerprint(given))
    keep = checked.processor.save_pretrained

    def record() -> None:
        agree(lambda: record_run(run_dir, stored, described) if rank == 0 else None)
        agree(lambda: keep_processor(run_dir, keep) if rank == 0 else None)

    if found is None:
        record()
    agree(lambda: check_writable(run_dir, rank))
    step = found.step if found is not None else 0
    held, shared = len(checkpoints.steps()), found is not None and found.frozen is not None
    agree(lambda: check_room(config, model.parameters(), step, held, shared))

    notes = [*checked.notes, *data.notes]
    if found is None:
        notes += agree(lambda: keep_lost_records(run_dir) if rank == 0 else [])
    for line in banner(config, model, notes, world, device):
        log(line)
    engine, groups = build_engine(config, checked, found is None, world, rank, device, log)
    loader = data.loader(rank)
    progress = Progress()
    if found is not None:
        progress = restore(found, engine, loader, checkpoints, config.seed, world, rank)
        record()  # now that it fits: what a run was is not overwritten by what it cannot become
        log(f"resuming from {found.path} at step {found.step}")
    if progress.step >= config.trainer.steps:
        log(f"nothing to do: {run_dir} holds step {progress.step} of {config.trainer.steps}")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    peak = peak_tflops(gpu, config.parallel.precision, config.metrics.peak_tflops)
    this_start = StartLog(
        run_dir / STARTS_FILE if rank == 0 else None,
        progress,
        {"ranks": world, "device": gpu or "CPU", "peak_tflops": peak},
        last_step(run_dir / METRICS_FILE) if rank == 0 else None,
    )
    sinks: list[Sink] = []
    validator: Validator | None = None
    exports: BackgroundExports | None = None
    reason: str | None = "failure"

    def tell(line: str) -> None:
        for sink in sinks:
            sink.log(line)

    def heartbeat() -> None:
        watchdog.heartbeat()
        if exports is not None:
            exports.proceed()

    def validate(step: int) -> bool:
        return validator is not None and validator(step) and config.export.best

    def save(step: int, write: Write, state: dict[str, Any]) -> None:
        best = validator is not None and validator.best.step == step
        try:
            checkpoints.save(step, write, state)
        except SaveError:
            if best and config.export.best:
                tell(f"warning: step {step} is the best so far, but exports/best stays as it was")
            raise
        if exports is not None:
            exports.saved(step, best)

    try:
        if rank == 0:
            sinks = open_sinks(config, run_dir / METRICS_FILE, progress.step)
            exports = BackgroundExports(run_dir, config.export, tell)
            checkpoints.pinned = exports.pinned
        audit = None
        if config.trainer.audit:
            names = {name: group["name"] for group in groups for name in group["names"]}
            audit = Audit(engine, names, model.mechanism.zero_at_start)
        engine.train()
        collection = ScheduledCollection(config.trainer.gc_every)
        with watchdog, this_start, dead_workers_named(rank), collection:
            if worst_case.wanted(config, device) and progress.step < config.trainer.steps:
                worst_case.WorstCase(config, engine, device, log, fresh=found is None).run()
                heartbeat()
            if held_out is not None:
                questions = Questions(held_out, checked.processor, config)
                for line in describe_validation(held_out, questions, config, data.fingerprints):
                    tell(line)
                validator = Validator(
                    engine,
                    held_out,
                    questions,
                    run_dir / VALIDATION_FILE,
                    config.evaluation.every,
                    config.trainer.steps,
                    progress.step,
                    rank,
                    world,
                    device,
                    gather,
                    sinks,
                    heartbeat,
                )
                validator.catch_up(progress.step)
            elif config.evaluation.every:
                tell("no validation: data.validation names no held-out split")
            if exports is not None:
                best_step = validator.best.step if validator is not None else 0
                exports.catch_up(checkpoints.steps(), best_step)
            reason = Trainer(
                engine=engine,
                loader=loader,
                device=device,
                world=world,
                steps=config.trainer.steps,
                save_every=config.checkpoint.every,
                max_bad_share=config.data.max_bad_share,
                set_rates=lambda step: set_rates(engine.param_groups, _factor(config, step)),
                save=save,
                quarantine=Quarantine(run_dir / f"quarantine_{rank}.jsonl").add,
                gather=gather,
                sinks=sinks,
                audit=audit,
                progress=progress,
                stop_flags=stop.flags,
                heartbeat=heartbeat,
                collect=collection.after,
                validate=validate,
                max_skipped=config.trainer.max_skipped_steps,
                source_every=config.trainer.log_every,
                meter=Meter(device, peak, this_start.number),
            ).run()
            this_start.reason = reason
    finally:
        if exports is not None and reason is not None:
            exports.close()
        if validator is not None:
            validator.close()
        for sink in sinks:
            sink.close()
    if reason is not None:
        saved = max(checkpoints.steps(), default=0)  # of an earlier step, if this save failed
        agree(lambda: request_requeue(run_dir, saved, reason) if rank == 0 else None)
        log(
            f"left after step {progress.step} of {config.trainer.steps} ({reason}); the same "
            f"command goes on from step {saved}. Exit code {EXIT_REQUEUE}"
        )
    dist.barrier()
    engine.close()
    if lock is not None and (exports is None or not exports.pinned()):
        lock.close()
    dist.barrier()
    if last:
        # All ranks together: NCCL's communicators end when every rank of a node ends them.
        leave_processes()
    cut_off = False
    if exports is not None and reason is None:
        exports.log = log  # the sinks are closed
        # The others have left by now, so no collective waits for an export.
        if exports.finish(lambda: any(stop.flags())):
            with contextlib.suppress(OSError):
                checkpoints.prune()  # what exports have read
        else:
            cut_off = True  # by a signal or the time limit
            request_requeue(run_dir, progress.step, "exports")
    if lock is not None:
        lock.close()
    return EXIT_REQUEUE if reason is not None or cut_off else 0


def find_places(config: Config, run_dir: Path) -> Config:
    """The configuration with absolute paths; what is not there from this folder is where the run
    itself found it before.
    """
    if (run_dir / CONFIG_FILE).is_file():
        with contextlib.suppress(UserError):  # `prepare_run_directory` says it
            config = as_before(config, load_run_config(run_dir))
    return absolute(config)


@dataclass(frozen=True)
class Checked:
    """What a run needs, checked; the model is on the meta device.

    :param notes: lines about whose tokenizer and chat template are in force.
    """

    processor: CasaProcessor
    model: CasaForConditionalGeneration
    start: Start
    notes: list[str]


def check_inputs(config: Config, world: int, kept: Path | None = None) -> Checked:
    """Opens, and checks together, processor, checkpoints, model and parameter groups.

    :param kept: where a run that goes on has kept its tokenizer, in case its source is gone.
    :raises UserError: whatever the user can mend.
    """
    micro_steps(config.data, world)
    notes = []
    try:
        processor, resolved = open_processor(config)
    except UserError as error:
        if kept is None or not kept.is_dir():
            raise
        processor, resolved = open_processor(config, kept)
        notes.append(f"tokenizer: this run's own copy in {kept}, since {error}")
    sources = open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    start = find_weights(model, sources, config.model.backbone.resize_embeddings)
    build_groups(model.named_parameters(), config.optim.groups)
    notes.append(verdict(resolved, processor.tokenizer, processor))
    return Checked(processor, model, start, notes)


def build_engine(
    config: Config,
    checked: Checked,
    fresh: bool,
    world: int,
    rank: int,
    device: torch.device,
    log: Callable[[str], None],
) -> tuple[Engine, list[dict[str, Any]]]:
    """Gives the model its first values, on the device and sharded, and puts it under the engine.

    :param fresh: false: a checkpoint replaces everything, so nothing is read or drawn before.
    :return: the engine, and the parameter groups of its optimiser.
    """
    model, parallel = checked.model, config.parallel
    dtype = DTYPES[parallel.precision]

    def finish(block: nn.Module) -> None:
        shard(block, parallel.zero_stage, parallel.precision)

    start = checked.start if fresh else None
    start_weights(model, start, config.seed, device, dtype, finish)
    model.checkpoint_activations(parallel.activation_checkpointing)
    for account in start.accounts if start is not None else []:
        log(account.line())
        if account.resized and not config.model.backbone.trainable:
            log(
                "note: model.backbone.trainable is false, so the rows of new tokens stay as they "
                "start: the model will not learn to tell them apart"
            )
    if fresh and (warning := start_warning(config, model)) is not None:
        log(warning)
    # The weights above are the same on every rank; what is drawn from here on may differ.
    seed_all(config.seed + rank)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    for line in describe(model.named_parameters(), groups):
        log(line)
    engine = Engine(
        model,
        build_optimizer(groups, config.optim),
        parallel.zero_stage,
        parallel.precision,
        config.data.packs_per_step // world,
        config.optim.clip,
    )
    return engine, groups


def restore(
    found: SavedCheckpoint,
    engine: Engine,
    loader: PackLoader | StreamLoader,
    checkpoints: CheckpointManager,
    seed: int,
    world: int,
    rank: int,
) -> Progress:
    """Puts a checkpoint into a fresh engine and loader; returns how far it was."""
    engine.load(found.path)
    loader.load_state_dict(found.state["data"])
    saved_by = found.manifest["world_size"]
    if saved_by == world:
        checkpoints.load_rng(found)
    else:
        checkpoints.log(
            f"{found.path} was saved with world size {saved_by}, this start has {world}: every "
            "rank takes its part of weights and optimiser state, the order of samples goes on, "
            "and random numbers are seeded anew from seed, step and rank"
        )
        seed_all(derive_seed(seed, found.step, rank))
    return Progress(**found.state["progress"])


def check_resume(
    found: SavedCheckpoint, fingerprints: Mapping[str, str], config: Config, earlier: str
) -> None:
    """Refuses a checkpoint whose configuration or data is not this run's.

    :param earlier: the fingerprint as earlier versions took it, paths as they are given included.
    :raises UserError: with both values.
    """
    theirs = found.manifest["fingerprints"]
    same = theirs["config"] in (fingerprints["config"], earlier)
    if not same and not config.checkpoint.resume_allow:
        raise UserError(
            f"{found.path} belongs to another configuration (fingerprint "
            f"{theirs['config'][:12]}... there, {fingerprints['config'][:12]}... now). Restore the "
            "run's config.yaml, name what may differ in checkpoint.resume_allow, or start over "
            "with checkpoint.resume=never."
        )
    refuse_changes(str(found.path), theirs.get("plan"), fingerprints["plan"])
    if theirs["data"] != fingerprints["data"]:
        there, now = json.loads(theirs["data"]), json.loads(fingerprints["data"])
        differing = {
            "not named now": [name for name in there if name not in now],
            "new": [name for name in now if name not in there],
            "of other content": [n for n in there if n in now and there[n] != now[n]],
        }
        parts = [
            f"{len(names)} {what} ({', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"
            for what, names in differing.items()
            if names
        ]
        raise UserError(
            f"{found.path} was trained on other data: of {count(len(there), 'source')} there and "
            f"{len(now)} now, {'; '.join(parts)}. Restore the data, or start over with "
            "checkpoint.resume=never."
        )


def _hung(run_dir: Path, checkpoints: CheckpointManager, start: StartLog) -> None:
    """The watchdog's last words."""
    start.leave("watchdog")
    request_requeue(run_dir, max(checkpoints.steps(), default=0), "watchdog")


def _factor(config: Config, step: int) -> float:
    optim, steps = config.optim, config.trainer.steps
    return rate_factor(step, steps, *fit_schedule(steps, optim.warmup_steps, optim.decay_steps))


def _silent(line: str) -> None:
    """Ranks other than 0 print nothing."""
