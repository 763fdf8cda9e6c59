"""What a precision means in torch, by its name in the configuration."""

from __future__ import annotations

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""By `parallel.precision`, what weights and activations are; the optimiser's values are fp32."""

FP32 = DTYPES["fp32"].itemsize
"""Bytes of a value of the optimiser."""
