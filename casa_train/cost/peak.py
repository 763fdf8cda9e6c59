"""What a device could do at most: for the utilisation that a run reports, and the least time that
the parts of a step could take.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks
from casa_train.io.precision import DTYPES

T = TypeVar("T")

# Dense bf16 with fp32 accumulation, TFLOP/s, as the makers' data sheets give it (theirs often count
# structured sparsity: twice as much). The first entry whose words all stand in the device's name.
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB300", 2500.0),
    ("GB200", 2500.0),
    ("B300", 2250.0),
    ("B200", 2250.0),
    ("GH200", 989.4),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("H100 NVL", 835.5),
    ("H100 PCIe", 756.0),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX A6000", 154.8),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("MI300X", 1307.4),
)
# Likewise its memory in TB/s, of several sizes of a card the fastest, and its way from the host in
# GB/s: PCIe, or NVLink where the CPU is of the same maker.
BANDWIDTHS: tuple[tuple[str, tuple[float, float]], ...] = (
    ("GB300", (8.0, 450.0)),
    ("GB200", (8.0, 450.0)),
    ("B300", (8.0, 126.0)),
    ("B200", (8.0, 63.0)),
    ("GH200", (4.9, 450.0)),
    ("H200", (4.8, 63.0)),
    ("H100 NVL", (3.9, 63.0)),
    ("H100 PCIe", (2.0, 63.0)),
    ("H100", (3.35, 63.0)),
    ("H800", (3.35, 63.0)),
    ("A100", (2.04, 31.5)),
    ("A800", (2.04, 31.5)),
    ("L40S", (0.864, 31.5)),
    ("L40", (0.864, 31.5)),
    ("L4", (0.3, 31.5)),
    ("RTX A6000", (0.768, 31.5)),
    ("A10G", (0.6, 31.5)),
    ("A10", (0.6, 31.5)),
    ("MI300X", (5.3, 63.0)),
)


def peak_tflops(device_name: str | None, precision: str, override: float | None) -> float | None:
    """The peak of one device in TFLOP/s; None where it is not known, so that nothing is claimed.

    :param device_name: as CUDA reports it; None: a CPU.
    :param precision: bf16 or fp32; the table is for bf16 alone.
    :param override: `metrics.peak_tflops`, which counts more than the table.
    """
    if override is not None:
        return override
    if device_name is None or precision != "bf16":
        return None
    return _listed(PEAK_TFLOPS, device_name)


def _listed(table: tuple[tuple[str, T], ...], device_name: str) -> T | None:
    # A slice of a GPU has its name and a part of its peak.
    if "MIG" in device_name.split():
        return None
    words = set(device_name.upper().replace("-", " ").split())
    return next((value for name, value in table if set(name.upper().split()) <= words), None)


def machine_facts(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What a run is trained on: `ranks`, `device`, and `peak_tflops` of one device or None."""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    peak = peak_tflops(gpu, config.parallel.precision, config.metrics.peak_tflops)
    return {"ranks": ranks.world, "device": gpu or "CPU", "peak_tflops": peak}


@dataclass(frozen=True)
class Rates:
    """The rates of one device that bound the time of its work.

    :param flops: floating-point operations a second; :param memory: bytes a second.
    :param link: bytes a second from the host; None: there is no way to go, or it is not known.
    :param source: where they come from, in words.
    """

    flops: float
    memory: float
    link: float | None
    source: str


def device_rates(device: torch.device, precision: str, override: float | None) -> Rates:
    """The rates of a device: those of its data sheet, or, where that is not known, as they are
    measured here, in less than a second.

    :param precision: bf16 or fp32; :param override: `metrics.peak_tflops`.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    known = peak_tflops(gpu, precision, override)
    memory, link = (None if gpu is None else _listed(BANDWIDTHS, gpu)) or (None, None)
    source = "data sheet" if override is None else "metrics.peak_tflops"
    if known is None or memory is None:
        source = "measured here" if known is None else f"{source}; memory measured here"
    return Rates(
        _measured_flops(device, DTYPES[precision]) if known is None else 1e12 * known,
        _measured_memory(device) if memory is None else 1e12 * memory,
        None if link is None else 1e9 * link,
        source,
    )


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Of a product of two square matrices."""
    side = 4096 if device.type == "cuda" else 1024
    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: torch.mm(a, b), device)


def _measured_memory(device: torch.device) -> float:
    """Of a copy, which reads and writes."""
    size = (1 << 30) if device.type == "cuda" else (1 << 26)
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * size / _best_seconds(lambda: b.copy_(a), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of several turns, after one that warms up."""
    taken = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken[1:])
