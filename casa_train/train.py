"""Runs a training from top to bottom; the only file that knows every folder.

Everything that a user can get wrong is checked on every rank, with the model on the meta device,
before the run directory is touched and before the first weight is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from casa_train.checkpoint.disk_space import check_disk
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.checkpoint.resume import check_resume, restore
from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.config.schema import Config, fingerprint
from casa_train.cost.peak import machine_facts
from casa_train.cost.sizes import work_counter
from casa_train.data.build import ask_for_streams, open_data
from casa_train.data.shared_memory import check_shared_memory_of
from casa_train.distributed.determinism import set_determinism
from casa_train.distributed.ranks import Ranks
from casa_train.distributed.threads import use_threads
from casa_train.engine.engine import Engine, init_processes, leave_processes
from casa_train.engine.starting import build_engine, start_model
from casa_train.evaluate.measured import Measured, open_measured
from casa_train.evaluate.validation import Best, Validator
from casa_train.export.background_exports import BackgroundExports
from casa_train.metrics.meter import Meter
from casa_train.metrics.sinks.base import Sink
from casa_train.metrics.sinks.opening import Sinks
from casa_train.run.configuration import find_places
from casa_train.run.directory import RunRecord, keep_lost_records, request_requeue
from casa_train.run.fingerprints import run_fingerprints
from casa_train.run.last_words import LastWords
from casa_train.run.layout import CHECKPOINTS, METRICS_FILE, PROCESSOR, PROFILE, VALIDATION_FILE
from casa_train.run.quarantine import Quarantine
from casa_train.run.starts import open_starts
from casa_train.setup.inputs import check_inputs
from casa_train.setup.parts import banner
from casa_train.training.audit import Audit
from casa_train.training.frozen_precision import lower_frozen
from casa_train.training.garbage import ScheduledCollection
from casa_train.training.hooks import Hook, Hooks
from casa_train.training.loop import Trainer
from casa_train.training.memory_probe import MemoryProbe
from casa_train.training.reporting import Attempt, Reporting
from casa_train.training.signals import EXIT_REQUEUE, StopRequest
from casa_train.training.state import Loader, Progress, State
from casa_train.training.step_profile import StepProfile
from casa_train.training.stopping import StopFlags, Stopping
from casa_train.training.watchdog import Heartbeat, Watchdog


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
    ranks = init_processes(max(30.0, 2 * config.trainer.watchdog_minutes))
    kept = run_dir / PROCESSOR if config.checkpoint.resume == "auto" else None
    checked = ranks.agree(lambda: check_inputs(config, ranks.world, kept))
    config, model, processor = checked.config, checked.model, checked.processor
    work, streams = work_counter(config, model), ask_for_streams(config, ranks)
    data = ranks.agree(
        lambda: open_data(config, processor, streams, ranks.world, ranks.gather, work)
    )
    check_shared_memory_of(config, ranks)
    measured = open_measured(config, processor, ranks, data.fingerprints)
    record = RunRecord(run_dir, config, model.config.to_json_string(), processor)
    lock = record.enter(ranks)
    fingerprints = run_fingerprints(config, data.fingerprints, processor)
    checkpoints = CheckpointManager(run_dir / CHECKPOINTS, config.checkpoint, fingerprints, ranks)
    found = checkpoints.latest()
    if found is not None:
        check_resume(found, fingerprints, config, fingerprint(given))
    else:
        record.write(ranks)
    check_disk(config, ranks, run_dir, model, found, len(checkpoints.steps()))
    notes = [*checked.notes, *data.notes]
    if found is None:
        notes += ranks.first_does(lambda: keep_lost_records(run_dir)) or []
    ranks.log(*banner(config, model, notes, ranks))
    start_model(config, model, checked.start if found is None else None, ranks)
    engine, loader = build_engine(config, model, ranks), data.loader(ranks.rank)
    whole = ranks, engine, loader, run_dir, checkpoints, found
    run = build_run(config, *whole, stop=stop, measured=measured)
    if found is not None:
        record.write(ranks)  # now that it fits: what a run was is not overwritten by a refused one
        ranks.log(f"resuming from {found.path} at step {found.step}")
    if (step := run.state.progress.step) >= (steps := config.trainer.steps):
        ranks.log(f"nothing to do: {run_dir} holds step {step} of {steps}")
    reason = run.trainer.run()
    if reason is not None:
        saved = max(checkpoints.steps(), default=0)  # of an earlier step, if this save failed
        ranks.first_does(lambda: request_requeue(run_dir, saved, reason))
        ranks.log(
            f"left after step {run.state.progress.step} of {steps} ({reason}); the same command "
            f"goes on from step {saved}. Exit code {EXIT_REQUEUE}"
        )
    ranks.barrier()
    run.engine.close()
    if lock is not None and (run.exports is None or not run.exports.pinned()):
        lock.close()
    ranks.barrier()
    if last:
        # All ranks together: NCCL's communicators end when every rank of a node ends them.
        leave_processes()
    cut_off = False
    if run.exports is not None and reason is None:
        # The others have left by now, so no collective waits for an export.
        cut_off = not run.exports.finish(stop)  # by a signal or the time limit
        if cut_off:
            request_requeue(run_dir, run.state.progress.step, "exports")
        else:
            checkpoints.tidy()  # what exports have read
    if lock is not None:
        lock.close()
    return EXIT_REQUEUE if reason is not None or cut_off else 0


@dataclass(frozen=True)
class Run:
    """A run, ready for its first step; exports are the first rank's, if it has a directory."""

    engine: Engine
    state: State
    trainer: Trainer
    exports: BackgroundExports | None


def build_run(
    config: Config,
    ranks: Ranks,
    engine: Engine,
    loader: Loader,
    run_dir: Path | None = None,
    checkpoints: CheckpointManager | None = None,
    found: SavedCheckpoint | None = None,
    *,
    stop: StopFlags | None = None,
    measured: Measured | None = None,
    sinks: Sequence[Sink] = (),
    hooks: Sequence[Hook] = (),
) -> Run:
    """Puts a run together; the only place where that is done. Collective.

    :param loader: gives the packs: those of the data, or others, such as a benchmark's.
    :param run_dir: None: nothing is written. With it come checkpoints.
    :param found: the checkpoint that it goes on from.
    :param stop: asked whether to leave early; None: never.
    :param measured: what validations measure; None: there are none.
    :param sinks: on the first rank, beside the configuration's; :param hooks: the last of them.
    :raises UserError: a checkpoint that does not fit.
    """
    progress = Progress(**restore(found, engine, loader, ranks, config.seed))
    lower_frozen(config, engine.module, ranks)
    facts = machine_facts(config, ranks)
    starts = open_starts(run_dir, ranks, facts)
    meter = Meter(ranks.device, facts["peak_tflops"], starts.number)
    every_sink, best, heartbeat = Sinks(ranks, sinks), Best(), Heartbeat()
    quarantine = None if run_dir is None else Quarantine(run_dir, ranks.rank)
    state = State(engine, loader, every_sink, progress, checkpoints, quarantine, meter)
    exports = None
    # In the order in which they are asked; they are closed in reverse.
    watching: list[Hook] = []
    if config.trainer.audit:  # first: of a step that fails it, nothing is reported
        watching.append(Audit(config, engine, every_sink))
    # Before whoever has something to say: the sinks are open as long as anybody may.
    watching.append(Reporting(config, every_sink, run_dir and run_dir / METRICS_FILE))
    if run_dir is not None and checkpoints is not None:
        if ranks.first:
            exports = BackgroundExports(run_dir, config.export, every_sink.log, best)
        checkpoints.watched_by(heartbeat, exports)
        words = LastWords(run_dir, starts, checkpoints)  # the watchdog: before whatever may hang
        watching.append(Watchdog(config.trainer, ranks, heartbeat, run_dir, words))
    watching.append(Attempt(starts))  # before whatever may fail: starts.jsonl says it
    watching.append(ScheduledCollection(config.trainer.gc_every))  # what is there by now, stays
    # Before validations and exports: a lack of memory shows in the first minute.
    watching.append(MemoryProbe(config, ranks, engine, heartbeat, fresh=found is None))
    if stop is not None:  # before validation: who has to leave saves at once, and owes it
        watching.append(Stopping(stop, ranks, config.trainer.steps))
    if measured is not None and run_dir is not None:
        told = run_dir / VALIDATION_FILE, every_sink, best, heartbeat, exports
        watching.append(Validator(config, ranks, engine, measured, *told))
    watching += [] if exports is None else [exports]  # after validation, which finds the best step
    profiled = engine.module, meter, every_sink, run_dir and run_dir / PROFILE
    watching += [StepProfile(config, ranks, *profiled)] if config.metrics.profile_steps else []
    return Run(engine, state, Trainer(config, ranks, state, Hooks([*watching, *hooks])), exports)
