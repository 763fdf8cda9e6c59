"""Training from published datasets without preparing them: the loader over a stream's lanes.

Pack i comes from lane i mod L, and rank r of W trains the packs i with i mod W = r. So rank r runs
the lanes l with l mod W = r if W divides L, for every number G of packs a step that W divides; G
and L need not divide each other. A rank's worker processes share its lanes. The state is that of
every lane after its last consumed pack, so ranks and workers may change between runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from casa_train.config.data_schema import DataConfig
from casa_train.data.budget import Budget
from casa_train.data.loader import PREFETCH, dead_workers_named
from casa_train.data.materialize import CountWork, PackedBatch, build_batch
from casa_train.data.stream.lanes import Lane, LanePack, Sizes, block_packs
from casa_train.data.stream.row_reader import Rows
from casa_train.data.stream.stream_source import StreamSource, row_group_mixture
from casa_train.errors import RankError, UserError
from casa_train.modeling.processing_casa import CasaProcessor

State = dict[str, Any]


@dataclass(frozen=True)
class Streamed:
    """A pack on its way to the trainer, with the state of its lane after it."""

    lane: int
    batch: PackedBatch
    state: State

    def pin_memory(self) -> Streamed:
        """With the batch in page-locked memory; torch's DataLoader calls this where it pins."""
        return Streamed(self.lane, self.batch.pin_memory(), self.state)


@dataclass(frozen=True)
class Drawn:
    """A pack of a stream and what came of it.

    :param lane: what its lane gave: its samples, and the bad rows that it met on the way.
    :param batch: of its samples; its failures are theirs alone.
    """

    lane: LanePack
    batch: PackedBatch


def draw_packs(
    sources: Mapping[str, StreamSource],
    data: DataConfig,
    seed: int,
    processor: CasaProcessor,
    numbers: range,
) -> list[Drawn]:
    """Some packs of a stream's beginning as training gets them, read in this process.

    :param numbers: of the packs; packs before them in the same lanes are drawn, too.
    :raises UserError: files that cannot be read, or budgets that nothing fits.
    """
    rows = Rows(sources, data, processor)
    mixture = row_group_mixture(sources, seed)
    lanes = data.stream.lanes
    found = {}
    for number in sorted({index % lanes for index in numbers}):
        lane = Lane(number, rows, mixture, data, seed)
        for index in range(number, numbers.stop, lanes):
            pack = lane.next_pack()
            if index in numbers:
                batch = build_batch(index, pack.entries, processor, Budget.of(data))
                found[index] = Drawn(pack, batch)
    return [found[index] for index in numbers]


class _Lanes(torch.utils.data.IterableDataset[Streamed | UserError]):
    """The packs of some lanes in turn, endlessly, each lane from its state on.

    :param first: for each lane, the index of its next pack.
    :param sizes: of blocks, see `Lane`.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamSource],
        data: DataConfig,
        seed: int,
        processor: CasaProcessor,
        lanes: Mapping[int, State | None],
        first: Mapping[int, int],
        sizes: Sizes,
        count_work: CountWork | None,
    ) -> None:
        self.sources, self.processor = sources, processor
        self.data, self.seed = data, seed
        self.lanes, self.first, self.sizes = lanes, first, sizes
        self.count_work = count_work

    def __iter__(self) -> Iterator[Streamed | UserError]:
        # Raised in a worker process, the message would come with the worker's traceback in it.
        try:
            yield from self._packs()
        except UserError as error:
            yield error

    def _packs(self) -> Iterator[Streamed]:
        rows = Rows(self.sources, self.data, self.processor)
        mixture = row_group_mixture(self.sources, self.seed)
        budget = Budget.of(self.data)
        lanes: dict[int, Lane] = {}
        following = dict(self.first)
        while True:
            number = min(following, key=lambda lane: following[lane])
            if number not in lanes:  # read as late as possible
                lanes[number] = Lane(number, rows, mixture, self.data, self.seed, self.sizes)
                state = self.lanes[number]
                if state is not None:
                    lanes[number].load_state_dict(state)
            pack = lanes[number].next_pack()
            batch = build_batch(
                following[number],
                pack.entries,
                self.processor,
                budget,
                self.count_work,
            )
            failures = [*pack.failures, *batch.failures]
            batch = replace(batch, failures=failures, left_out=pack.left_out)
            following[number] += self.data.stream.lanes
            yield Streamed(number, batch, lanes[number].state_dict())


def _as_is(item: Any) -> Any:
    return item


def _alone(value: Any) -> Sequence[Any]:
    return [value]


class StreamLoader:
    """Endless micro-batches of one rank, in the same order whatever the number of workers.

    :param data: `packs_per_step` and `stream.lanes` are multiples of `world`, see `check_lanes`;
        `stream.memory_mib` is of each worker.
    :param gather: the value of every rank, in rank order; `state_dict` calls it.
    :param count_work: counts the floating-point work of a pack.
    """

    def __init__(
        self,
        sources: Mapping[str, StreamSource],
        data: DataConfig,
        seed: int,
        processor: CasaProcessor,
        rank: int = 0,
        world: int = 1,
        prefetch: int = PREFETCH,
        gather: Callable[[Any], Sequence[Any]] = _alone,
        count_work: CountWork | None = None,
    ) -> None:
        self.sources, self.processor = sources, processor
        self.data, self.seed = data, seed
        self.rank, self.world = rank, world
        self.gather, self.count_work = gather, count_work
        self.prefetch = prefetch
        self._own = range(rank, data.stream.lanes, world)
        self.workers = min(data.workers, len(self._own))
        self.packs_consumed = 0
        self.sizes: Sizes = [(0, block_packs(data))]
        # By lane of this rank, the state after its last consumed pack; None before its first.
        self.lane_states: dict[int, State | None] = dict.fromkeys(self._own)
        self._iterators: list[Iterator[Streamed | UserError]] = []

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimiser step.

        :raises RankError: files that cannot be read, budgets that nothing fits, or a dead worker.
        """
        if not self._iterators:
            self._iterators = self._start()
        batches = []
        for pack in self._next_packs(self.data.packs_per_step):
            place = pack % self.data.stream.lanes // self.world  # of its lane among this rank's
            with dead_workers_named(self.rank):
                item = next(self._iterators[place % len(self._iterators)])
            if isinstance(item, UserError):
                raise RankError(f"rank {self.rank}: {item}")
            self.lane_states[item.lane] = item.state
            batches.append(item.batch)
        self.packs_consumed += self.data.packs_per_step
        return batches

    def _next_packs(self, count: int) -> range:
        """Of the next `count` packs of all ranks, those of this one: i with i mod W = r."""
        consumed, world = self.packs_consumed, self.world
        return range(consumed + (self.rank - consumed) % world, consumed + count, world)

    def state_dict(self) -> State:
        """Position as *consumed*, not as fetched; free of rank and worker counts. Collective."""
        lanes: dict[int, State | None] = {}
        for states in self.gather(self.lane_states):
            lanes.update(states)
        return {
            "consumed": self.packs_consumed,
            "sizes": [list(pair) for pair in self.sizes],
            "lanes": [lanes[number] for number in range(self.data.stream.lanes)],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues after the last consumed step; call before the first `next_step`.

        Blocks of another size begin with the first one that no lane has begun, so that all lanes
        go on making the same blocks.

        :raises UserError: another number of lanes, or a state of an earlier version.
        """
        if self._iterators:
            raise RuntimeError("load_state_dict after data was read: make a new StreamLoader")
        if len(state["lanes"]) != self.data.stream.lanes:
            raise UserError(
                f"the checkpoint holds {len(state['lanes'])} lanes, data.stream.lanes is "
                f"{self.data.stream.lanes}; expected the same number. Set it back."
            )
        if "sizes" not in state:
            raise UserError(
                "the checkpoint's stream is of an older version of casa_train, which has to finish "
                "its run. Start over with checkpoint.resume=never, or a new run from an export "
                "(model.init_from)."
            )
        self.packs_consumed = int(state["consumed"])
        begun = max((lane["block"] for lane in state["lanes"] if lane), default=-1)
        sizes = [(int(number), int(packs)) for number, packs in state["sizes"]]
        if sizes[-1][1] != (packs := block_packs(self.data)):
            sizes = [pair for pair in sizes if pair[0] <= begun]
            sizes.append((begun + 1, packs))
        self.sizes = sizes
        self.lane_states = {number: state["lanes"][number] for number in self._own}

    def _start(self) -> list[Iterator[Streamed | UserError]]:
        """One iterator a worker; the lane at place p of this rank belongs to p modulo workers."""
        lanes, consumed = self.data.stream.lanes, self.packs_consumed
        first = {number: consumed + (number - consumed) % lanes for number in self._own}
        iterators: list[Iterator[Streamed | UserError]] = []
        for worker in range(max(1, self.workers)):
            mine = self._own[worker :: max(1, self.workers)]
            dataset = _Lanes(
                self.sources,
                self.data,
                self.seed,
                self.processor,
                {number: self.lane_states[number] for number in mine},
                {number: first[number] for number in mine},
                self.sizes,
                self.count_work,
            )
            if not self.workers:
                iterators.append(iter(dataset))
                continue
            loader = torch.utils.data.DataLoader(
                dataset,
                batch_size=None,
                num_workers=1,
                prefetch_factor=self.prefetch,
                collate_fn=_as_is,
                # Its own generator: otherwise making the loader advances torch's.
                generator=torch.Generator().manual_seed(self.seed),
                pin_memory=torch.cuda.is_available(),
            )
            iterators.append(iter(loader))
        return iterators


def check_lanes(lanes: int, world: int) -> None:
    """:raises UserError: ranks that do not divide the lanes."""
    if lanes % world:
        raise UserError(
            f"data.stream.lanes is {lanes}, which {world} ranks do not divide; expected a multiple "
            "of the number of ranks. Start another number of ranks, or a new run with another "
            "number of lanes."
        )
