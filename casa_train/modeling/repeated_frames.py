"""Frames of one size, again and again: the vision tower as a CUDA graph.

A frame is few patches and, block by block, hundreds of launches: a GPU waits for the host for most
of the time. From some frame of a size on, all of them are one launch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from .graphs import Graphs, look_over

# Patches of all images at once. With more, the GPU has enough to do, and a graph keeps what a call
# needs of memory for good.
MOST_PATCHES = 16384
# Kinds of frames whose layouts and graphs are kept; when another comes, all of them go.
KINDS = 2


def graphs_pay(device: torch.device) -> bool:
    """Whether launches cost there what a graph saves.

    Graphs share their memory, in the order of one stream: calls on another run without.
    """
    if device.type != "cuda":
        return False
    return torch.cuda.current_stream(device) == torch.cuda.default_stream(device)


class RepeatedFrames:
    """What is kept of frames that come again; copies and pickles begin with nothing.

    Layouts are kept as long as graphs may read them. Threads that share a tower take turns, since a
    graph has one place for what it reads and one for what it says.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._graphs = Graphs()
        self._layouts: dict[Hashable, Any] = {}
        self._read: Any = None

    def __reduce__(self) -> Any:
        return RepeatedFrames, ()

    def __deepcopy__(self, memo: Any) -> RepeatedFrames:
        return RepeatedFrames()

    def take(self, tower: nn.Module, patches: Tensor) -> bool:
        """Whether a call may be repeated: nothing is differentiated, nothing but kernels runs, and
        all weights lie where the patches do. Forgets graphs of weights that have moved.
        """
        if torch.compiler.is_compiling() or torch.is_grad_enabled():
            return False
        few = 0 < len(patches) <= MOST_PATCHES and graphs_pay(patches.device)
        if not few or torch.is_autocast_enabled(patches.device.type):
            return False
        weights, watched = look_over(tower)
        if watched or any(weight.device != patches.device for weight in weights):
            return False
        read = [(weight.data_ptr(), weight.dtype) for weight in weights]
        with self._lock:
            if read != self._read:
                self._forget()
            self._read = read
        return True

    def run(
        self,
        kind: Hashable,
        make_layout: Callable[[], Any],
        function: Callable[[Tensor, Any], Tensor],
        patches: Tensor,
    ) -> Tensor:
        """function(patches, layout).

        :param kind: calls of one kind have the same layout and make the same launches.
        """
        kind = kind, torch.is_inference_mode_enabled(), patches.dtype
        with self._lock:
            if kind not in self._layouts:
                if len(self._layouts) == KINDS:
                    self._forget()
                self._layouts[kind] = make_layout()
            layout = self._layouts[kind]
            return self._graphs.run(kind, lambda x: function(x, layout), patches)

    def _forget(self) -> None:
        """Graphs first: they read the layouts."""
        self._graphs.forget()
        self._layouts.clear()
