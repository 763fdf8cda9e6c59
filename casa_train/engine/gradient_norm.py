"""The gradients' norm, and whether one of them is not finite, in a handful of kernels.

DeepSpeed asks both of every tensor by itself, in 17 small operations: a GPU waits for these longer
than it works. Torch takes the norms of a list of tensors in few kernels, and the vector of these
norms has the same norm as all the gradients. So DeepSpeed is handed that vector in their place: how
it adds up groups and ranks, clips, and skips a step stays its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def fuse_norms(optimizer: Any) -> bool:
    """Makes a DeepSpeed optimiser of stage 1, 2 or 3 take norms of all tensors at once.

    :return: False: it lacks the methods that are replaced here, and goes on as it did.
    """
    if hasattr(optimizer, "get_grads_for_norm"):
        _WholeGradients(optimizer)
    elif hasattr(optimizer, "get_grad_norm_direct"):
        _PartitionedGradients(optimizer)
    else:
        return False
    return True


def norms(gradients: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """The norm of each gradient, (gradients,); not finite where a gradient is not.

    :param dtype: to add squares in, and of the result; None: that of the gradients. In float64 no
        square of fp32 overflows, so that all norms are finite where all gradients are.
    """
    return torch.stack(torch._foreach_norm(list(gradients), 2, dtype=dtype))


class _PartitionedGradients:
    """Stages 1, 2 and 3: a rank has its part of each group's gradients, and adds in float64."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._norm = optimizer.get_grad_norm_direct
        self._checked: dict[int, Tensor] = {}  # norms by the id of the list of gradients
        optimizer.get_grad_norm_direct = self.norm
        # Stage 3 judges by the norm alone.
        if hasattr(optimizer, "check_grad_overflow"):
            optimizer.has_overflow_partitioned_grads_serial = self.not_finite

    def not_finite(self) -> Tensor:
        """Whether this rank has a gradient that is not finite, bool of (1,).

        A step asks this first. Its norm is taken of the same lists right after, if at all.
        """
        groups = [g for g in self._optimizer.averaged_gradients.values() if g]
        self._checked = {id(group): norms(group, torch.float64) for group in groups}
        finite = torch.cat(list(self._checked.values())).isfinite().all()
        return finite.logical_not().view(1)

    def norm(self, gradients: Sequence[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        """The norm of a group over all ranks, -1 if it is not finite; collective."""
        found = self._checked.pop(id(gradients), None)
        if found is None:
            found = norms(gradients, torch.float64)
        # As many parameters count as there are gradients: one, which no other rank shares.
        total: Tensor = self._norm([found], params, norm_type)
        return total


class _WholeGradients:
    """Stage 1 in bf16: every rank has all gradients, summed over ranks, as one vector a group."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._gradients = optimizer.get_grads_for_norm
        optimizer.get_grads_for_norm = self.gradients

    def gradients(self, for_clipping: bool = False) -> Any:
        """What to clip, or what has the norm of all gradients, with those of experts."""
        if for_clipping:
            return self._optimizer.fp32_groups_gradients_flat
        found, experts = self._gradients()
        return [norms(found)] if found else [], experts
