"""How many CPU threads torch computes with."""

from __future__ import annotations

import functools

import torch


@functools.cache
def _own_choice() -> int:
    return torch.get_num_threads()


def use_threads(threads: int) -> None:
    """Lets torch compute with so many CPU threads in this process: `parallel.threads`.

    Every command that computes calls it before it does, once a run: a sweep or an evaluation of one
    may go through several. Loader processes have one thread each, whatever their rank has.

    :param threads: 0 for as many as torch started with, also after a run that had another number.
    """
    own = _own_choice()  # of the first call, before anything changes it
    wanted = threads or own
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)
