"""The weights of a model as safetensors files, written one after the other from another's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from casa_train.errors import UserError
from casa_train.setup.pretrained import INDEX, SINGLE

SHARD_BYTES = 4 << 30  # so much is in memory at once
# Code, tokenizer, card and the disk's own accounts.
OTHER_BYTES = 64 << 20


def check_room(out: Path, needed: int) -> None:
    """Refuses a disk without room for an export.

    :param needed: bytes of its weights.
    :raises UserError: with the free and the needed bytes.
    """
    there = next(folder for folder in (out, *out.parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + OTHER_BYTES:
        raise UserError(
            f"--out {out}: {free:,} bytes are free there, but the export takes "
            f"{needed + OTHER_BYTES:,}. Make room, choose another disk, or --dtype bf16."
        )


def write_weights(
    directory: Path,
    sizes: Mapping[str, int],
    read: Callable[[str], Tensor],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors in as few files as hold at most `shard_bytes` each, or one larger tensor.

    :param sizes: bytes of each tensor by name, in the order of the files.
    :param read: gives a tensor, which is let go with its file.
    """
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    places: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: read(name) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        del tensors
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
