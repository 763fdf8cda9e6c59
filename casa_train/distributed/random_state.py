"""Random number generators of a rank: their seeds, and their states in a checkpoint.

A state is made of tensors, numbers and tuples, so that reading one runs no code, whoever wrote it.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from casa_train.io.tensors import load_tensors

# What the array of numpy's state is made of in files of casa_train 0.1: all of them make arrays and
# nothing else. The module has another name in numpy 1.
NUMPY_PIECES: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    *(
        (np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct")
        for core in ("core", "_core")
    ),
]


def rng_state() -> dict[str, Any]:
    """States of python's, numpy's and torch's generators, CUDA's included."""
    algorithm, words, *more = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # Twice as wide, since not every version of torch reads and writes unsigned words.
        "numpy": (algorithm, torch.from_numpy(np.asarray(words, np.int64)), *more),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def load_rng_state(path: Path) -> dict[str, Any]:
    """What `rng_state` returned, from a file; of an older version, too.

    :raises UserError: it cannot be read.
    """
    state: dict[str, Any] = load_tensors(path, classes=NUMPY_PIECES)
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    random.setstate(state["python"])
    algorithm, words, *more = state["numpy"]
    np.random.set_state((algorithm, np.asarray(words, dtype=np.uint32), *more))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int) -> None:
    """Seeds the generators that `rng_state` saves."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)  # CUDA's too


def derive_seed(*numbers: int) -> int:
    """A seed that follows from all the numbers, as different for (1, 2) and (2, 1) as can be."""
    digest = hashlib.sha256(" ".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
