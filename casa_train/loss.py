"""Token-normalised cross-entropy, exact across ranks and accumulation.

The gradient of a step is that of the mean over all answer tokens of the step: N is counted over
every rank and micro-step before the first backward, and each micro-step contributes ce_sum * world
/ N (the engine averages over ranks). A mean per micro-batch would weigh short answers more.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every answer token in float32; their sum is what a micro-step trains on.

    :param logits: (A, vocabulary) of the tokens that predict an answer token.
    :param targets: (A,) those answer tokens.
    :return: (A,), with a graph even where A is zero.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sums each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor)
    summed: list[float] = tensor.tolist()
    return summed


def rows_of_ranks(values: list[float], device: torch.device) -> list[list[float]]:
    """The values of every rank in float64, in rank order; all give equally many."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    if not dist.is_initialized():
        return [own.tolist()]
    everyone = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(everyone, own)
    rows: list[list[float]] = everyone.view(-1, len(own)).tolist()
    return rows
