"""What a device could do at most, for the utilisation that a run reports."""

from __future__ import annotations

from typing import Any

import torch

from casa_train.config.schema import Config
from casa_train.distributed.ranks import Ranks

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


def peak_tflops(device_name: str | None, precision: str, override: float | None) -> float | None:
    """The peak of one device in TFLOP/s; None where it is not known, so that nothing is claimed.

    :param device_name: as CUDA reports it; None: a CPU.
    :param precision: bf16 or fp32; the table is for bf16 alone.
    :param override: `metrics.peak_tflops`, which counts more than the table.
    """
    if override is not None:
        return override
    # A slice of a GPU has its name and a part of its peak.
    if device_name is None or precision != "bf16" or "MIG" in device_name.split():
        return None
    words = set(device_name.upper().replace("-", " ").split())
    for name, peak in PEAK_TFLOPS:
        if set(name.upper().split()) <= words:
            return peak
    return None


def machine_facts(config: Config, ranks: Ranks) -> dict[str, Any]:
    """What a run is trained on: `ranks`, `device`, and `peak_tflops` of one device or None."""
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else None
    peak = peak_tflops(gpu, config.parallel.precision, config.metrics.peak_tflops)
    return {"ranks": ranks.world, "device": gpu or "CPU", "peak_tflops": peak}
