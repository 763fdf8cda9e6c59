"""CUDA graphs of a function that makes the same launches every time it is called."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


class Graphs:
    """Runs a function of one tensor; repeats it as a CUDA graph from the third call of a kind on.

    Whatever else the function reads and writes must stay where it is between calls: a graph
    repeats launches with the addresses of its capture. Copies and pickles begin without graphs.
    """

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, tuple[Any, Tensor, Tensor]] = {}

    def __reduce__(self) -> Any:
        return Graphs, ()

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs()

    def forget(self) -> None:
        """What they read has moved."""
        self._seen.clear()
        self._captured.clear()

    def run(self, kind: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`function(x)`.

        :param kind: calls of one kind make the same launches on the same memory.
        """
        if kind not in self._seen:
            # By itself: libraries choose kernels and make workspaces the first time.
            self._seen.add(kind)
            return function(x)
        if kind not in self._captured:
            graph, given = torch.cuda.CUDAGraph(), x.clone()
            pool = next((g.pool() for g, _, _ in self._captured.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                result = function(given)
            self._captured[kind] = graph, given, result
        graph, given, result = self._captured[kind]
        given.copy_(x)
        graph.replay()
        return result.clone()  # the next replay writes over it
