"""Atomic checkpoints: write, hash, rename; validate, fall back, prune.

Every rank writes into `step_N.tmp/`, the files are hashed into a manifest, everything is flushed to
disk, and one rename makes the checkpoint exist. At start the newest checkpoint whose every byte
matches its manifest is taken; broken ones are renamed to `step_N.broken` and named. Frozen weights
have one file for all checkpoints (`frozen.py`), which stays as long as a manifest refers to it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from casa_train.checkpoint.frozen import FROZEN_DIRECTORY, UNFINISHED, FrozenFile, lost
from casa_train.checkpoint.saved import (
    MANIFEST,
    STATE,
    STEP_NAME,
    UNREADABLE,
    SavedCheckpoint,
    frozen_of,
    open_saved,
    saved_steps,
)
from casa_train.config.schema import CheckpointConfig
from casa_train.distributed.random_state import rng_state
from casa_train.distributed.ranks import Ranks
from casa_train.errors import SaveError, UserError
from casa_train.io.files import sha256, sync_directory, write_atomic
from casa_train.io.numbers import GIB
from casa_train.io.tensors import save_tensors

DELETED = ".deleted"
LEFT_OVER = (f"step_*{DELETED}", f"step_*{UNFINISHED}", f"{FROZEN_DIRECTORY}/*{UNFINISHED}")
Write = Callable[[Path], FrozenFile | None]

T = TypeVar("T")


class _DiskError(Exception):
    """A disk failed one rank; every rank has this."""


class Readers(Protocol):
    """Somebody else who reads checkpoints of the run."""

    def pinned(self) -> Collection[int]: ...


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    :param directory: holds `step_N/` directories; on a file system all ranks see.
    :param config: how many are kept.
    :param fingerprints: identify configuration and data; stored with every checkpoint.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        fingerprints: dict[str, str],
        ranks: Ranks,
    ) -> None:
        self.directory, self.config = directory, config
        self.fingerprints, self.ranks = fingerprints, ranks
        self._listeners: list[Callable[[str], None]] = []
        self._readers: list[Readers] = []

    def watched_by(self, listener: Callable[[str], None], readers: Readers | None = None) -> None:
        """Makes those known who have to do with saves.

        :param listener: told what a save is about to do, on every rank; a watchdog listens.
        :param readers: read some of the checkpoints: pruning leaves those.
        """
        self._listeners.append(listener)
        if readers is not None:
            self._readers.append(readers)

    def _announce(self, name: str) -> None:
        for listener in self._listeners:
            listener(name)

    def save(self, step: int, write: Write, state: dict[str, Any]) -> Path:
        """Commits one checkpoint; collective.

        :param write: writes this rank's engine state into the given directory and flushes it to
            the disk, as `save_tensors` does; if it is collective, an OSError of one rank must come
            after the others have what they need of it. On rank 0 it returns the file of frozen
            weights that the state needs, if it does, which is on the disk by then.
        :param state: JSON-able state that is the same on every rank.
        :raises SaveError: on every rank alike, if a disk failed any of them; older checkpoints stay
            as they are, and nothing is left of it but whole frozen weights, for the next one.
        :raises UserError: the step was saved already, which only another job on it can have done.
        """
        temporary = self.directory / f"step_{step}.tmp"
        final = self.directory / f"step_{step}"
        if any(self.ranks.gather(self.ranks.first and final.exists())):
            raise UserError(
                f"{final} exists already, so another job writes into this run; expected to be the "
                "only one. Stop the other one."
            )
        try:
            self._together(lambda: self._make_anew(temporary))
            self._announce(f"saving step {step}: writing")
            frozen, *_ = self._together(
                lambda: self._write(temporary, write, {"step": step, **state})
            )
            self._announce(f"saving step {step}: hashing")
            # A file system of many hosts may show each of them another listing.
            seen = self._together(lambda: _files(temporary))
            names = sorted({name for listing in seen for name in listing})
            shares = self._together(lambda: self._hash_share(temporary, names))
            self._announce(f"saving step {step}: committing")
            self._together(lambda: self._commit(temporary, final, shares, frozen))
        except _DiskError as error:
            message = self._failed(step, error)
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(message) from error
        self._announce(f"saving step {step}: pruning")
        if self.ranks.first:
            try:
                # The older ones go only once the rename is on the disk.
                sync_directory(self.directory)
                self.prune()
            except OSError as error:
                self.ranks.log(f"older checkpoints could not be deleted: {error}")
        return final

    def latest(self) -> SavedCheckpoint | None:
        """The newest valid checkpoint, None where none was ever saved; collective.

        :raises UserError: checkpoints exist, but none is valid; the file of the newest one's frozen
            weights is not whole; or the directory takes no changes.
        """
        try:
            self._together(self._clear)
            broken: list[str] = []
            steps = self.ranks.gather(self.steps())[0]  # others may see an older listing
            for step in reversed(steps):
                path = self.directory / f"step_{step}"
                shares = self.ranks.gather(self._problems(path))
                problems = [problem for own, _ in shares for problem in own]
                if not problems:
                    # Nothing is put aside: with its file back, the checkpoint is as good as before.
                    _refuse([frozen for _, frozen in shares if frozen is not None])
                    return open_saved(step, path)
                broken.append(f"{path.name}: {problems[0]}")
                self.ranks.log(
                    f"checkpoint {path.name} is broken ({problems[0]}); trying an older one"
                )
                self._together(functools.partial(self._put_aside, path))
        except _DiskError as error:
            raise UserError(
                f"{self.directory} cannot be changed: {error}; expected a directory of this user's "
                "on a disk that can be written. Mend that, or choose another run_dir=..."
            ) from error
        names = sorted(p.name for p in self.directory.glob("step_*.broken"))
        older = self.ranks.gather(names)[0]
        if broken or older:
            raise UserError(
                f"{self.directory} holds checkpoints, but none is valid "
                f"({'; '.join(broken) or older}). Restore one from a backup, or start over with "
                "checkpoint.resume=never."
            )
        return None

    def read(self, step: int) -> SavedCheckpoint | None:
        """The checkpoint of one step, None if it is not valid; changes nothing, not collective.

        :raises UserError: the file of its frozen weights is not whole.
        """
        path = self.directory / f"step_{step}"
        problems, frozen = self._problems(path)
        if problems:
            self.ranks.log(f"checkpoint {path.name} is broken ({problems[0]})")
            return None
        _refuse([frozen] if frozen is not None else [])
        return open_saved(step, path)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        return saved_steps(self.directory)

    def _hash_share(self, directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and sha256 of this rank's share of the files."""
        return {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
            for name in names[self.ranks.rank :: self.ranks.world]
        }

    def _problems(self, path: Path) -> tuple[list[str], str | None]:
        """What is wrong with this rank's share of a checkpoint, and with its frozen weights."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            files, frozen = sorted(manifest["files"].items()), frozen_of(manifest)
        except UNREADABLE as error:
            return [f"{MANIFEST} is missing or unreadable ({type(error).__name__})"], None
        problems = []
        if path.name != f"step_{manifest.get('step')}" or STATE not in manifest["files"]:
            problems.append(f"{MANIFEST} is that of step {manifest.get('step')}, or lacks {STATE}")
        for name, entry in files[self.ranks.rank :: self.ranks.world]:
            file = path / name
            try:
                if not file.is_file():
                    problems.append(f"{name} is missing")
                elif (size := file.stat().st_size) != entry["bytes"]:
                    problems.append(f"{name} has {size} bytes, expected {entry['bytes']}")
                elif sha256(file) != entry["sha256"]:
                    problems.append(f"{name} does not match its sha256")
            except OSError as error:
                problems.append(f"{name} cannot be read ({error})")
        next_in_turn = len(files) % self.ranks.world
        if frozen is None or self.ranks.rank != next_in_turn:
            return problems, None
        return problems, frozen.problem(self.directory)

    def _make_anew(self, directory: Path) -> None:
        """An empty directory, whatever was there."""
        if self.ranks.first:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)

    def _put_aside(self, path: Path) -> None:
        """Takes a broken checkpoint's name away, so that its step can be saved again."""
        if self.ranks.first:
            target = path.with_name(f"{path.name}.broken")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)

    def _write(self, temporary: Path, write: Write, state: dict[str, Any]) -> FrozenFile | None:
        frozen = write(temporary)
        save_tensors(rng_state(), temporary / f"rng_{self.ranks.rank}.pt")
        if self.ranks.first:
            write_atomic(temporary / STATE, json.dumps(state))
        return frozen

    def _commit(
        self,
        temporary: Path,
        final: Path,
        shares: Sequence[dict[str, dict[str, Any]]],
        frozen: FrozenFile | None,
    ) -> None:
        """Manifest and rename, by rank 0."""
        if not self.ranks.first:
            return
        step = int(final.name.removeprefix("step_"))
        manifest = {
            "step": step,
            "world_size": self.ranks.world,
            "fingerprints": self.fingerprints,
            "files": dict(sorted(pair for share in shares for pair in share.items())),
            "frozen": asdict(frozen) if frozen is not None else None,
        }
        for directory in {path.parent for path in temporary.rglob("*")}:
            sync_directory(directory)
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
        self._announce(f"saving step {step}: renaming")
        os.rename(temporary, final)

    def prune(self) -> None:
        """Deletes what no longer has to be kept; rank 0 calls it after a newer commit.

        A checkpoint loses its name first, so that a kill in between leaves nothing that looks like
        one. A broken one stays for a look at it until enough newer ones exist.
        """
        self._empty()
        steps, last, every = self.steps(), self.config.keep_last, self.config.keep_every
        pinned = {step for readers in self._readers for step in readers.pinned()}
        for step in steps[:-last]:
            if not (every and step % every == 0) and step not in pinned:
                path = self.directory / f"step_{step}"
                os.rename(path, path.with_name(f"step_{step}{DELETED}"))
                self._announce(f"saving step {steps[-1]}: deleting {path.name}")
        for path in self.directory.glob("step_*.broken"):
            match = re.match(r"step_(\d+)", path.name)
            if len(steps) >= last and match and int(match[1]) < steps[-last]:
                os.rename(path, path.with_name(path.name + DELETED))
        self._empty()
        for path in self._unneeded() if steps else []:
            self._announce(f"saving step {steps[-1]}: deleting {path.name}")
            self._delete(path)

    def tidy(self) -> None:
        """Prunes once more, when nobody reads what had to stay; a disk that refuses may keep it."""
        with contextlib.suppress(OSError):
            self.prune()

    def _unneeded(self) -> list[Path]:
        """Files of frozen weights that no checkpoint refers to, broken ones included."""
        needed = set()
        for path in self.directory.glob("step_*"):
            if path.name.endswith((DELETED, UNFINISHED)):
                continue
            try:
                frozen = frozen_of(json.loads((path / MANIFEST).read_text()))
            except UNREADABLE:
                if STEP_NAME.match(path.name):
                    return []  # nobody knows what it needs
                continue
            if frozen is not None:
                needed.add(frozen.name)
        files = self.directory.glob(f"{FROZEN_DIRECTORY}/*.safetensors")
        return sorted(path for path in files if path.name not in needed)

    def _empty(self) -> None:
        """Deletes what has lost its name, and what a read-only disk kept of a failed save."""
        for pattern in LEFT_OVER:
            for path in self.directory.glob(pattern):
                self._delete(path)

    def _delete(self, path: Path) -> None:
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        except OSError as error:  # a file in use on NFS; the next commit tries again
            self.ranks.log(f"{path} could not be deleted: {error}")

    def _clear(self) -> None:
        """Removes what a kill left of a save or of a deletion."""
        if not self.ranks.first:
            return
        for leftover in self.directory.glob("step_*.tmp"):
            self.ranks.log(f"removing unfinished checkpoint {leftover.name}")
        self._empty()

    def _failed(self, step: int, error: _DiskError) -> str:
        """What to say of a save that a disk refused."""
        steps = self.steps()
        newest = f"The newest one is step_{steps[-1]}" if steps else "There is no older one"
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(self.directory).free / GIB:.2f} GiB are free)"
        return (
            f"the checkpoint of step {step} could not be saved in {self.directory}{free}: {error}. "
            f"{newest}. Make room there, or lower checkpoint.keep_last."
        )

    def _together(self, work: Callable[[], T]) -> Sequence[T]:
        """Every rank does something with the disk; the results of all, on every rank.

        :raises _DiskError: on every rank alike, if one failed: none waits for another one.
        """
        result: Any = None
        failure = None
        try:
            result = work()
        except OSError as error:
            failure = str(error)
        pairs = self.ranks.gather((result, failure))
        for rank, (_, message) in enumerate(pairs):
            if message is not None:
                raise _DiskError(f"rank {rank}: {message}" if self.ranks.world > 1 else message)
        return [pair[0] for pair in pairs]


def _files(directory: Path) -> list[str]:
    return [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]


def _refuse(problems: Sequence[str]) -> None:
    """:raises UserError: frozen weights that are not whole; at most one rank looked."""
    if problems:
        raise UserError(lost(problems[0]))
