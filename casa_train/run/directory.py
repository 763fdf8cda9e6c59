"""The directory of a run: whose run it holds, and what is written there before its first step."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.metrics.sinks.jsonl import last_step
from casa_train.run.configuration import check_same_run
from casa_train.run.layout import (
    CHECKPOINTS,
    CONFIG_FILE,
    CONSOLE_FILE,
    ENVIRONMENT_FILE,
    FAILURE_FILE,
    LOCK_FILE,
    LOST_METRICS_FILE,
    METRICS_FILE,
    MODEL_CONFIG_FILE,
    PROCESSOR,
    REQUEUE_FILE,
)
from casa_train.run.lock import RunLock, unwritable
from casa_train.run.provenance import environment


class Saved(Protocol):
    """A tokenizer with its template that can be written into a directory."""

    def save_pretrained(self, directory: Path) -> Any: ...


def request_requeue(run_dir: Path, step: int, reason: str) -> None:
    """Tells the batch script that this run saved its state and wants to be started again.

    :raises UserError: it cannot be told.
    """
    path = run_dir / REQUEUE_FILE
    try:
        write_atomic(path, json.dumps({"step": step, "reason": reason}) + "\n")
    except OSError as error:
        if isinstance(error, FileNotFoundError) and path.exists():
            return  # the watchdog of another rank was quicker with the same temporary file
        raise UserError(
            f"{path} cannot be written: {error}, so no batch script will start this run again "
            f"({reason}). Make room and give the same command; it goes on from step {step}."
        ) from error


def record_failure(run_dir: Path, message: str) -> None:
    """Leaves a sweep's job the reason of its failure, for the sweep's report."""
    with contextlib.suppress(OSError):  # it is printed, too
        (run_dir / FAILURE_FILE).write_text(message + "\n", encoding="utf-8")


def prepare_run_directory(run_dir: Path, config: Config) -> None:
    """Makes the directory, or finds this run's; moves an earlier attempt away under `resume=never`.

    :raises UserError: the directory belongs to another configuration or cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stored = run_dir / CONFIG_FILE
        if config.checkpoint.resume == "never":
            _move_away(run_dir)
        if stored.exists():
            check_same_run(stored, config)
        (run_dir / REQUEUE_FILE).unlink(missing_ok=True)  # the last job's, which is being followed
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from error


@dataclass(frozen=True)
class RunRecord:
    """What a run directory says of its run: configurations, environment, tokenizer and template.

    :param config: stored with the absolute path of the directory.
    :param model_config: the Hugging Face configuration as JSON: an export needs no base model.
    :param processor: kept whatever becomes of where it came from.
    """

    run_dir: Path
    config: Config
    model_config: str
    processor: Saved

    @property
    def stored(self) -> Config:
        return replace(self.config, run_dir=str(self.run_dir.absolute()))

    def enter(self, ranks: Ranks) -> RunLock | None:
        """Locks the directory and prepares it for this run; collective.

        :return: the lock, on the first rank.
        :raises UserError: another job is in it, or it belongs to another run.
        """
        lock = ranks.first_does(lambda: RunLock(self.run_dir))
        ranks.first_does(lambda: prepare_run_directory(self.run_dir, self.stored))
        return lock

    def write(self, ranks: Ranks) -> None:
        """Writes it, once nothing refuses to go on with it; collective.

        :raises UserError: the directory cannot be written.
        """
        ranks.first_does(lambda: record_run(self.run_dir, self.stored, self.model_config))
        ranks.first_does(lambda: keep_processor(self.run_dir, self.processor.save_pretrained))


def record_run(run_dir: Path, config: Config, model_config: str) -> None:
    """Writes configurations and environment, once nothing refuses to go on with them.

    :param model_config: the Hugging Face configuration as JSON: an export needs no base model.
    :raises UserError: the directory cannot be written.
    """
    try:
        write_atomic(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_atomic(run_dir / MODEL_CONFIG_FILE, model_config)
        write_atomic(run_dir / ENVIRONMENT_FILE, json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from error


def keep_lost_records(run_dir: Path) -> list[str]:
    """Keeps what a run without a checkpoint reported before, which its start would drop.

    :return: a line about it, if there is something.
    :raises UserError: the run directory cannot be written.
    """
    try:
        last = last_step(run_dir / METRICS_FILE)
        if not last:
            return []
        with (run_dir / LOST_METRICS_FILE).open("ab") as file:
            file.write((run_dir / METRICS_FILE).read_bytes())
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from error
    return [
        f"note: {METRICS_FILE} knows of step {last}, but {run_dir / CHECKPOINTS} holds no "
        f"checkpoint, so this starts at step 1; earlier records are kept in {LOST_METRICS_FILE}. "
        "If checkpoints were moved away, stop now and put them back"
    ]


def keep_processor(run_dir: Path, save: Callable[[Path], Any]) -> None:
    """Keeps tokenizer and chat template with the run, whatever becomes of where they came from.

    :param save: writes them into a directory.
    :raises UserError: the run directory cannot be written.
    """
    kept, new = run_dir / PROCESSOR, run_dir / (PROCESSOR + ".tmp")
    try:
        shutil.rmtree(new, ignore_errors=True)
        save(new)
        shutil.rmtree(kept, ignore_errors=True)
        os.rename(new, kept)
    except OSError as error:
        raise UserError(unwritable(run_dir, error)) from error


def _move_away(run_dir: Path) -> None:
    """Moves an earlier run into `previous_N`, its checkpoints first: they are what resumes."""
    earlier = [
        p
        for p in run_dir.iterdir()
        # The lock is this job's own: a new file of that name would let a second job in. So is what
        # it prints, if it has a file for that.
        if not p.name.startswith("previous_")
        and p.name not in (LOCK_FILE, CONSOLE_FILE)
        # A run that lies in this one's directory is another run, perhaps at work.
        and not any((file.parent / LOCK_FILE).is_file() for file in p.rglob(CONFIG_FILE))
    ]
    if not earlier:
        return
    previous = _new_previous(run_dir)
    for path in sorted(earlier, key=lambda p: p.name != CHECKPOINTS):
        aside = previous / path.name
        if path.is_symlink() and path.is_dir():
            _empty_linked(path.resolve(), aside)
        else:
            os.rename(path, aside)


def _new_previous(folder: Path) -> Path:
    """Makes the next free `previous_N` in a folder."""
    numbered = (folder / f"previous_{number}" for number in itertools.count(1))
    path = next(path for path in numbered if not path.exists())
    path.mkdir()
    return path


def _empty_linked(target: Path, aside: Path) -> None:
    """Moves what a linked directory holds into a folder of its own on that disk, and links it.

    The run's own link stays: on that disk it has room for its checkpoints.
    """
    content = [p for p in target.iterdir() if not p.name.startswith("previous_")]
    moved = _new_previous(target)
    for path in content:
        os.rename(path, moved / path.name)
    aside.symlink_to(moved)
