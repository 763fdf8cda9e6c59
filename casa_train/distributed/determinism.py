"""Runs that repeat bit for bit on the same machine: torch's deterministic algorithms."""

from __future__ import annotations

import os

import torch

from casa_train.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with any other, cuBLAS may add up in another order


def set_determinism(wanted: bool) -> None:
    """Switches this process to deterministic algorithms or back; call before CUDA starts.

    An operation that has none raises torch's error, which names it.

    :raises UserError: an environment in which cuBLAS would not be deterministic.
    """
    if wanted and WORKSPACE not in os.environ and torch.cuda.is_initialized():
        raise UserError(
            f"trainer.deterministic is true, but CUDA started without {WORKSPACE} in this process, "
            "in an earlier job of a sweep; expected it from the start. Run this job on its own, or "
            f"set {WORKSPACE}={WORKSPACES[0]} for the sweep."
        )
    if wanted and os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
        raise UserError(
            f"trainer.deterministic is true, but the environment sets {WORKSPACE}="
            f"{os.environ[WORKSPACE]}; expected {' or '.join(WORKSPACES)}. Unset it."
        )
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False
