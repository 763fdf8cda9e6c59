"""What a CUDA graph does, on a CPU: repeats the operations of one call on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Notes every operation with its arguments and keeps all results where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def outside(self) -> list[Tensor]:
        """What it reads without having made it: whoever repeats it must keep that in place."""
        made: set[int] = set()
        found: list[Tensor] = []
        for _, args, kwargs, out in self.operations:
            read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            found += [x for x in read if id(x) not in made]
            made |= {id(x) for x in tree_leaves(out)}
        return found

    def replay(self) -> None:
        """Does it all again, with the numbers that lie in memory now."""
        for func, args, kwargs, out in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and not same_memory(old, new):
                    old.copy_(new)


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Whether both are views of one storage: then there is nothing to copy."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


class TapeGraphs:
    """In the place of `graphs.Graphs`: no call but the first of a kind runs any Python."""

    replayed = 0

    def __init__(self) -> None:
        self.tapes: dict[Hashable, tuple[Tape, Tensor, Tensor]] = {}

    def forget(self) -> None:
        self.tapes.clear()

    def run(self, kind: Hashable, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if kind not in self.tapes:
            tape, given = Tape(), x.clone()
            with tape:
                result = function(given)
            self.tapes[kind] = tape, given, result
            return result.clone()
        tape, given, result = self.tapes[kind]
        given.copy_(x)
        tape.replay()
        TapeGraphs.replayed += 1
        return result.clone()
