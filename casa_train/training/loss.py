"""Token-normalised cross-entropy, exact across ranks and accumulation.

The gradient of a step is that of the mean over all answer tokens of the step: N is counted over
every rank and micro-step before the first backward, and each micro-step contributes ce_sum * world
/ N (the engine averages over ranks). A mean per micro-batch would weigh short answers more.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every answer token in float32; their sum is what a micro-step trains on.

    :param logits: (A, vocabulary) of the tokens that predict an answer token.
    :param targets: (A,) those answer tokens.
    :return: (A,), with a graph even where A is zero.
    """
    return F.cross_entropy(logits.float(), targets, reduction="none")
