"""Tells a timeline which part of a model runs: hooks on its modules for the time of one step.

Forward, the part is that of the innermost module that has one. Backward, each module's output marks
the place in the graph where its own backward pass begins. What a parameter's gradient costs from
there, its sum and its way over the ranks, is the reduction. The model's code knows nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from casa_train.metrics.timeline import (
    DECODER,
    FUSION,
    LOSS,
    REDUCTION,
    VISION_FROZEN,
    VISION_TRAINED,
    Timeline,
    backward_of,
)
from casa_train.training.roofline import PackSizes


class PartHooks:
    """Follows a model while it is attached.

    Decoder layers: what is below a layer's `fusion` is fusion, and so is a call of the layer's own
    modules on as many rows as there are image tokens, and not as many as the stream has (shared
    projections, updates of image tokens). What lies between calls is the decoder's.

    :param model: a CasaForConditionalGeneration, sharded or not.
    :ivar packs: what entered each forward pass of the step.
    """

    def __init__(self, model: Any, timeline: Timeline) -> None:
        self.model, self.timeline = model, timeline
        self.packs: list[PackSizes] = []
        self._handles: list[Any] = []
        self._rows = (0, 0)  # stream and image tokens of the layer that runs
        self._interrupted: str | None = None

    def attach(self) -> None:
        """Hooks the modules; `remove` undoes all of it."""
        model = self.model
        self._handles.append(model.register_forward_pre_hook(self._pack, with_kwargs=True))
        tower = model.visual
        self._follow(tower, _vision_part(tower.patch_embed))
        for module in (*tower.blocks, tower.merger):
            self._follow(module, _vision_part(module), counted=True)
        if not isinstance(model.adapter, nn.Identity):
            self._follow(model.adapter, FUSION, counted=True)
        if model.resampler is not None:
            self._follow(model.resampler, FUSION, counted=True)
        self._follow(model.joint_keys, FUSION, counted=True)
        for layer in model.model.layers:
            self._follow_layer(layer)
        for module in (model.model.embed_tokens, model.model.norm):
            self._follow(module, DECODER)
        self._follow(model.lm_head, LOSS, counted=True)
        self._handles.append(model.lm_head.register_forward_hook(self._watch_the_end))
        for parameter in model.parameters():
            if parameter.requires_grad:
                accumulated = parameter.register_post_accumulate_grad_hook(self._reduced)
                self._handles += [parameter.register_hook(self._reduces), accumulated]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _follow_layer(self, layer: Any) -> None:
        def note_rows(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._rows = len(inputs[0]), len(inputs[1])

        self._handles.append(layer.register_forward_pre_hook(note_rows))
        self._follow(layer, DECODER, counted=True)
        of_fusion = set() if layer.fusion is None else set(layer.fusion.modules())
        for module in layer.modules():
            if module is layer.fusion:
                self._follow(module, FUSION, counted=True)
            elif module in of_fusion:
                self._follow(module, FUSION)
            elif module is not layer:
                self._follow(module, self._by_rows)

    def _by_rows(self, inputs: tuple[Any, ...]) -> str:
        stream, images = self._rows
        rows = len(inputs[0]) if inputs and isinstance(inputs[0], Tensor) else stream
        return FUSION if rows == images != stream else DECODER

    def _follow(
        self,
        module: nn.Module,
        part: str | Callable[[tuple[Any, ...]], str],
        counted: bool = False,
    ) -> None:
        """Hooks a module: its calls, and where their backward passes begin."""
        timeline = self.timeline
        parts: list[str] = []

        def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if torch.compiler.is_compiling():  # what is compiled is of whatever calls it
                return
            parts.append(part if isinstance(part, str) else part(inputs))
            timeline.push(parts[-1], counted)

        def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if torch.compiler.is_compiling():
                return
            timeline.pop()
            of = parts.pop()
            # Behind a tower's frozen blocks, its output may all the same need a gradient.
            backward = backward_of(VISION_TRAINED if of == VISION_FROZEN else of)
            if timeline.backward:  # an activation checkpoint that runs again
                return
            for tensor in output if isinstance(output, tuple) else (output,):
                passed_on = any(tensor is given for given in inputs)
                if isinstance(tensor, Tensor) and tensor.grad_fn is not None and not passed_on:
                    tensor.grad_fn.register_prehook(lambda _: timeline.turn(backward))

        for hook in (before, after):  # image keys of all layers are made as without them
            vars(hook)["only_watches"] = True
        # First, so that the weights that ZeRO-3 gathers for a module are gathered on its account.
        self._handles.append(module.register_forward_pre_hook(before, prepend=True))
        # Always: a checkpointed block is broken off once it has made what was missing.
        self._handles.append(module.register_forward_hook(after, always_call=True))

    def _pack(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.timeline.running:
            self.packs.append(PackSizes.of(keywords["packed"]))

    def _watch_the_end(self, module: nn.Module, inputs: Any, logits: Any) -> None:
        """Once autograd is done, what the engine still does is reduction."""
        if isinstance(logits, Tensor) and logits.grad_fn is not None:
            engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
            logits.grad_fn.register_prehook(
                lambda _: engine.queue_callback(lambda: self.timeline.turn(REDUCTION))
            )

    def _reduces(self, gradient: Tensor) -> None:
        if self.timeline.current != REDUCTION:
            self._interrupted = self.timeline.current
            self.timeline.turn(REDUCTION)

    def _reduced(self, parameter: Tensor) -> None:
        if self._interrupted is not None:
            self.timeline.turn(self._interrupted)


def _vision_part(module: nn.Module) -> str:
    trains = any(parameter.requires_grad for parameter in module.parameters())
    return VISION_TRAINED if trains else VISION_FROZEN
