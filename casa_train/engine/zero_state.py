"""Which part of each parameter a rank holds under ZeRO 1, 2 or 3, and putting saved values there.

DeepSpeed 0.19 has three optimisers for this: one for stages 1 and 2, one for stage 1 in bf16, one
for stage 3. All keep fp32 masters as a few flat tensors with Adam's state beside each, and differ
in how these are cut. Their own checkpoints load at the same number of ranks only, and those of
stage 1 lack frozen weights; hence this file and `checkpoint/slices.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from casa_train.checkpoint.frozen import Kinds
from casa_train.checkpoint.slices import FROZEN, MASTER, MOMENTS, SavedSlices, Slice


class ZeroState:
    """The state of a DeepSpeed engine as slices of parameters by name.

    :param optimizer: the engine's; :param module: with all parameters, the frozen ones too.
    """

    def __init__(self, optimizer: Any, module: nn.Module, stage: int) -> None:
        self.optimizer, self.stage = optimizer, stage
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._parameters: dict[str, Any] = dict(module.named_parameters())
        self._names = {parameter: name for name, parameter in self._parameters.items()}

    def trained(self) -> list[Slice]:
        """This rank's masters, and their moments once there are any; views that can be written."""
        if self.stage == 3:
            return self._trained_by_parameter()
        optimizer, slices = self.optimizer, []
        # The trained parameters of a group are one long vector, cut evenly over the ranks.
        groups = _either(optimizer, "bit16_groups", "bf16_groups")
        for group, flat in zip(groups, self._masters(), strict=True):
            for parameter in group:
                mapping = parameter._hp_mapping
                if mapping is None:  # another rank's
                    continue
                ours, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                values = self._values(flat, here.start, here.numel)
                slices.append(self._slice(parameter, ours.start, values))
        return slices

    def _trained_by_parameter(self) -> list[Slice]:
        """Stage 3 cuts every parameter over the ranks; the last part may be padded."""
        slices = []
        for group, flat in zip(self.optimizer.fp16_groups, self._masters(), strict=True):
            offset = 0
            for parameter in group:
                start, count = self._own_range(parameter)
                if count:
                    slices.append(self._slice(parameter, start, self._values(flat, offset, count)))
                offset += parameter.ds_tensor.numel()
        return slices

    def frozen(self) -> list[Slice]:
        """What this rank holds of frozen weights, all of it below stage 3; can be written."""
        slices = []
        for parameter in self.frozen_parameters().values():
            if self.stage == 3:
                start, count = self._own_range(parameter)
                if count:
                    values = {FROZEN: parameter.ds_tensor.data[:count]}
                    slices.append(self._slice(parameter, start, values))
            else:
                slices.append(self._slice(parameter, 0, {FROZEN: parameter.data.view(-1)}))
        return slices

    def frozen_parameters(self) -> dict[str, Any]:
        """By name, in the order of the module: the same on every rank."""
        return {name: p for name, p in self._parameters.items() if not p.requires_grad}

    def frozen_kinds(self) -> Kinds:
        """Type and shape of the frozen weights, whole."""
        return {name: (p.dtype, _shape(p)) for name, p in self.frozen_parameters().items()}

    def updates(self) -> int:
        """How many updates Adam has made."""
        steps = {int(state["step"]) for state in self.optimizer.optimizer.state.values()}
        assert len(steps) <= 1, f"groups were updated at different times: {steps}"
        return steps.pop() if steps else 0

    @torch.no_grad()
    def load(self, saved: SavedSlices) -> None:
        """Puts what was saved into a fresh engine; collective.

        :raises UserError: on every rank, it is not the state of this model.
        """
        shapes = {name: _shape(parameter) for name, parameter in self._parameters.items()}
        saved.check(shapes, self.frozen_parameters())
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # gives up whole parameters, soon outdated
        if saved.updates:
            self.make_moments(saved.updates)
        for piece in (*self.trained(), *self.frozen()):
            saved.fill(piece)
        if self.stage == 3:
            optimizer = self.optimizer
            for own, flat in zip(
                optimizer.fp16_partitioned_groups_flat, self._masters(), strict=True
            ):
                own.data.copy_(flat)
            optimizer.checkpoint_event_epilogue()
        else:
            self.optimizer.update_lp_params()

    def make_moments(self, updates: int) -> None:
        """As torch's AdamW makes them at its first step, counting `updates` before."""
        inner = self.optimizer.optimizer
        on_device = inner.defaults["fused"] or inner.defaults["capturable"]
        for flat in self._masters():
            step = torch.tensor(float(updates), device=flat.device if on_device else "cpu")
            moments = {kind: torch.zeros_like(flat) for kind in MOMENTS}
            inner.state[flat] = {"step": step, **moments}

    def _masters(self) -> list[Tensor]:
        """The flat fp32 tensors that Adam updates on this rank."""
        names = (
            "single_partition_of_fp32_groups",
            "fp32_groups_flat_partition",
            "fp32_partitioned_groups_flat",
        )
        return list(_either(self.optimizer, *names))

    def _values(self, flat: Tensor, start: int, count: int) -> dict[str, Tensor]:
        state = self.optimizer.optimizer.state.get(flat, {})
        values = {MASTER: flat.data, **{kind: state[kind] for kind in MOMENTS if kind in state}}
        return {kind: tensor[start : start + count] for kind, tensor in values.items()}

    def _own_range(self, parameter: Any) -> tuple[int, int]:
        """Start and count of this rank's elements under stage 3."""
        part = parameter.ds_tensor.numel()
        start = min(self.rank * part, parameter.ds_numel)
        return start, min(part, parameter.ds_numel - start)

    def _slice(self, parameter: Any, start: int, values: dict[str, Tensor]) -> Slice:
        return Slice(self._names[parameter], _shape(parameter), start, values)


def _shape(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter; under stage 3 its own is that of nothing."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _either(owner: Any, *names: str) -> Any:
    """The first of these attributes that there is."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))
