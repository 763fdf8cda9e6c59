"""Atomic checkpoints: write, hash, rename; validate, fall back, prune.

Every rank writes into `step_N.tmp/`, the files are hashed into a manifest, everything is flushed to
disk, and one rename makes the checkpoint exist. At start the newest checkpoint whose every byte
matches its manifest is taken; broken ones are renamed to `step_N.broken` and named.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from casa_train.errors import SaveError, UserError
from casa_train.files import sha256, sync_directory, write_atomic
from casa_train.ranks import gather
from casa_train.tensor_file import save_tensors

MANIFEST = "manifest.json"
STATE = "state.json"
STEP_NAME = re.compile(r"step_(\d+)$")
DELETED = ".deleted"

T = TypeVar("T")


class _DiskError(Exception):
    """A disk failed one rank; every rank has this."""


@dataclass(frozen=True)
class Found:
    """A valid checkpoint: its directory and what was saved beside the engine's state."""

    step: int
    path: Path
    state: dict[str, Any]
    manifest: dict[str, Any]


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    :param directory: holds `step_N/` directories; on a file system all ranks see.
    :param fingerprints: identify configuration and data; stored with every checkpoint.
    :param say: prints one line for the user (rank 0).
    :param phase: told what a save is about to do, on every rank; a watchdog listens.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int,
        keep_every: int,
        fingerprints: dict[str, str],
        say: Callable[[str], None],
        phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.directory = directory
        self.keep_last, self.keep_every = keep_last, keep_every
        self.fingerprints = fingerprints
        self.say = say
        self.phase = phase
        self.pinned: Callable[[], Collection[int]] = tuple
        """Steps that somebody reads just now; pruning leaves them."""
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1

    def save(self, step: int, write: Callable[[Path], None], state: dict[str, Any]) -> Path:
        """Commits one checkpoint; collective.

        :param write: writes this rank's engine state into the given directory and flushes it to
            the disk, as `save_tensors` does; if it is collective, an OSError of one rank must come
            after the others have what they need of it.
        :param state: JSON-able state that is the same on every rank.
        :raises SaveError: on every rank alike, if a disk failed any of them; nothing is left of it
            and older checkpoints stay as they are.
        :raises UserError: the step was saved already, which only another job on it can have done.
        """
        temporary = self.directory / f"step_{step}.tmp"
        final = self.directory / f"step_{step}"
        if any(gather(self.rank == 0 and final.exists())):
            raise UserError(
                f"{final} exists already, so another job writes into this run; expected to be the "
                "only one. Stop the other one."
            )
        try:
            self._together(lambda: self._make_anew(temporary))
            self.phase(f"saving step {step}: writing")
            self._together(lambda: self._write(temporary, write, {"step": step, **state}))
            self.phase(f"saving step {step}: hashing")
            # A file system of many hosts may show each of them another listing.
            seen = self._together(lambda: _files(temporary))
            names = sorted({name for listing in seen for name in listing})
            shares = self._together(lambda: self._hash_share(temporary, names))
            self.phase(f"saving step {step}: committing")
            self._together(lambda: self._commit(temporary, final, shares))
        except _DiskError as error:
            message = self._failed(step, error)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise SaveError(message) from error
        self.phase(f"saving step {step}: pruning")
        if self.rank == 0:
            try:
                # The older ones go only once the rename is on the disk.
                sync_directory(self.directory)
                self.prune()
            except OSError as error:
                self.say(f"older checkpoints could not be deleted: {error}")
        return final

    def latest(self) -> Found | None:
        """The newest valid checkpoint, None where none was ever saved; collective.

        :raises UserError: checkpoints exist, but none is valid; or the directory takes no changes.
        """
        try:
            self._together(self._clear)
            broken: list[str] = []
            for step in reversed(gather(self.steps())[0]):  # others may see an older listing
                path = self.directory / f"step_{step}"
                problems = [p for share in gather(self._problems(path)) for p in share]
                if not problems:
                    return _found(step, path)
                broken.append(f"{path.name}: {problems[0]}")
                if self.rank == 0:
                    self.say(
                        f"checkpoint {path.name} is broken ({problems[0]}); trying an older one"
                    )
                self._together(functools.partial(self._put_aside, path))
        except _DiskError as error:
            raise UserError(
                f"{self.directory} cannot be changed: {error}; expected a directory of this user's "
                "on a disk that can be written. Mend that, or choose another run_dir=..."
            ) from error
        older = gather(sorted(p.name for p in self.directory.glob("step_*.broken")))[0]
        if broken or older:
            raise UserError(
                f"{self.directory} holds checkpoints, but none is valid "
                f"({'; '.join(broken) or older}). "
                "Restore one from a backup, or start over with checkpoint.resume=never."
            )
        return None

    def load_rng(self, found: Found) -> None:
        """Restores this rank's random number generators; saved by as many ranks as there are."""
        path = found.path / f"rng_{self.rank}.pt"
        set_rng_state(torch.load(path, weights_only=False))

    def read(self, step: int) -> Found | None:
        """The checkpoint of one step, None if it is not valid; changes nothing, not collective."""
        path = self.directory / f"step_{step}"
        problems = self._problems(path)
        if problems:
            self.say(f"checkpoint {path.name} is broken ({problems[0]})")
            return None
        return _found(step, path)

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, oldest first."""
        names = [STEP_NAME.match(path.name) for path in self.directory.glob("step_*")]
        return sorted(int(match.group(1)) for match in names if match)

    def _hash_share(self, directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Size and sha256 of this rank's share of the files."""
        return {
            name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)}
            for name in names[self.rank :: self.world]
        }

    def _problems(self, path: Path) -> list[str]:
        """What is wrong with this rank's share of a checkpoint."""
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            files = sorted(manifest["files"].items())
        except (OSError, ValueError, KeyError, TypeError) as error:
            return [f"{MANIFEST} is missing or unreadable ({type(error).__name__})"]
        problems = []
        if path.name != f"step_{manifest.get('step')}" or STATE not in manifest["files"]:
            problems.append(f"{MANIFEST} is that of step {manifest.get('step')}, or lacks {STATE}")
        for name, entry in files[self.rank :: self.world]:
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
        return problems

    def _make_anew(self, directory: Path) -> None:
        """An empty directory, whatever was there."""
        if self.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)

    def _put_aside(self, path: Path) -> None:
        """Takes a broken checkpoint's name away, so that its step can be saved again."""
        if self.rank == 0:
            target = path.with_name(f"{path.name}.broken")
            shutil.rmtree(target, ignore_errors=True)
            os.rename(path, target)

    def _write(self, temporary: Path, write: Callable[[Path], None], state: dict[str, Any]) -> None:
        write(temporary)
        save_tensors(rng_state(), temporary / f"rng_{self.rank}.pt")
        if self.rank == 0:
            write_atomic(temporary / STATE, json.dumps(state))

    def _commit(
        self, temporary: Path, final: Path, shares: Sequence[dict[str, dict[str, Any]]]
    ) -> None:
        """Manifest and rename, by rank 0."""
        if self.rank != 0:
            return
        step = int(final.name.removeprefix("step_"))
        manifest = {
            "step": step,
            "world_size": self.world,
            "fingerprints": self.fingerprints,
            "files": dict(sorted(pair for share in shares for pair in share.items())),
        }
        for directory in {path.parent for path in temporary.rglob("*")}:
            sync_directory(directory)
        write_atomic(temporary / MANIFEST, json.dumps(manifest, indent=1))
        self.phase(f"saving step {step}: renaming")
        os.rename(temporary, final)

    def prune(self) -> None:
        """Deletes what no longer has to be kept; rank 0 calls it after a newer commit.

        A checkpoint loses its name first, so that a kill in between leaves nothing that looks like
        one. A broken one stays for a look at it until enough newer ones exist.
        """
        self._empty()
        steps, pinned = self.steps(), self.pinned()
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0) and step not in pinned:
                path = self.directory / f"step_{step}"
                os.rename(path, path.with_name(f"step_{step}{DELETED}"))
                self.phase(f"saving step {steps[-1]}: deleting {path.name}")
        for path in self.directory.glob("step_*.broken"):
            match = re.match(r"step_(\d+)", path.name)
            if len(steps) >= self.keep_last and match and int(match[1]) < steps[-self.keep_last]:
                os.rename(path, path.with_name(path.name + DELETED))
        self._empty()

    def _empty(self) -> None:
        """Deletes what has lost its name, and what a read-only disk kept of a failed save."""
        for ending in (DELETED, ".tmp"):
            for path in self.directory.glob(f"step_*{ending}"):
                try:
                    shutil.rmtree(path)
                except OSError as error:  # a file in use on NFS; the next commit tries again
                    self.say(f"{path} could not be deleted: {error}")

    def _clear(self) -> None:
        """Removes what a kill left of a save or of a deletion."""
        if self.rank != 0:
            return
        for leftover in self.directory.glob("step_*.tmp"):
            self.say(f"removing unfinished checkpoint {leftover.name}")
        self._empty()

    def _failed(self, step: int, error: _DiskError) -> str:
        """What to say of a save that a disk refused."""
        steps = self.steps()
        newest = f"The newest one is step_{steps[-1]}" if steps else "There is no older one"
        free = ""
        with contextlib.suppress(OSError):
            free = f" ({shutil.disk_usage(self.directory).free / 2**30:.2f} GiB are free)"
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
        pairs = gather((result, failure))
        for rank, (_, message) in enumerate(pairs):
            if message is not None:
                raise _DiskError(f"rank {rank}: {message}" if self.world > 1 else message)
        return [pair[0] for pair in pairs]


def _files(directory: Path) -> list[str]:
    return [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]


def _found(step: int, path: Path) -> Found:
    manifest = json.loads((path / MANIFEST).read_text())
    return Found(step, path, json.loads((path / STATE).read_text()), manifest)


def rng_state() -> dict[str, Any]:
    """States of python's, numpy's and torch's generators, CUDA's included."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def seed_all(seed: int) -> None:
    """Seeds the generators that `rng_state` saves."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's too


def derive_seed(*numbers: int) -> int:
    """A seed that follows from all the numbers, as different for (1, 2) and (2, 1) as can be."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
