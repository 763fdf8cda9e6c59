"""Tensors of a pack on their way to the device.

A copy from ordinary memory makes the host wait for whatever the device is doing; from page-locked
memory it does not. Loaders lock packs with `pinned`, where there is a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def to_device(inputs: Any, targets: Tensor, device: torch.device) -> tuple[Any, Tensor]:
    """A pack's inputs and targets on the device; images stay uint8 and are normalised there.

    The batch itself stays where it is: a step holds all its micro-steps to the end.
    """
    return _copied(inputs, targets, lambda x: x.to(device, non_blocking=True))


def pinned(inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
    """The same pack in page-locked memory."""
    return _copied(inputs, targets, Tensor.pin_memory)


def _copied(inputs: Any, targets: Tensor, copy: Callable[[Tensor], Tensor]) -> tuple[Any, Tensor]:
    moved = dataclasses.replace(
        inputs,
        input_ids=copy(inputs.input_ids),
        logits_index=copy(inputs.logits_index),
        images=copy_images(inputs.images, copy),
    )
    return moved, copy(targets)


def copy_images(images: Sequence[Tensor], copy: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Copies of uint8 images; those that share one storage are copied in one piece."""
    storages = {image.untyped_storage().data_ptr() for image in images}
    whole = len(storages) == 1 and all(i.is_contiguous() and i.dtype == torch.uint8 for i in images)
    if not whole or len(images) == 1:
        return [copy(image) for image in images]
    storage = copy(torch.empty(0, dtype=torch.uint8).set_(images[0].untyped_storage()))
    return [
        storage.narrow(0, image.storage_offset(), image.numel()).view(image.shape)
        for image in images
    ]
