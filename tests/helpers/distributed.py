"""Several ranks out of one process: it imports DeepSpeed once, then forks them.

A fresh process needs about ten seconds of CPU to import DeepSpeed; a forked rank needs none. Only
for scripts of their own, before they touch a process group: pytest's process must not be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (imported by every optimiser)
import torch

from casa_train.engine.engine import init_processes, leave_processes


def run_ranks(world: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(ranks, *arguments)` in `world` processes that form a process group.

    :raises RuntimeError: a rank failed; its traceback is on stderr.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        ranks.append(context.Process(target=_rank, args=(place, work, arguments)))
        ranks[-1].start()
    codes: list[int | None] = [None] * world
    while None in codes:
        for rank, process in enumerate(ranks):
            process.join(0.05)
            codes[rank] = process.exitcode
        if any(codes):  # the others would wait for it
            for process in ranks:
                process.kill()
    if any(codes):
        raise RuntimeError(f"the ranks of {work.__name__} left with {codes}")


def _rank(place: dict[str, int], work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{key: str(n) for key, n in place.items()}}
    torch.set_num_threads(1)
    work(init_processes(), *arguments)
    leave_processes()
