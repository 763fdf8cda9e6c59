"""The ranks of a run as one value: which one this is, and what they tell each other apart from
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from casa_train.errors import UserError
from casa_train.io.log import log

T = TypeVar("T")

# What makes a process a rank, or a part of its parent's torch.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
RANK_PREFIXES = ("MASTER_", "TORCHELASTIC_", "SLURM_", "PMI", "OMPI_", "ROLE_", "DS_")


def of_no_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that is no rank of its parent's run."""
    return {
        name: value
        for name, value in environment.items()
        if name not in RANK_VARIABLES and not name.startswith(RANK_PREFIXES)
    }


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks; without a process group it is alone.

    All methods but `log` and `first` are collective: every rank calls them, in the same order.

    :param device: of this rank.
    :param out: prints what `log` is given.
    """

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")
    out: Callable[[str], None] = log

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def log(self, *lines: str) -> None:
        """Prints lines for the user, on the first rank alone."""
        for line in lines if self.first else ():
            self.out(line)

    def gather(self, value: T) -> Sequence[T]:
        """The value of every rank, on every rank, in rank order; anything that can be pickled."""
        if not dist.is_initialized():
            return [value]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_rows(self, values: list[float]) -> list[list[float]]:
        """The values of every rank in float64, in rank order; all give equally many."""
        own = torch.tensor(values, dtype=torch.float64, device=self.device)
        if not dist.is_initialized():
            return [own.tolist()]
        everyone = own.new_empty(dist.get_world_size() * len(own))
        dist.all_gather_into_tensor(everyone, own)
        rows: list[list[float]] = everyone.view(-1, len(own)).tolist()
        return rows

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if dist.is_initialized():
            dist.all_reduce(tensor)
        summed: list[float] = tensor.tolist()
        return summed

    def broadcast(self, value: T) -> T:
        """The first rank's value, on every rank; anything that can be pickled."""
        if not dist.is_initialized():
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, src=0)
        received: T = values[0]
        return received

    def barrier(self) -> None:
        """Returns once every rank has come here."""
        if dist.is_initialized():
            dist.barrier()

    def agree(self, work: Callable[[], T]) -> T:
        """Every rank does what may fail; if one fails, all do, so that none waits for it.

        :raises UserError: on every rank, with the message of the first that failed.
        """
        result: T | None = None
        message = None
        try:
            result = work()
        except UserError as error:
            message = str(error)
        messages = self.gather(message)
        failed = [(rank, text) for rank, text in enumerate(messages) if text is not None]
        if failed:
            rank, text = failed[0]
            where = "" if len(failed) == len(messages) or rank == 0 else f"rank {rank}: "
            raise UserError(where + text)
        return result  # type: ignore[return-value]

    def first_does(self, work: Callable[[], T]) -> T | None:
        """The first rank does what may fail; if it does, all fail alike.

        :return: on the first rank the result, on others None.
        :raises UserError: on every rank, with its message.
        """
        return self.agree(lambda: work() if self.first else None)
