"""CUDA graphs of a function that makes the same launches every time it is called."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Calls of a kind before it is captured, which waits for the device and costs some ten of them:
# short answers, each with a cache of its own, are better off without.
BEFORE_CAPTURE = 8


class Graphs:
    """Runs a function of one tensor, from some call on by repeating it as a CUDA graph.

    Whatever else the function reads and writes must stay where it is between calls: a graph repeats
    launches with the addresses of its capture. Copies and pickles begin without graphs.
    """

    def __init__(self) -> None:
        self._calls: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[Any, Tensor, Tensor]] = {}
        self._failed = False

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def forget(self) -> None:
        """What they read has moved."""
        self._calls.clear()
        self._captured.clear()

    def run(self, kind: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`.

        :param kind: calls of one kind make the same launches on the same memory.
        """
        calls = self._calls[kind] = self._calls.get(kind, 0) + 1
        if self._failed or calls <= BEFORE_CAPTURE:
            return function(x)
        with torch.cuda.device(x.device):
            if kind not in self._captured:
                try:
                    self._captured[kind] = self._capture(function, x)
                except RuntimeError as error:
                    self._failed = True
                    logger.warning_once(f"decoding goes on without CUDA graphs: {error}")
                    return function(x)
            graph, given, result = self._captured[kind]
            given.copy_(x)
            graph.replay()
            return result.clone()  # the next replay writes over it

    def _capture(
        self, function: Callable[[Tensor], Tensor], x: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        graph, given = torch.cuda.CUDAGraph(), x.clone()
        pool = next((g.pool() for g, _, _ in self._captured.values()), None)
        # A stream of this device: torch's own for captures is of whichever was current first.
        stream = torch.cuda.Stream(x.device)
        # Other threads, such as those that load data, may go on allocating.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode=mode):
            result = function(given)
        return graph, given, result


def look_over(part: nn.Module) -> tuple[list[Tensor], bool]:
    """A module's parameters, and whether hooks, peft's adapters or a forward that was put in the
    place of a class's have Python to run in it, which a graph leaves out. In one go, since every
    turn of a stream begins with it.
    """
    weights: list[Tensor] = []
    runs_python = bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
    seen, waiting = set(), [part]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        own = vars(module)
        weights += [weight for weight in own["_parameters"].values() if weight is not None]
        runs_python |= bool(own["_forward_hooks"] or own["_forward_pre_hooks"])
        runs_python |= "forward" in own or "base_layer" in own["_modules"]
        waiting += [child for child in own["_modules"].values() if child is not None]
    return weights, runs_python
