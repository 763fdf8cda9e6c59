"""Gradients in bf16 are added to their sums in fp32 in one kernel each, a bucket in one call.

DeepSpeed makes a copy of each in fp32 first: four fifths more memory traffic, in every micro-step.
The sum is the same number, since every bf16 number is one of fp32. And it computes anew, tensor by
tensor, where in its group's sums a gradient goes, while a GPU waits: that never changes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def fuse_sums(optimizer: Any) -> bool:
    """Makes a DeepSpeed optimiser of stage 2 add so.

    :return: False: it has no such method, and goes on as it did.
    """
    if not hasattr(optimizer, "_add_to_grad_partition_buffer"):
        return False
    optimizer._add_to_grad_partition_buffer = add_to
    if hasattr(optimizer, "_add_full_reduction_to_compact_grad_partition"):
        _BucketSums(optimizer)
    return True


def add_to(total: Tensor | None, gradient: Tensor) -> None:
    """Adds in place; None: the sum is another rank's."""
    if total is not None:
        total.add_(gradient)


class _BucketSums:
    """Takes a reduced bucket apart and adds its gradients to this rank's sums."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._own_way = optimizer._add_full_reduction_to_compact_grad_partition
        optimizer._add_full_reduction_to_compact_grad_partition = self.add
        self._places: dict[tuple[int, int], tuple[int, int, int] | None] = {}

    def add(self, reduced: Tensor, communication_data_type: torch.dtype) -> None:
        """:param reduced: the bucket, one gradient after another."""
        optimizer = self._optimizer
        parameters = optimizer.ipg_buckets[communication_data_type].params
        groups = {group for group, _, _ in parameters}
        if not all(map(optimizer._use_compact_grad_partition_buffer, groups)):
            self._own_way(reduced, communication_data_type)
            return
        sums = {
            group: optimizer._get_compact_grad_partition_buffer(group).flat_partition
            for group in groups
        }
        totals, gradients, offset = [], [], 0
        for group, index, number in parameters:
            size = optimizer.bit16_groups[group][index].numel()
            if (group, number) not in self._places:
                self._places[group, number] = self._place(group, number, size)
            if (place := self._places[group, number]) is not None:
                start, begin, count = place
                totals.append(sums[group].narrow(0, begin, count))
                gradients.append(reduced.narrow(0, offset + start, count))
            offset += size
        if totals:
            torch._foreach_add_(totals, gradients)

    def _place(self, group: int, number: int, size: int) -> tuple[int, int, int] | None:
        """Of a parameter: where in its gradient this rank's part begins, where in the group's sums
        that goes, and how many numbers it is; None: there is none.

        As DeepSpeed computes it, for parameters that are cut between two ranks.
        """
        optimizer = self._optimizer
        rank = dist.get_rank(optimizer.real_dp_process_group[group])
        starts = optimizer.grad_start_offset[group][rank]
        if number not in starts:
            return None
        start = int(starts[number])
        begin = int(optimizer.grad_partition_insertion_offset[group][rank][number])
        count = min(size - start, int(optimizer.partition_size[group]) - begin)
        return (start, begin, count) if count > 0 else None
