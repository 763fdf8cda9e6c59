"""Frozen weights, written once a run: one safetensors file that every checkpoint refers to.

They are most of a model whose backbone does not train, and never change. The file's name is its
sha256: equal weights have one file, whatever ranks and ZeRO stage wrote it, and a manifest names
the very bytes that its checkpoint needs. Tensors are written one at a time, so that no rank ever
holds more than one of them whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from casa_train.errors import UserError
from casa_train.io.files import sha256, sync_directory

FROZEN_DIRECTORY = "frozen"  # beside the checkpoints
UNFINISHED = ".tmp"
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as the format names them

Kinds = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""The type and shape of every tensor, by name."""


@dataclass(frozen=True)
class FrozenFile:
    """What a checkpoint says of the file that holds its frozen weights."""

    sha256: str
    bytes: int

    @property
    def name(self) -> str:
        return f"{self.sha256}.safetensors"

    def path(self, checkpoints: Path) -> Path:
        """:param checkpoints: the directory of the run's checkpoints."""
        return checkpoints / FROZEN_DIRECTORY / self.name

    def there(self, checkpoints: Path) -> bool:
        """Whether a file of that name and size is there; its content is not looked at."""
        try:
            return self.path(checkpoints).stat().st_size == self.bytes
        except OSError:
            return False

    def problem(self, checkpoints: Path) -> str | None:
        """What is wrong with the file, every byte of which is read; None if it is whole."""
        path = self.path(checkpoints)
        expected = f"expected {self.bytes:,} bytes with sha256 {self.sha256}"
        try:
            if not path.is_file():
                return f"{path} is missing; {expected}"
            size, found = path.stat().st_size, sha256(path)
        except OSError as error:
            return f"{path} cannot be read ({error}); {expected}"
        if (size, found) != (self.bytes, self.sha256):
            return f"{path} has {size:,} bytes with sha256 {found}; {expected}"
        return None

    def tensors(self, checkpoints: Path) -> dict[str, Tensor]:
        """The weights by name, mapped from the file: only what is used is read.

        :raises UserError: the file is missing or damaged.
        """
        try:
            with safe_open(self.path(checkpoints), framework="pt") as opened:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(lost(self.problem(checkpoints) or str(error))) from error


def lost(problem: str) -> str:
    """What to say of frozen weights that cannot be read.

    :param problem: as `FrozenFile.problem` tells it.
    """
    return (
        f"{problem}. It holds the frozen weights of the run's checkpoints, which are of no use "
        "without it. Restore it from a backup, or copy it from another run that started from the "
        "same weights (model and seed): there it has the same name. Or start over with "
        "checkpoint.resume=never."
    )


def write_frozen(checkpoints: Path, kinds: Kinds, values: Iterable[Tensor]) -> FrozenFile:
    """Writes the file: a name is given only to what is whole and on the disk.

    :param values: the tensors, in the order of `kinds`; one at a time is asked for.
    :raises OSError: it could not be written; nothing is left of it.
    """
    directory = checkpoints / FROZEN_DIRECTORY
    temporary = directory / f"unfinished{UNFINISHED}"
    digest, size = hashlib.sha256(), 0
    try:
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(checkpoints)
        with temporary.open("wb") as file:
            for piece in _pieces(kinds, values):
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        written = FrozenFile(digest.hexdigest(), size)
        os.replace(temporary, written.path(checkpoints))
        sync_directory(directory)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(temporary)) from error
    return written


def _pieces(kinds: Kinds, values: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """The content of the file, in its order."""
    yield _header(kinds)
    for kind, value in zip(kinds.values(), values, strict=True):
        assert (value.dtype, tuple(value.shape)) == kind
        yield value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _header(kinds: Kinds) -> bytes:
    """The start of a safetensors file: which tensor lies where. The library writes no file piece by
    piece.
    """
    entries, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
