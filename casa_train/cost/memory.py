"""Memory of a rank: the state that DeepSpeed keeps, and what autograd saves for a backward pass.

The state follows DeepSpeed 0.19's ZeRO optimisers, to the byte. Saved tensors are counted while the
model itself runs forward, on any device: on the meta device that takes no memory and no time, and
counts what eager code with varlen attention saves; a compiled block saves less.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from casa_train.io.precision import DTYPES, FP32

# DeepSpeed's defaults, in elements.
REDUCE_BUCKET = 500_000_000
PERSISTENT_BELOW = 100_000  # ZeRO-3 keeps smaller tensors whole; the engine sets it
MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 holds gathered at once
ALIGNMENT = 2  # partitions of ZeRO 1 and 2 start at multiples of this


def bucket_elements(trained: int) -> int:
    """Size of the buffer in which gradients are reduced: DeepSpeed's default, or all of a smaller
    model. Which gradients travel together is the same either way.
    """
    return min(REDUCE_BUCKET, trained)


def state_bytes(
    groups: Sequence[Sequence[int]], frozen: Sequence[int], stage: int, world: int, precision: str
) -> dict[str, int]:
    """Bytes of parameters, gradients and optimiser on each of `world` ranks, by what they hold.

    :param groups: for each parameter group of the optimiser, the sizes of its tensors.
    :param frozen: sizes of the tensors that do not train.
    :param stage: ZeRO stage, 1 to 3.
    :param precision: bf16, with fp32 masters and accumulation, or fp32, where all values are.
    """
    width = DTYPES[precision].itemsize
    flat_sums = stage == 1 and precision == "bf16"
    trainable = [size for group in groups for size in group]
    total = sum(trainable)
    if stage == 3:
        own = sum(ceil(size / world) for size in trainable)
        kept = [size for size in (*trainable, *frozen) if size < PERSISTENT_BELOW]
        return {
            "parameters that train": width * own,
            "frozen parameters": width * sum(ceil(size / world) for size in frozen),
            "gathered parameters": width * (min(MAX_LIVE, total + sum(frozen)) + sum(kept)),
            "gradients": FP32 * own,
            "fp32 masters": FP32 * own,
            "Adam's moments": 2 * FP32 * own,
            "reduction bucket": width * bucket_elements(total),
        }
    own = sum(ALIGNMENT * ceil(sum(group) / (ALIGNMENT * world)) for group in groups)
    # Stage 1 accumulates whole gradients in fp32; its bf16 optimiser, which has no bucket, does so
    # in flat tensors that are padded like the masters.
    whole = own * world if flat_sums else total
    gradients = FP32 * (own if stage == 2 else whole)
    return {
        "parameters that train": width * total,
        "frozen parameters": width * sum(frozen),
        "gradients": gradients,
        "fp32 masters": FP32 * own,
        "Adam's moments": 2 * FP32 * own,
        "reduction bucket": 0 if flat_sums else width * bucket_elements(total),
    }


def logits_bytes(answers: int, vocabulary: int, precision: str) -> int:
    """Logits, their fp32 log-softmax and the gradients of both, as the backward pass starts."""
    return answers * vocabulary * (DTYPES[precision].itemsize + 3 * FP32)


class _Held:
    """A saved tensor and the module that saved it; it lives as long as autograd needs it."""

    __slots__ = ("__weakref__", "module", "tensor")

    def __init__(self, tensor: Tensor, module: str) -> None:
        self.tensor, self.module = tensor, module


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Bytes that autograd keeps between a forward pass and its backward pass.

    Every storage counts once, for the module that saved it first; parameters do not count. Of a
    checkpointed block that is its inputs.

    :param forward: runs `model` and returns what the backward pass would start from.
    :return: by name of the innermost module that was running.
    """
    running = [""]
    held: list[weakref.ref[_Held]] = []

    def pack(tensor: Tensor) -> _Held:
        holder = _Held(tensor, running[-1])
        held.append(weakref.ref(holder))
        return holder

    def leave(*_: Any) -> None:
        running.pop()

    handles = []
    vars(leave)["only_watches"] = True  # image keys of all layers are made as without it
    for name, module in model.named_modules():
        enter = partial(_enter, running, name)
        vars(enter)["only_watches"] = True
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
            graph = forward()
    finally:
        for handle in handles:
            handle.remove()
    counted = {_storage(p) for p in model.parameters()}
    found: dict[str, int] = defaultdict(int)
    for holder in (reference() for reference in held):
        if holder is not None and _storage(holder.tensor) not in counted:
            counted.add(_storage(holder.tensor))
            found[holder.module] += holder.tensor.untyped_storage().nbytes()
    del graph  # until here, or nothing would be kept
    return dict(found)


def _enter(running: list[str], name: str, *_: Any) -> None:
    running.append(name)


def _storage(tensor: Tensor) -> int:
    """Identifies a storage; on the meta device none has an address."""
    address: int = tensor.untyped_storage()._cdata
    return address
