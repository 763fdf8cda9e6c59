"""Norms of many gradients at once, beside float64 one by one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from casa_train.engine.gradient_norm import fuse_norms, norms

LARGEST = torch.finfo(torch.float32).max


def gradients(count: int, device: str = "cpu") -> list[Tensor]:
    """Of different sizes and shapes; the second one is empty, and all but one views of a vector."""
    drawn = torch.Generator().manual_seed(5)
    sizes = [(7,), (0,), (30, 40), *((11 * i + 1,) for i in range(count - 3))]
    numbers = [torch.Size(size).numel() for size in sizes]
    flat = torch.randn(sum(numbers), generator=drawn).to(device)
    views = [v.view(size) for v, size in zip(flat.split(numbers), sizes, strict=True)]
    return [views[0].clone() * 1e3, *views[1:]]


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_norms_are_those_of_every_tensor(dtype: torch.dtype | None) -> None:
    given = gradients(9)
    found = norms(given, dtype)
    assert found.dtype == (dtype or torch.float32) and found.shape == (9,) and found[1] == 0
    expected = torch.stack([g.double().pow(2).sum().sqrt() for g in given])
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-6 if dtype is None else 1e-14, atol=0
    )


class Partitioned(SimpleNamespace):
    """What of a DeepSpeed optimiser of stage 1 or 2 is used; notes what it takes the norm of."""

    def __init__(self, *groups: list[Tensor] | None) -> None:
        given = dict(enumerate(groups))
        super().__init__(averaged_gradients=given, check_grad_overflow=True, taken=[])

    def get_grad_norm_direct(
        self, found: list[Tensor], params: Any, norm_type: float = 2
    ) -> Tensor:
        self.taken.append(found)
        return torch.linalg.vector_norm(found[0], norm_type)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_single_number_that_is_not_finite_is_seen(value: float) -> None:
    for group, tensor in ((0, 0), (0, 2), (2, 3)):
        groups = [gradients(4), None, [LARGEST * g.sign() for g in gradients(5)]]
        optimizer: Any = Partitioned(*groups)
        assert fuse_norms(optimizer)
        found = optimizer.has_overflow_partitioned_grads_serial()
        assert found.shape == (1,) and not found  # no sum of such squares is finite in fp32
        groups[group][tensor].view(-1)[-1] = value  # type: ignore[index]
        assert optimizer.has_overflow_partitioned_grads_serial()


def test_a_norm_is_that_of_the_gradients_as_they_are() -> None:
    """Whether somebody has asked before, or not, and in the next step again."""
    first, second = gradients(4), gradients(6)
    optimizer: Any = Partitioned(first, second)
    assert fuse_norms(optimizer)
    for factor in (1.0, 2.0):
        if factor == 2.0:
            optimizer.has_overflow_partitioned_grads_serial()
        for group in (first, second, first):
            expected = torch.cat([g.double().flatten() for g in group]).norm()
            found = optimizer.get_grad_norm_direct(group, ["parameters"])
            torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
            if group is first:
                group[0].mul_(3)
    assert [len(found) for found in optimizer.taken] == [1] * 6


def test_an_optimiser_of_another_kind_goes_on_as_it_did() -> None:
    other = SimpleNamespace(averaged_gradients={}, check_overflow=None)
    before = dict(vars(other))
    assert not fuse_norms(other) and vars(other) == before


@pytest.mark.gpu
def test_on_a_gpu_the_number_of_tensors_costs_no_launches() -> None:
    given = gradients(300, "cuda")
    norms(given, torch.float64)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        found = norms(given, torch.float64)
    launches = [e for e in seen.events() if e.name.startswith(("cudaLaunch", "cuLaunch"))]
    assert 1 <= len(launches) <= 30
    expected = torch.stack([g.double().norm() for g in given])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
