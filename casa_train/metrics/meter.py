"""Times, memory and work of a step: measured on each rank, put together for the record."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from casa_train.metrics.sinks.base import Record
from casa_train.metrics.timeline import FORWARD, REST

Timer = tuple[torch.cuda.Event, torch.cuda.Event]


class StepWatch(Protocol):
    """Follows one step part by part; the names of parts stand in `timeline.py`."""

    def begin(self) -> None: ...

    def enter(self, part: str, backward: bool = False) -> None: ...

    def end(self) -> None: ...


class Meter:
    """Measures the steps of one rank.

    :param peak_tflops: of one device; None: unknown, then there is no utilisation.
    :param start: which start of the run this is, from 1.
    :ivar watch: follows the next step, and no other.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        peak_tflops: float | None = None,
        start: int = 1,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.peak_tflops, self.start = peak_tflops, start
        self._began = self._data_seconds = self._forward_seconds = 0.0
        self._timers: list[Timer] = []
        self.watch: StepWatch | None = None

    def begin(self) -> None:
        """A step begins."""
        if self.watch is not None:  # first, so that what it prepares is not of the step
            self.watch.begin()
        self._began, self._forward_seconds, self._timers = time.perf_counter(), 0.0, []
        reset_peak(self.device)

    def data_arrived(self) -> None:
        self._data_seconds = time.perf_counter() - self._began
        self.enter(REST)

    def enter(self, part: str, backward: bool = False) -> None:
        """The step goes on to a part."""
        if self.watch is not None:
            self.watch.enter(part, backward)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Times a forward pass; on a GPU without waiting for it."""
        self.enter(FORWARD)
        if self.device.type != "cuda":
            began = time.perf_counter()
            yield
            self._forward_seconds += time.perf_counter() - began
            return
        timer = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        timer[0].record()
        yield
        timer[1].record()
        self._timers.append(timer)

    def measured(self) -> list[float]:
        """What this rank measured, for `record`; call once the device has finished the step."""
        forward = self._forward_seconds
        forward += sum(begin.elapsed_time(end) for begin, end in self._timers) / 1000
        return [self._data_seconds, self._data_seconds + forward, *memory_bytes(self.device)]

    def record(
        self,
        measured: Sequence[Sequence[float]],
        operations: Sequence[float],
        counts: Mapping[str, float],
    ) -> Record:
        """The fields that this file is about; the step ends here.

        :param measured: of every rank; :param operations: of every rank in this step.
        :param counts: tokens over all ranks.
        """
        seconds = time.perf_counter() - self._began
        if self.watch is not None:
            self.watch.end()
            self.watch = None
        waits, own, memory, peak = zip(*measured, strict=True)
        total, most = sum(operations), max(operations)
        tflops = total / len(operations) / seconds / 1e12
        return {
            "start": self.start,
            "time": round(time.time(), 3),
            "seconds": seconds,
            "data_seconds": max(waits),
            "rank_seconds_min": min(own),
            "rank_seconds_max": max(own),
            "slowest_rank": own.index(max(own)),
            "text_tokens_per_second": counts["text_tokens"] / seconds,
            "image_tokens_per_second": counts["image_tokens"] / seconds,
            "operations": int(total),
            "tflops": tflops,
            "mfu": None if self.peak_tflops is None else tflops / self.peak_tflops,
            "balance": total / len(operations) / most if most else None,
            "memory_bytes": int(max(memory)),
            "memory_peak_bytes": int(max(peak)),
        }


def reset_peak(device: torch.device) -> None:
    """The peak that `memory_bytes` tells begins anew; on a CPU where the system is Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Else the peak of a sweep's first job would be that of all jobs in its process.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def memory_bytes(device: torch.device) -> tuple[float, float]:
    """Now, and at the peak since `reset_peak`: torch's tensors on a GPU, the process on a CPU."""
    if device.type == "cuda":
        now, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
        return float(now), float(peak)
    status = Path("/proc/self/status")
    if not status.exists():  # no Linux
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return float(peak), float(peak)
    pairs = (line.partition(":") for line in status.read_text().splitlines())
    sizes = {
        name: 1024.0 * int(rest.split()[0]) for name, _, rest in pairs if name.startswith("Vm")
    }
    return sizes["VmRSS"], max(sizes["VmRSS"], sizes["VmHWM"])
