"""Seconds and bytes, measured alike by every benchmark."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Call = Callable[[], object]


def synchronise(device: torch.device) -> None:
    """Waits for the device's work; the CPU has none outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device) -> float:
    """Seconds of one call, by the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def interleaved(
    calls: Mapping[str, Call], device: torch.device, repeats: int, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each call.

    The calls take turns, so that whatever else the machine does hits all of them alike.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warm_up + repeats):
        for name, call in calls.items():
            elapsed = seconds(call, device)
            if round_ >= warm_up:
                taken[name].append(elapsed)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most bytes that tensors of one call held at once, beyond those from before it.

    On CUDA by the allocator's own peak; on the CPU by the profiler's record of every allocation,
    temporaries inside kernels included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it prints a line at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        held += change
        peak = max(peak, held)
    return peak


def tensor_bytes(*objects: Any) -> int:
    """Bytes of the storages behind all tensors in these objects, each storage once.

    Looks into lists, dicts and the attributes of objects. A storage counts whole, also where a view
    shows only a part: that is what it keeps in memory.
    """
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict):
            for item in value.values():
                visit(item)
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            visit(vars(value))

    visit(objects)
    return sum(storages.values())
