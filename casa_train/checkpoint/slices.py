"""The engine's part of a checkpoint: slices of parameters by name, whoever holds or wants them.

Every rank writes one file: of each parameter it holds, the range of flattened elements and the
values there, which are the fp32 master and Adam's moments. Frozen parameters have a file of their
own for the whole run (`frozen.py`), which rank 0's file names; in older checkpoints they lie among
the others. What is read is found by name and range, so any number of ranks reads what any other
number wrote, under any ZeRO stage. Files are mapped into memory: a rank reads its own part and
nothing else, and no checkpoint is ever rewritten.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from casa_train.checkpoint.frozen import FrozenFile, Kinds
from casa_train.errors import UserError
from casa_train.io.tensors import load_tensors, save_tensors

STATE_DIRECTORY = "engine"  # within a checkpoint
MASTER, FROZEN = "master", "frozen"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Slice:
    """A range of one parameter's flattened elements.

    :param shape: of the whole parameter.
    :param start: the first element.
    :param values: by kind (`MASTER`, `MOMENTS`, `FROZEN`) the elements, flat and of one length.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    values: dict[str, Tensor]


def write_slices(
    directory: Path,
    rank: int,
    slices: Sequence[Slice],
    updates: int,
    frozen: FrozenFile | None = None,
) -> None:
    """Writes what this rank holds.

    :param updates: optimiser steps that were applied, as Adam counts them.
    :param frozen: the file of the frozen weights; rank 0 alone names it.
    :raises OSError: a disk that is full or not to be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "updates": updates,
        "slices": [vars(piece) for piece in slices],
        "frozen": asdict(frozen) if frozen is not None else None,
    }
    # Slices that are views into one flat tensor stay views: each storage is written once.
    save_tensors(content, directory / f"rank_{rank:05d}.pt")


class SavedSlices:
    """What all ranks wrote into the state directory of a checkpoint.

    :ivar frozen: the file of the frozen weights; None where there is none.
    :raises UserError: nothing is there, files that do not belong together, or frozen weights that
        are not where they should be.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        files = sorted(directory.glob("rank_*.pt"))
        if not files:
            raise UserError(
                f"{directory} holds no rank_*.pt; expected the engine's state. The checkpoint is "
                "incomplete, or of an older version of casa_train, which has to finish its run."
            )
        loaded = [load_tensors(file, mmap=True) for file in files]
        self._slices: dict[str, list[Slice]] = {}
        frozen = loaded[0].get("frozen")
        self.frozen = FrozenFile(**frozen) if frozen is not None else None
        if self.frozen is not None:
            for name, whole in self.frozen.tensors(directory.parent.parent).items():
                values = {FROZEN: whole.view(-1)}
                self._slices[name] = [Slice(name, tuple(whole.shape), 0, values)]
        for content in loaded:
            for fields in content["slices"]:
                piece = Slice(**fields)
                self._slices.setdefault(piece.name, []).append(piece)
        updates = {int(content["updates"]) for content in loaded}
        if len(updates) != 1:
            raise UserError(
                f"{directory} holds files of different updates {sorted(updates)}; expected one. "
                "They belong to different checkpoints: restore the directory from a backup."
            )
        self.updates = updates.pop()

    def check(self, shapes: Mapping[str, tuple[int, ...]], frozen: Collection[str]) -> None:
        """Whether this is the whole state of a model with these parameters.

        :param frozen: names of those that do not train.
        :raises UserError: naming parameters that are missing, left over, or otherwise different.
        """
        problems = [f"{name} is not in the model" for name in self._slices if name not in shapes]
        for name, shape in shapes.items():
            saved = self._slices.get(name, [])
            was_frozen = bool(saved) and FROZEN in saved[0].values
            held = sum(len(piece.values[FROZEN if was_frozen else MASTER]) for piece in saved)
            if not saved:
                problems.append(f"{name} was not saved")
            elif saved[0].shape != shape:
                problems.append(f"{name} has shape {saved[0].shape} there, {shape} now")
            elif was_frozen != (name in frozen):
                there, now = ("frozen", "trained") if was_frozen else ("trained", "frozen")
                problems.append(f"{name} was {there} there and is {now} now")
            elif held != math.prod(shape):
                problems.append(f"{held} of the {math.prod(shape)} elements of {name} were saved")
        if problems:
            raise UserError(
                f"{self.directory} is not the state of this model: {'; '.join(problems[:4])}"
                + (f"; and {len(problems) - 4} more" if len(problems) > 4 else "")
                + ". Restore the run's configuration, or start a new run from an export "
                "(model.init_from)."
            )

    def frozen_kinds(self) -> Kinds:
        """Type and shape of the frozen weights."""
        firsts = (pieces[0] for pieces in self._slices.values())
        return {p.name: (p.values[FROZEN].dtype, p.shape) for p in firsts if FROZEN in p.values}

    def fill(self, piece: Slice) -> None:
        """Overwrites the values of a slice with those that were saved, whatever ranks hold them."""
        for kind, out in piece.values.items():
            end = piece.start + len(out)
            filled = 0
            for saved in self._slices[piece.name]:
                values = saved.values[kind]
                low, high = max(piece.start, saved.start), min(end, saved.start + len(values))
                if low < high:
                    part = values[low - saved.start : high - saved.start]
                    out[low - piece.start : high - piece.start].copy_(part)
                    filled += high - low
            assert filled == len(out), f"{piece.name} ({kind}): {filled} of {len(out)} elements"

    def weights(self) -> dict[str, Tensor]:
        """Whole parameters by name: fp32 masters, frozen ones as they were saved."""
        whole = {}
        for name, (first, *_) in self._slices.items():
            kind = FROZEN if FROZEN in first.values else MASTER
            flat = torch.empty(math.prod(first.shape), dtype=first.values[kind].dtype)
            self.fill(Slice(name, first.shape, 0, {kind: flat}))
            whole[name] = flat.view(first.shape)
        return whole


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Whole parameters of a checkpoint directory, saved by any number of ranks."""
    return SavedSlices(checkpoint / STATE_DIRECTORY).weights()
