"""Workers, prefetch and the consumed position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from casa_train.data.materialize import Materializer, PackedBatch
from casa_train.data.plan import Pack, Planner


class _RankPacks(torch.utils.data.Sampler[Pack]):
    """The packs of one rank, in order, from the planner's position on."""

    def __init__(self, planner: Planner, rank: int, world: int) -> None:
        self.planner, self.rank, self.world = planner, rank, world

    def __iter__(self) -> Iterator[Pack]:
        # G is a multiple of W, so pack s * G + m * W + r is r modulo W.
        return (pack for pack in self.planner if pack.index % self.world == self.rank)


def _as_is(batch: Any) -> Any:
    return batch


class PackLoader:
    """Endless micro-batches of one rank, in plan order whatever the number of workers.

    :param packs_per_step: packs of an optimiser step over all ranks; a multiple of `world`.
    :param workers: processes that materialise; 0 does it in the training process.
    """

    def __init__(
        self,
        planner: Planner,
        materializer: Materializer,
        packs_per_step: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        seed: int = 0,
    ) -> None:
        self.planner = planner
        self.materializer = materializer
        self.packs_per_step = packs_per_step
        self.rank, self.world = rank, world
        self.workers, self.prefetch = workers, prefetch
        self.seed = seed
        self.steps_consumed = 0
        self._iterator: Iterator[PackedBatch] | None = None

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimiser step."""
        if self._iterator is None:
            options: dict[str, Any] = {"prefetch_factor": self.prefetch} if self.workers else {}
            self._iterator = iter(
                torch.utils.data.DataLoader(
                    self.materializer,
                    sampler=_RankPacks(self.planner, self.rank, self.world),
                    batch_size=None,
                    num_workers=self.workers,
                    collate_fn=_as_is,
                    # Its own generator: otherwise making the loader advances torch's, and a resumed
                    # run draws other random numbers than one that was never stopped.
                    generator=torch.Generator().manual_seed(self.seed),
                    **options,
                )
            )
        batches = [next(self._iterator) for _ in range(self.packs_per_step // self.world)]
        self.steps_consumed += 1
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Position as *consumed*, not as fetched; free of rank and worker counts."""
        return self.planner.state_dict(self.steps_consumed * self.packs_per_step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last consumed step; call before the first `next_step`."""
        if self._iterator is not None:
            raise RuntimeError("load_state_dict after data was read: make a new PackLoader")
        self.planner.load_state_dict(state)
        self.steps_consumed = int(state["consumed"]) // self.packs_per_step
