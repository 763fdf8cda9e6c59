"""Packs on their way to a device, and digests of tensors that are made where these lie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from casa_train.data.materialize import PackedBatch, in_one_storage
from casa_train.data.transfer import copy_images, to_device
from casa_train.modeling.packed import PackedInputs
from casa_train.training.audit import PIECE, digest


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(28, 56), (56, 28), (84, 84)]
    return [torch.randint(256, (3, *s), dtype=torch.uint8, generator=generator) for s in sizes]


def batch(pictures: list[Tensor]) -> PackedBatch:
    ids = torch.arange(9)
    inputs = PackedInputs(ids, [], pictures, logits_index=torch.tensor([3, 5]))
    return PackedBatch(0, inputs, torch.tensor([7, 8]), [], ["a/1"], ["a"], 9, 15, (1.0, 1.0), 1)


class Copies:
    """Counts what is copied, and copies."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.sizes.append(tensor.numel())
        return tensor.clone()


@pytest.mark.parametrize("shared", [True, False])
def test_images_of_one_storage_are_copied_in_one_piece(shared: bool) -> None:
    expected = images()
    copies = Copies()
    made = copy_images(in_one_storage(expected) if shared else expected, copies)
    assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
    sizes = [image.numel() for image in expected]
    assert copies.sizes == ([sum(sizes)] if shared else sizes)
    assert copy_images([], copies) == []


def test_a_loader_pins_every_tensor_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = Copies()
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: copies(tensor))
    given = batch(in_one_storage(images()))
    pin = torch.utils.data._utils.pin_memory.pin_memory  # what DataLoader calls
    made = pin(given)
    assert isinstance(made, PackedBatch) and made.sample_ids == given.sample_ids
    assert copies.sizes == [9, 2, sum(image.numel() for image in images()), 2]
    assert torch.equal(made.targets, given.targets)
    assert all(torch.equal(a, b) for a, b in zip(made.inputs.images, images(), strict=True))


def test_the_batch_itself_stays_where_it_is() -> None:
    given = batch(in_one_storage(images()))
    inputs, targets = to_device(given.inputs, given.targets, torch.device("meta"))
    moved = [inputs.input_ids, inputs.logits_index, targets, *inputs.images]
    assert all(tensor.is_meta for tensor in moved)
    assert [image.shape for image in inputs.images] == [image.shape for image in images()]
    assert not given.targets.is_meta and not given.inputs.images[0].is_meta


@pytest.mark.slow
def test_digests_see_every_bit_and_place() -> None:
    values = torch.randn(PIECE + 100, generator=torch.Generator().manual_seed(0))
    plain = digest(values)
    assert plain == digest(values.clone().view(-1, 4))
    found = {plain}
    for place in (0, 1, 50, PIECE - 1, PIECE, PIECE + 99):
        for bit in (0, 1, 22, 30):
            changed = values.clone()
            changed.view(torch.int32)[place] ^= 1 << bit
            found.add(digest(changed))
    negated = values.clone()
    negated[7] = -negated[7]
    swapped = values.clone()
    swapped[[3, PIECE + 3]] = swapped[[PIECE + 3, 3]]
    found |= {digest(negated), digest(swapped), digest(torch.zeros(3)), digest(torch.zeros(4))}
    assert len(found) == 1 + 6 * 4 + 4
    assert digest(torch.zeros(0)) == 0
    assert digest(values.bfloat16()) == digest(values.bfloat16().float())
