"""The directory of a run: configuration, environment and quarantine files; whose run it holds."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from yaml import YAMLError

from casa_train import __version__
from casa_train.compose import to_config
from casa_train.config import Config, run_fields
from casa_train.errors import UserError
from casa_train.files import write_atomic
from casa_train.lines import LineFile, warn
from casa_train.metrics.sinks.jsonl import last_step
from casa_train.places import places, relocated, same_place
from casa_train.provenance import code_commit
from casa_train.resume_fields import reason_to_keep

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOST_METRICS_FILE = "metrics_lost.jsonl"
MODEL_CONFIG_FILE = "model_config.json"
REQUEUE_FILE = "requeue.json"
FAILURE_FILE = "failure.txt"
EVALUATION_FILE = "evaluation.json"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"
EXPORTS = "exports"
PROCESSOR = "processor"
EXPORT_LOG = "exports.log"
VALIDATION_FILE = "validation.jsonl"
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "flash-attn",
    "webdataset",
    "hydra-core",
    "numpy",
    "pillow",
)


class RunLock:
    """One job at a time works in a run directory; the lock goes with its process, however it ends.

    Between hosts it holds where the file system passes flock on: NFS does, Lustre with its mount
    option `flock`.

    :raises UserError: another process holds it, with its host and pid; or the directory is unfit.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / LOCK_FILE
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+")
        except OSError as error:
            raise UserError(unwritable(run_dir, error)) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise UserError(
                f"run directory {run_dir} is in use by {holder}; expected no other job in it. Wait "
                "for it, stop it, or choose another name."
            ) from error
        except OSError as error:
            warn(
                f"{path} cannot be locked: {error}. This file system has no locks, so nothing "
                "stops a second job in this directory: make sure that there is none"
            )
        job = os.environ.get("SLURM_JOB_ID")
        holder = f"host {socket.gethostname()}, pid {os.getpid()}" + (f", job {job}" if job else "")
        try:
            self._file.truncate(0)
            self._file.write(holder + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(unwritable(run_dir, error)) from error

    def close(self) -> None:
        self._file.close()


def unwritable(run_dir: Path, error: OSError) -> str:
    """What to say of a run directory that takes no files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"run directory {run_dir} takes no more files: {error}. Make room there, or choose "
            "another run_dir=..."
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return (
            f"run_dir={run_dir} is, or lies below, a file ({error}); expected a directory or free "
            "path. Choose another run_dir=..."
        )
    return (
        f"run directory {run_dir} cannot be written: {error}; expected a directory of this "
        "user's. Choose another run_dir=... or mend its permissions."
    )


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
    """Makes the directory, or finds this run's; moves an earlier life away under `resume=never`.

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


def record_run(run_dir: Path, config: Config, model_config: str) -> None:
    """Writes configurations and environment, once nothing refuses to go on with them.

    :param model_config: the Hugging Face configuration as JSON: an export needs no base model.
    :raises UserError: the directory cannot be written.
    """
    try:
        write_atomic(run_dir / CONFIG_FILE, OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_atomic(run_dir / MODEL_CONFIG_FILE, model_config)
        write_atomic(run_dir / "environment.json", json.dumps(environment(), indent=1) + "\n")
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


def stored_config(path: Path) -> Config:
    """The configuration that a run wrote.

    :raises UserError: it cannot be read.
    """
    try:
        return to_config(OmegaConf.load(path))  # type: ignore[arg-type]
    except (OSError, ValueError, YAMLError, UserError) as error:
        raise UserError(
            f"{path} cannot be read as this version's configuration of a run "
            f"({str(error).rstrip('.')}). Restore it from a backup; a new run needs another name, "
            "or checkpoint.resume=never to start over."
        ) from error


def check_same_run(stored: Path, config: Config) -> None:
    """Refuses a run directory of another configuration.

    :raises UserError: listing every differing field that `resume_allow` does not name.
    """
    theirs = run_fields(relocated(stored_config(stored), stored.parent))
    ours = run_fields(config)
    located = {name for name, *_ in places(config)}
    names = [
        name
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
        and not (name in located and same_place(theirs.get(name), ours.get(name)))
        and name not in config.checkpoint.resume_allow
    ]
    if names:
        differing = [
            f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} now"
            for name in names
        ]
        kept = [name for name in names if reason_to_keep(name)]
        but = f" (not {', '.join(kept)}: a run with a checkpoint keeps it)" if kept else ""
        raise UserError(
            f"{stored.parent} belongs to another configuration: {'; '.join(differing)}. Choose "
            "another "
            "name=..., start over with checkpoint.resume=never, or allow the fields by name with "
            f"checkpoint.resume_allow=[...]{but}."
        )


def environment() -> dict[str, Any]:
    """Versions, commit and host, as they stood when the run started."""
    return {
        "casa_train": __version__,
        "git_commit": code_commit(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Quarantine:
    """Appends samples that could not be used to a file of this rank.

    :param path: made with the first failure.
    """

    def __init__(self, path: Path) -> None:
        self._file = LineFile(path, warn)

    def add(self, failures: Sequence[Any]) -> None:
        self._file.add([json.dumps(dataclasses.asdict(failure)) for failure in failures])


def _move_away(run_dir: Path) -> None:
    """Moves an earlier run into `previous_N`, its checkpoints first: they are what resumes."""
    earlier = [
        p
        for p in run_dir.iterdir()
        # The lock is this job's own: a new file of that name would let a second job in.
        if not p.name.startswith("previous_")
        and p.name != LOCK_FILE
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
