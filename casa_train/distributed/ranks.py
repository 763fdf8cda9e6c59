"""What the ranks of a run tell each other, apart from gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from casa_train.errors import UserError

T = TypeVar("T")


def gather(value: T) -> Sequence[T]:
    """The value of every rank, on every rank, in rank order; anything that can be pickled."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def gather_rows(values: list[float], device: torch.device) -> list[list[float]]:
    """The values of every rank in float64, in rank order; all give equally many."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return [own.tolist()]
    everyone = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(everyone, own)
    rows: list[list[float]] = everyone.view(-1, len(own)).tolist()
    return rows


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def agree(work: Callable[[], T]) -> T:
    """Every rank does something that may fail; if one fails, all do, so that none waits for it.

    :raises UserError: on every rank, with the first rank's message.
    """
    result: T | None = None
    message = None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    messages = gather(message)
    failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
    if failed:
        rank, text = failed[0]
        where = "" if len(failed) == len(messages) or rank == 0 else f"rank {rank}: "
        raise UserError(where + text)
    return result  # type: ignore[return-value]
