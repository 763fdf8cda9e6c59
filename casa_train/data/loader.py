"""Workers, prefetch and the consumed position.

Memory: a worker keeps about 130 MB beyond what it inherits from the trainer, however long it runs
(packs of 20,480 image tokens from photographs of 0.5 to 7 million pixels). Decoding takes at most
14 bytes for each pixel of the source, for the largest that is read 1.3 GB. On top, `prefetch` packs
of each worker wait in shared memory, 48 MB each at 20,480 image tokens.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from casa_train.data.materialize import Materializer, PackedBatch
from casa_train.data.prepared.plan import Pack, Planner
from casa_train.errors import RankError, UserError

PREFETCH = 4  # packs of each worker that wait


class _RankPacks(torch.utils.data.Sampler[Pack]):
    """The packs of one rank, in order, from the planner's position on."""

    def __init__(self, planner: Planner, rank: int, world: int) -> None:
        self.planner, self.rank, self.world = planner, rank, world

    def __iter__(self) -> Iterator[Pack]:
        # G is a multiple of W, so pack s * G + m * W + r is r modulo W. Where G has changed on the
        # way, a step may begin anywhere: of any G packs in a row, G / W are r modulo W.
        return (pack for pack in self.planner if pack.index % self.world == self.rank)


class _Reporting(torch.utils.data.Dataset[PackedBatch | UserError]):
    """A materializer whose UserError travels as a value; raised, a worker's traceback joins it."""

    def __init__(self, materializer: Materializer) -> None:
        self.materializer = materializer

    def __getitem__(self, pack: Pack) -> PackedBatch | UserError:
        try:
            return self.materializer[pack]
        except UserError as error:
            return error


@contextlib.contextmanager
def dead_workers_named(rank: int) -> Iterator[None]:
    """Explains the death of a loader worker.

    Wrap whatever goes on while workers live: torch raises wherever the process is when it hears.

    :raises RankError: instead of torch's error.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise _lost_worker(rank, str(error).rstrip(". ")) from error


def _lost_worker(rank: int, how: str) -> RankError:
    if threading.current_thread() is threading.main_thread():
        # Once is enough: torch would raise again for every other child that ends.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return RankError(
        f"rank {rank} lost a process that prepares its data: {how}. Unless somebody ended it, the "
        "machine ran out of memory (see its kernel log) or of shared memory (df /dev/shm). Lower "
        "data.workers, or give the job more memory; the same command goes on "
        "from the last checkpoint."
    )


def _as_is(batch: Any) -> Any:
    return batch


def start_worker(_: int) -> None:
    """Keeps a worker quiet about a trainer that left while it took a delivery.

    The thread of `multiprocessing.resource_sharer` that hands storages over gives every failure to
    `sys.excepthook`, so a run that ends in that moment, for whatever reason, would end with a
    worker's traceback below its own message. What breaks in the worker itself travels otherwise.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        delivers = threading.current_thread() is not threading.main_thread()
        if not (delivers and issubclass(kind, (ConnectionError, EOFError))):
            before(kind, error, trace)

    sys.excepthook = hook


class PackLoader:
    """Endless micro-batches of one rank, in plan order whatever the number of workers.

    :param planner: of its data, `packs_per_step` is a multiple of `world`, and `workers` are the
        processes that materialise; 0 does it in the training process.
    """

    def __init__(
        self,
        planner: Planner,
        materializer: Materializer,
        rank: int = 0,
        world: int = 1,
        prefetch: int = PREFETCH,
    ) -> None:
        self.planner = planner
        self.materializer = materializer
        self.data = planner.data
        self.rank, self.world = rank, world
        self.prefetch = prefetch
        self.packs_consumed = 0
        self._iterator: Iterator[PackedBatch | UserError] | None = None

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimiser step.

        :raises RankError: the data is gone, or a worker died.
        """
        if self._iterator is None:
            options: dict[str, Any] = (
                {"prefetch_factor": self.prefetch} if self.data.workers else {}
            )
            self._iterator = iter(
                torch.utils.data.DataLoader(
                    _Reporting(self.materializer),
                    sampler=_RankPacks(self.planner, self.rank, self.world),
                    batch_size=None,
                    num_workers=self.data.workers,
                    collate_fn=_as_is,
                    worker_init_fn=start_worker,
                    # Its own generator: otherwise making the loader advances torch's, and a resumed
                    # run draws other random numbers than one that was never stopped.
                    generator=torch.Generator().manual_seed(self.planner.seed),
                    pin_memory=torch.cuda.is_available(),
                    **options,
                )
            )
        batches = []
        with dead_workers_named(self.rank):
            for _ in range(self.data.packs_per_step // self.world):
                try:
                    batch = next(self._iterator)
                except (EOFError, ConnectionError, FileNotFoundError) as error:
                    raise _lost_worker(self.rank, f"it broke off a delivery ({error!r})") from error
                if isinstance(batch, UserError):
                    raise RankError(f"rank {self.rank}: {batch}")
                batches.append(batch)
        self.packs_consumed += self.data.packs_per_step
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Position as *consumed*, not as fetched; free of rank and worker counts."""
        return self.planner.state_dict(self.packs_consumed)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last consumed step; call before the first `next_step`."""
        if self._iterator is not None:
            raise RuntimeError("load_state_dict after data was read: make a new PackLoader")
        self.planner.load_state_dict(state)
        self.packs_consumed = int(state["consumed"])
