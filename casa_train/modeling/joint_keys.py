"""Keys and values of the image tokens for all layers at once: one norm, one product.

Where image tokens are the same in every layer, each layer's norm differs from the others' by its
weight alone. With that weight folded into the projections, norm(y; g) W^T = norm(y; 1) (W g)^T, all
layers read one normalised copy, and their projections become one. Gradients of g, W and y follow.

All keys and values lie in one tensor from before the first layer on, and so do their gradients,
beside those of each layer, when the backward pass has gone through all layers: by then everything
else that the layers kept is gone.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block import Heads, norm_heads, split_heads


class KeySource(NamedTuple):
    """Where a layer's keys and values of image tokens come from.

    :param norm: its output is its input, normalised, times its `weight`, which is its only
        parameter.
    :param owner: has the linears `k_proj` and `v_proj`, and where keys are normed by head a norm
        `k_norm`, which is called for each layer as everywhere.
    :param head_dim: D.
    """

    norm: nn.Module
    owner: Any
    head_dim: int

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        return self.owner.k_proj, self.owner.v_proj


class JointKeys(nn.Module):
    """Makes the keys and values of several layers; a module without parameters, so that whoever
    watches a model's modules sees this work by name.
    """

    def forward(self, images: Tensor, *sources: KeySource) -> tuple[Tensor, ...]:
        """Keys and values of each source in turn, (N, Hkv, D).

        A weight is folded in its own precision: rounding W g to bf16 costs what rounding g y does.

        :param images: (N, C).
        :param sources: their norms and biases are alike.
        """
        norm: Any = copy.copy(sources[0].norm)  # other threads read the layer's own
        norm._parameters = {"weight": torch.ones_like(norm.weight)}
        normed = norm(images)
        linears = [linear for source in sources for linear in source.linears]
        gains = [source.norm.get_parameter("weight") for source in sources for _ in source.linears]
        weight = torch.cat([x.weight * gain for x, gain in zip(linears, gains, strict=True)])
        bias = None if linears[0].bias is None else torch.cat([x.bias for x in linears])
        parts = nn.functional.linear(normed, weight, bias).split(
            [x.out_features for x in linears], 1
        )
        made = [
            (norm_heads(owner, "k_norm", k, width), split_heads(v, width))
            for (_, owner, width), k, v in zip(sources, parts[::2], parts[1::2], strict=True)
        ]
        return tuple(x for pair in made for x in pair)


class JointImageKeys:
    """The part of a model that says whether all layers' image keys are made at once.

    A matter of the run, not of the model: no configuration and no export carries it.

    :ivar joint_image_keys: True: wherever the decoder's blocks are not checkpointed, which would
        keep all keys and values where each block alone keeps none. False: never. None: only without
        gradients, and where the weights lie beside images that are large enough for the folding to
        pay. Never where a layer's modules do more than their weights say (`_untouched`).
    """

    joint_image_keys: bool | None = None
    joint_keys: JointKeys
    mechanism: Any
    model: Any

    def _image_heads(self, images: Tensor, checkpointed: bool) -> dict[int, Heads]:
        """By layer index what is made at once; empty: each layer makes its own.

        :param checkpointed: the decoder's blocks run again in the backward pass.
        """
        wanted = self.joint_image_keys
        if wanted is False or checkpointed or not len(images):
            return {}
        if wanted is None and torch.is_grad_enabled():
            return {}
        if not self.mechanism.joins_image_keys():
            return {}
        sources = {
            index: source
            for index, layer in enumerate(self.model.layers)
            if (source := self.mechanism.image_keys(layer)) is not None
        }
        if len(sources) < 2:
            return {}
        found = sources.values()
        if not all(map(_plain, found)):
            return {}
        if wanted is None and not all(_pays(source, images) for source in found):
            return {}
        made = self.joint_keys(images, *sources.values())
        pairs = zip(sources, made[::2], made[1::2], strict=True)
        return {index: Heads(None, k, v) for index, k, v in pairs}


def _plain(source: KeySource) -> bool:
    """Whether a layer's keys are those of its weights: no adapter or wrapper has taken over."""
    return _untouched(source.norm) and all(
        type(linear) is nn.Linear
        and _untouched(linear)
        # Else it is sharded.
        and linear.weight.shape == (linear.out_features, linear.in_features)
        for linear in source.linears
    )


def _untouched(module: Any) -> bool:
    """Whether nothing but its weight makes a module's output: no other forward, and no hook but
    those that say of themselves that they only watch (`only_watches`).
    """
    if type(getattr(module, "weight", None)) is not nn.Parameter or "forward" in vars(module):
        return False
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return all(getattr(hook, "only_watches", False) for hook in hooks)


def _pays(source: KeySource, images: Tensor) -> bool:
    """Whether a layer's weights lie at hand, and folding them costs less than a norm."""
    at_hand = all(
        (module.get_parameter("weight").device, module.get_parameter("weight").dtype)
        == (images.device, images.dtype)
        for module in (source.norm, *source.linears)
    )
    return at_hand and len(images) >= source.linears[0].out_features
