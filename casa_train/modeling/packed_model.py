"""The model over packed tokens: vision tower, fused decoder and the state of a stream."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import logging

from .attention import choose_backend
from .base_model import CasaPreTrainedModel
from .block import DecoderContext
from .decoder import backbone_rope, run_decoder
from .decoding import DecodeStep
from .fusion import FusionMechanism
from .image_attention import ImageAttention
from .lean import Lean, is_lean
from .packed import PackedInputs
from .padded import as_ints, with_rows
from .rope import BY_PRODUCT, rope_frequencies, rope_table
from .segments import on_device
from .streaming import FlatCache, StreamingState
from .vision import VisionTower
from .windows import Chunk, image_spans

logger = logging.get_logger(__name__)

# The attention backend that each of transformers' names asks for.
BACKEND_OF = {"flash_attention_2": "flash_attn", "sdpa": "auto", "eager": "sdpa", None: "auto"}


class PackedModel(CasaPreTrainedModel):
    """The parts of a model and how a pack runs through them."""

    mechanism: FusionMechanism
    model: Any
    visual: VisionTower
    adapter: nn.Module
    resampler: nn.Module | None
    # Whether single tokens of a stream go by decode steps, or as whole forward passes.
    decode_steps = True
    # Whether torch.compile makes one function of a whole step: for sessions that outlast that.
    compile_decoding = False

    @property
    def attention_backend(self) -> str:
        """The attention backend that will run, by `attn_implementation`, device and dtype."""
        requested = getattr(self.config, "_attn_implementation", None)
        weight = self.model.norm.weight
        return choose_backend(BACKEND_OF.get(requested, "auto"), weight.device, weight.dtype)

    def pack(
        self, input_ids: Tensor, points: Sequence[int], images: Sequence[Tensor]
    ) -> PackedInputs:
        """One sample as a pack.

        :param input_ids: (T,); :param points: insertion points; :param images: (3, H, W) each.
        """
        counts = tuple(self.visual.token_counts(images))
        chunk = Chunk(len(input_ids), tuple(as_ints(points)), counts)
        return PackedInputs(input_ids, [chunk], list(images))

    @torch.no_grad()
    def image_attention(self, packed: PackedInputs) -> ImageAttention:
        """How much of what text reads in each layer comes from images, in a pack.

        For the rows of `packed.logits_index`, or all text.
        """
        rows = packed.logits_index
        if rows is None:
            rows = torch.arange(len(packed.input_ids), device=packed.input_ids.device)
        listener = ImageAttention(rows)
        self._hidden(packed.input_ids, packed.chunks, packed.images, image_attention=listener)
        return listener

    def _hidden(
        self,
        ids: Tensor,
        chunks: Sequence[Chunk],
        images: Sequence[Tensor],
        past_key_values: Any = None,
        image_attention: ImageAttention | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """(T, C) final hidden states of the packed text tokens; those of all blocks in `states`."""
        counts = self.visual.token_counts(images)
        promised = [n for chunk in chunks for n in chunk.images]
        if len(ids) != sum(chunk.text for chunk in chunks) or counts != promised:
            raise ValueError(
                f"the chunks promise {sum(c.text for c in chunks)} text tokens and images of "
                f"{promised} tokens; given are {len(ids)} text tokens and images of {counts} tokens"
            )
        mechanism = self.mechanism
        if mechanism.multimodal:
            chunks = with_rows(
                chunks, [image.shape[1] // self.visual.token_side for image in images]
            )
        chunks = mechanism.compress(chunks)
        text = self.model.embed_tokens(ids)
        backend, compiler = self.attention_backend, self._compiler_now()
        # Layouts first: while the host makes them, a GPU still has the last micro-step to do.
        state: StreamingState | None = None
        cache = None
        if past_key_values is not None:
            state = past_key_values.casa
            state.settle()
            cache = FlatCache(past_key_values, state, mechanism.stream_lengths(chunks))
        plan = mechanism.plan(chunks, state, cache, text.device)

        rope = backbone_rope(self.model.config)
        frequencies = rope_frequencies(self.model.config, text.device)

        def table(positions: Tensor | None) -> Any:
            if positions is None:
                return None
            return rope_table(rope, positions, frequencies, text.dtype)

        stream = table(plan.stream_positions)
        same = plan.query_positions is plan.stream_positions
        keep = None
        if state is not None:
            rows = [np.arange(a, b) for ranges in plan.keep for a, b in ranges]
            keep = on_device(np.concatenate(rows) if rows else np.zeros(0, np.int64), text.device)
        context = DecoderContext(
            mechanism=mechanism,
            plan=plan,
            rope=rope,
            stream_table=stream,
            query_table=stream if same else table(plan.query_positions),
            image_table=table(plan.image_positions),
            backend=backend,
            cache=cache,
            state=state,
            keep_index=keep,
            image_attention=image_attention,
            compiler=compiler,
        )
        if images:
            again = self._checkpoints("vision")
            tokens = self.adapter(self.visual(images, backend, again, compiler))
            if self.resampler is not None:
                tokens = self.resampler(tokens, counts, backend)
        else:
            tokens = text.new_zeros(0, text.shape[-1])
        checkpointed = cache is None and self._checkpoints("decoder")
        context.image_heads = self._image_heads(tokens, checkpointed)
        hidden = run_decoder(self.model, text, tokens, context, checkpointed, states)
        if state is not None and cache is not None:
            cache.commit()
            spans = [sum(image_spans(chunk, mechanism.multimodal)) for chunk in chunks]
            state.text = [a + chunk.text for a, chunk in zip(state.text, chunks, strict=True)]
            state.span = [a + span for a, span in zip(state.span, spans, strict=True)]
            state.window_text = [
                c.text - c.points[-1] if c.points else n + c.text
                for n, c in zip(state.window_text, chunks, strict=True)
            ]
            if plan.keep:
                state.window_lengths = [sum(b - a for a, b in ranges) for ranges in plan.keep]
        return hidden

    def _step(
        self,
        cache: Any,
        state: StreamingState,
        ids: Tensor,
        finished: Sequence[bool] | None,
        states: list[Tensor] | None,
    ) -> Tensor | None:
        """As `_hidden`, where every row brings one text token and no image.

        :param ids: (B,); :param finished: rows whose token is none, zero in what is returned.
        :return: None where a step cannot go on with this stream.
        """
        if not self.decode_steps or torch.is_grad_enabled():
            return None
        step = self._opened(cache, state)
        if step is None:
            return None
        active = np.ones(len(ids), bool) if finished is None else ~np.asarray(finished, bool)
        window = step.window.used
        try:
            step.begin(self, cache, state, active)
            hidden = self._run(step, ids, states)
            step.end(cache, state, active)
        except BaseException:
            step.abandon(cache, state, window)
            raise
        if not active.all():
            ended = ~step.flags(active)[:, None]
            hidden = hidden.masked_fill(ended, 0)
            if states is not None:
                states[:] = [one.masked_fill(ended, 0) for one in states]
        return hidden

    def _run(self, step: DecodeStep, ids: Tensor, states: list[Tensor] | None) -> Tensor:
        """(B, C) final hidden states, by a graph where there is one."""
        device = step.positions.device
        # Autocast keeps copies of weights, and only for as long as it lasts.
        known = torch.amp.is_autocast_available(device.type)  # not on the meta device
        casts = known and torch.is_autocast_enabled(device.type)
        compute = _compiled_step() if self.compile_decoding else _run_step
        # Contiguous, since callers cut it out of all their ids: nothing may change but the number.
        ids = ids.to(device).clone(memory_format=torch.contiguous_format)
        lean = not (casts or self.compile_decoding)
        with Lean(lean):
            if states is None and step.repeats and not casts:
                kind = torch.is_inference_mode_enabled(), step.text.whole, step.window.whole
                return step.graphs.run(kind, lambda ids: compute(self, step, ids, None), ids)
            if states is not None or step.watched or not lean:
                return compute(self, step, ids, states)
            with torch.inference_mode():  # in which every operation costs the host less
                hidden = compute(self, step, ids, None)
        # A copy, which callers may use outside of that mode.
        return hidden if torch.is_inference_mode_enabled() else hidden.clone()

    def _opened(self, cache: Any, state: StreamingState) -> DecodeStep | None:
        """The stream's decode step, ready for a token; None, and said once why, if it cannot."""
        if state.step is not None and state.step.goes_on(self):
            opened: DecodeStep = state.step
            return opened
        state.settle()
        reason = self._why_no_step()
        if reason is None:
            step = state.step or DecodeStep(state)
            reason = step.open(self, cache, state)
            if reason is None:
                state.step = step
                return step
        logger.warning_once(
            f"every token is decoded by a whole forward pass, slower than a decode step: {reason}"
        )
        return None

    def _why_no_step(self) -> str | None:
        """Why no stream of this model can go on by steps; None: it can."""
        mechanism = type(self.mechanism)
        if not mechanism.takes_steps():
            return (
                f"the fusion mechanism {mechanism.name!r} has a run_layer of its own beside which "
                "its class does not say decode_steps = True (casa_train/modeling/fusion.py)"
            )
        return None


def _run_step(
    model: PackedModel, step: DecodeStep, ids: Tensor, states: list[Tensor] | None
) -> Tensor:
    """(B, C) final hidden states of one token a row; those of all blocks in `states`."""
    text = model.model.embed_tokens(ids)
    products = is_lean()
    stream, query = step.tables(text.dtype, products)
    context = DecoderContext(
        mechanism=model.mechanism,
        plan=step.plan,
        rope=BY_PRODUCT if products else step.rope,
        stream_table=stream,
        query_table=query,
        image_table=None,
        backend=step.backend,
        step=step,
    )
    return run_decoder(model.model, text, text[:0], context, states=states)


@functools.cache
def _compiled_step() -> Callable[..., Tensor]:
    """`_run_step` by torch.compile, which takes a second to import what it needs."""
    compiled: Callable[..., Tensor] = torch.compile(_run_step)
    return compiled
