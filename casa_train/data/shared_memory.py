"""Whether /dev/shm can take what loader processes hand over: asked before the first step.

What does not fit there ends a process by a bus error, at whichever step it happens.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from casa_train.config.data_schema import DataConfig
from casa_train.config.micro_steps import micro_steps
from casa_train.config.schema import Config
from casa_train.data.loader import PREFETCH
from casa_train.data.processor import token_side_of
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.numbers import MIB

SHARED = Path("/dev/shm")
TEXT_BYTES = 64  # of a text token: its id, its target and what is counted about it


def check_shared_memory_of(config: Config, ranks: Ranks) -> None:
    """`check_shared_memory` on every rank; collective."""
    beside, pinned = ranks_beside(ranks.gather), torch.cuda.is_available()
    side = token_side_of(config)
    ranks.agree(lambda: check_shared_memory(config.data, ranks.world, beside, pinned, side))


def ranks_beside(gather: Callable[[Any], Sequence[Any]], where: Path = SHARED) -> int:
    """Ranks that share this one's /dev/shm, itself included; collective."""
    device = os.stat(where).st_dev if where.is_dir() else None
    own = (socket.gethostname(), device)
    return list(gather(own)).count(own)


def check_shared_memory(
    data: DataConfig, world: int, beside: int, pinned: bool, side: int, where: Path = SHARED
) -> None:
    """Refuses loader processes whose packs do not fit into shared memory.

    :param beside: ranks that share it; :param pinned: whether packs are copied out of it at once,
        as they are where there is a GPU. Otherwise those of a whole step stay.
    :param side: pixels of an image token's side.
    :param where: the file system that torch's processes share memory through.
    :raises UserError: with the free and the needed size.
    """
    if not data.workers or not where.is_dir():
        return
    pack = data.image_tokens * side * side * 3 + data.text_tokens * TEXT_BYTES
    held = 1 if pinned else micro_steps(data, world)
    need = beside * (data.workers * PREFETCH + held) * pack
    free = shutil.disk_usage(where).free
    if free >= need:
        return
    ranks = f"{beside} ranks x " if beside > 1 else ""
    raise UserError(
        f"{where} has {free / MIB:,.0f} MiB free, but loader processes hand packs over through it "
        f"and need up to {need / MIB:,.0f} MiB: {ranks}(data.workers={data.workers} x {PREFETCH} "
        f"packs that wait + {held} in use) of {pack / MIB:,.1f} MiB. Give the container more "
        "(docker run --shm-size=SIZE or --ipc=host; Kubernetes: an emptyDir with medium: Memory at "
        f"{where}), lower data.workers, or set data.workers=0, which needs none."
    )
