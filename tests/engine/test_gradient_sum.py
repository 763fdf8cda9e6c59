"""Sums in fp32 of gradients in bf16, beside those of copies in fp32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from casa_train.engine.gradient_sum import add_to, fuse_sums


def test_a_sum_is_that_of_copies_bit_for_bit() -> None:
    drawn = torch.Generator().manual_seed(2)
    total = 1e3 * torch.randn(5000, generator=drawn)
    gradient = torch.randn(5000, generator=drawn).bfloat16()
    gradient[:3] = torch.tensor([float("nan"), float("inf"), 1e-40])
    expected = total + gradient.float()
    held = total.data_ptr()
    add_to(total, gradient)
    assert total.data_ptr() == held and total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)
    add_to(None, gradient)  # another rank's


def test_an_optimiser_that_adds_elsewhere_goes_on_as_it_did() -> None:
    other = SimpleNamespace()
    assert not fuse_sums(other) and vars(other) == {}
    adding: Any = SimpleNamespace(_add_to_grad_partition_buffer=None)
    assert fuse_sums(adding)
    total = torch.ones(2)
    adding._add_to_grad_partition_buffer(total, torch.tensor([2.0, 3.0]).bfloat16())
    assert total.tolist() == [3.0, 4.0]
