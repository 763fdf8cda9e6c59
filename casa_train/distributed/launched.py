"""The ranks of a command that trains nothing: those that torchrun started, or one alone."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError

LONGEST = timedelta(days=7)
"""That a rank waits for another; one that dies is noticed at once."""


@contextlib.contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks by torchrun's environment, each with a GPU of its own where there are any.

    They talk over gloo on the CPU: a few messages an hour.

    :raises UserError: a launcher whose environment is not whole, or another rank that died.
    """
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    local = int(env.get("LOCAL_RANK", 0))
    if cuda:
        local = 0 if torch.cuda.device_count() == 1 else local
        torch.cuda.set_device(local)
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if world == 1:
        yield Ranks(device=device)
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} are not set; expected what torchrun "
            "sets. Start the command with torchrun --nproc-per-node N -m ..., or unset WORLD_SIZE."
        )
    dist.init_process_group("gloo", timeout=LONGEST)
    try:
        yield Ranks(dist.get_rank(), world, device)
    except RuntimeError as error:
        if "Connection" not in str(error) and "gloo" not in str(error).lower():
            raise
        raise UserError(
            f"rank {env['RANK']}: another rank is gone ({str(error).splitlines()[0]}). Whatever it "
            "had done is on disk; look at its own last lines, and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
