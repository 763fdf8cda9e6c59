"""Where the time of a step goes: marks on one line, between two of which all time is one part's.

So the parts add up to the step by construction. On a GPU a mark is an event in the stream that does
the work, which the host does not wait for; on a CPU it is a clock.
"""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch.profiler import record_function

DATA_WAIT = "data wait"
COPY = "copy"
FORWARD = "forward, rest"
VISION_FROZEN = "vision, frozen"
VISION_TRAINED = "vision, trained"
FUSION = "fusion"
DECODER = "decoder"
LOSS = "loss"
REDUCTION = "reduction"
UPDATE = "update"
REST = "rest"


def backward_of(part: str) -> str:
    """The backward pass of a part, which is a part of its own."""
    return f"{part}, backward"


ORDER = (
    *(DATA_WAIT, COPY, VISION_FROZEN, VISION_TRAINED, FUSION, DECODER, FORWARD, LOSS),
    *map(backward_of, (LOSS, DECODER, FUSION, VISION_TRAINED)),
    *(REDUCTION, UPDATE, REST),
)
"""The parts of a step in the order in which tables list them."""


class Timeline:
    """The marks of one step, made between `begin` and `end`; before and after it nothing is.

    :param ranges: also name the parts in the trace of a profiler that runs.
    """

    def __init__(self, device: torch.device, ranges: bool = False) -> None:
        self.device, self.ranges = device, ranges
        self.calls: Counter[str] = Counter()
        self.current: str | None = None
        self.backward = False
        self._marks: list[tuple[str, Any]] = []
        self._outer: list[str] = []
        self._open: list[Any] = []

    @property
    def running(self) -> bool:
        return self.current is not None

    def begin(self, part: str) -> None:
        """The step begins, with this part."""
        self._marks, self.current = [], None
        self._switch(part)
        self._open_range(part)

    def enter(self, part: str, backward: bool = False) -> None:
        """The loop goes on to a part.

        :param backward: from here on, what blocks do is their backward pass.
        """
        if self.current is None:
            return
        self.backward, self._outer = backward, []
        self._close_ranges()
        self._switch(backward_of(part) if backward else part)
        self._open_range("backward" if backward else part)

    def push(self, part: str, counted: bool = False) -> None:
        """A module begins that is of this part, until `pop`.

        :param counted: whether it is one of the part's `calls`.
        """
        if self.current is None:
            return
        part = backward_of(part) if self.backward else part
        if counted:
            self.calls[part] += 1
        self._outer.append(self.current)
        if part != self.current:
            self._open_range(part)
        else:
            self._open.append(None)
        self._switch(part)

    def pop(self) -> None:
        """The module ends: time is again that of whatever called it."""
        if self.current is not None and self._outer:
            handle = self._open.pop()
            if handle is not None:
                handle.__exit__(None, None, None)
            self._switch(self._outer.pop())

    def turn(self, part: str) -> None:
        """Time is this part's from now on; in a backward pass, which has no calls to end."""
        if self.current is not None:
            self._switch(part)

    def end(self) -> None:
        """The step is over."""
        if self.current is not None:
            self._close_ranges()
            self._marks.append((REST, self._now()))
            self.current = None

    def milliseconds(self) -> dict[str, float]:
        """Of every part that occurred; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        times: dict[str, float] = {}
        for (part, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            elapsed = (
                start.elapsed_time(stop) if self.device.type == "cuda" else 1e3 * (stop - start)
            )
            times[part] = times.get(part, 0.0) + elapsed
        return times

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _switch(self, part: str) -> None:
        if part != self.current:
            self._marks.append((part, self._now()))
            self.current = part

    def _open_range(self, part: str) -> None:
        handle = None
        if self.ranges:
            handle = record_function(part)
            handle.__enter__()
        self._open.append(handle)

    def _close_ranges(self) -> None:
        while self._open:
            handle = self._open.pop()
            if handle is not None:
                handle.__exit__(None, None, None)
