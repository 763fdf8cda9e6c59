"""CasaForConditionalGeneration: vision tower -> fused decoder -> logits, and generation.

The entry file of an export. Both transformers generations copy only an entry file's direct relative
imports, so it names every file it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModel,
    AutoProcessor,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention import Segments, choose_backend, on_device
from .block import DecoderContext
from .casa import Casa
from .chat_template import ChatTemplate
from .configuration_casa import CasaConfig
from .decoder import FUSED, backbone_rope, check_backbone, fuse_layers, run_decoder
from .fusion import FusionMechanism
from .gated import GatedCrossAttention
from .generation import StreamingGeneration, as_ints, image_list
from .hyper import HyperAttention
from .image_processing_casa import SIDE
from .insertion import Insertion
from .mechanisms import build_mechanism
from .messages import Message
from .packed import PackedInputs
from .processing_casa import CasaProcessor
from .qformer import QFormerInsertion
from .reads import ImageReads
from .recompute import check_recomputed
from .rope import rope_table
from .streaming import FlatCache, StreamingState
from .text_ids import TextIds
from .vision import VisionTower
from .windowed import WindowedMechanism
from .windows import Chunk, image_spans

# Keywords of older clients and of `generate` that carry nothing this model needs.
TOLERATED = {
    "reinit_casa_handler",
    "__is_first_gen_call__",
    "return_dict",
    "cache_position",
    "token_type_ids",
    "next_sequence_length",
    "is_first_iteration",
}
# The attention backend that each of transformers' names asks for.
BACKEND_OF = {"flash_attention_2": "flash_attn", "sdpa": "auto", "eager": "sdpa", None: "auto"}


class CasaPreTrainedModel(PreTrainedModel):
    config_class = CasaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_cache_class = True
    # Class names of what a device_map keeps on one device.
    _no_split_modules = [*(fused.__name__ for fused in FUSED.values()), "VisionTower", "QFormer"]

    def _init_weights(self, module: Any) -> None:
        """The first weights of what is not loaded, alike in both transformers generations."""
        bias = getattr(module, "bias", None)
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
        elif type(module).__name__.endswith("Norm"):
            nn.init.ones_(module.weight)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()
            return
        if isinstance(bias, Tensor):
            nn.init.zeros_(bias)


# GenerationMixin is named again because transformers 4 looks for it among the direct bases.
class CasaForConditionalGeneration(CasaPreTrainedModel, StreamingGeneration, GenerationMixin):
    """A text decoder that sees images through a fusion mechanism.

    Parameters: `model.*` are the backbone's own names, `model.layers.N.fusion.*` the mechanism's,
    `visual.*` the Qwen2.5-VL tower's, `adapter.*` a linear where vision and text widths differ,
    `resampler.*` what a mechanism puts between tower and decoder.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision: Any = config.vision_config
        check_backbone(text)
        if vision.patch_size * vision.spatial_merge_size != SIDE:
            raise ValueError(
                f"vision_config: patch_size {vision.patch_size} times spatial_merge_size "
                f"{vision.spatial_merge_size} must be {SIDE}, the grid images are resized to"
            )
        self.mechanism: FusionMechanism = build_mechanism(config.fusion, text)
        self.model = AutoModel.from_config(text)
        fuse_layers(self.model, self.mechanism)
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.visual = VisionTower(vision)
        self.adapter: nn.Module = nn.Identity()
        if vision.out_hidden_size != text.hidden_size:
            self.adapter = nn.Linear(vision.out_hidden_size, text.hidden_size)
        self.resampler: nn.Module | None = self.mechanism.make_resampler()
        # A matter of the run, not of the model: no configuration and no export carries it.
        self.recomputed = "none"
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the library's, and with the code, which transformers 4.51 would leave behind."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            custom_object_save(self, save_directory)

    def get_input_embeddings(self) -> nn.Module:
        embeddings: nn.Module = self.model.embed_tokens
        return embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def initialise_fusion(self) -> None:
        """Gives the fusion parameters their first values; call once after backbone weights are
        in.
        """
        for layer in self.model.layers:
            self.mechanism.initialise(layer)

    def recompute_activations(self, blocks: str) -> None:
        """Trades memory for work: these blocks keep only their inputs for the backward pass.

        :param blocks: none, decoder (fusion included), vision (the trained blocks) or all. In
            training mode alone; values and gradients stay what they are.
        """
        check_recomputed(blocks)
        self.recomputed = blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers' `is_gradient_checkpointing` reads."""
        return self.recomputed != "none"

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        """What `gradient_checkpointing_enable` comes down to in both transformers generations: all
        blocks or none, always without re-entering autograd.
        """
        wanted = getattr(gradient_checkpointing_func, "func", checkpoint)
        if every_n_layers != 1 or wanted is not checkpoint:
            raise ValueError(
                f"activation checkpointing with every_n_layers={every_n_layers} or with "
                "offload=True is not supported: leave both out, or choose blocks with "
                "recompute_activations('decoder') or ('vision')"
            )
        self.recompute_activations("all" if enable else "none")

    def _recomputes(self, part: str) -> bool:
        """Whether the blocks of a part run again in the backward pass of this forward pass."""
        return self.training and torch.is_grad_enabled() and self.recomputed in (part, "all")

    @property
    def attention_backend(self) -> str:
        """The attention backend that will run, by `attn_implementation`, device and dtype."""
        requested = getattr(self.config, "_attn_implementation", None)
        weight = self.model.norm.weight
        return choose_backend(BACKEND_OF.get(requested, "auto"), weight.device, weight.dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Sequence[Tensor] | Tensor | None = None,
        past_key_values: Any = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_embeds_insertion_points: Sequence[Any] | None = None,
        image_follows: Sequence[Sequence[bool]] | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        packed: PackedInputs | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of a padded batch (Hugging Face's interface) or of a pack (training).

        :param input_ids: (B, T) ids; with a cache, the new tokens only.
        :param pixel_values: (3, H, W) each, values 0..255, over all samples in order.
        :param past_key_values: cache to continue; only text enters it unless the mechanism inserts.
        :param position_ids: ignored: positions follow from the stream.
        :param attention_mask: (B, T) or longer; its last T columns tell padding from text.
        :param image_embeds_insertion_points: for each sample, the columns of these `input_ids` at
            which its images stand.
        :param image_follows: for each sample, whether each image is a frame of the same video as
            the image before it; read by `window_scope=all_frames`.
        :param labels: (B, T) ids, -100 where nothing is learned.
        :param packed: replaces all of the above; logits are then (A, vocabulary).
        :return: logits (B, T, vocabulary), loss if `labels`, and the cache.
        :raises TypeError: unknown keywords.
        """
        # What is None or False asks for nothing: peft names every argument it knows.
        unknown = sorted(
            k for k, v in kwargs.items() if k not in TOLERATED and v is not None and v is not False
        )
        if unknown:
            raise TypeError(f"CasaForConditionalGeneration.forward does not take {unknown}")
        if packed is not None:
            hidden = self._hidden(packed.input_ids, packed.chunks, packed.images)
            if packed.logits_index is not None:
                hidden = hidden.index_select(0, packed.logits_index)
            return CausalLMOutputWithPast(logits=self.lm_head(hidden))
        if input_ids is None:
            raise ValueError("forward needs input_ids (or packed)")

        batch, width = input_ids.shape
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        state = None
        if past_key_values is not None:
            state = self._state(past_key_values, batch)
            # Generated ids that have not entered yet come first, unless the caller brings them.
            before = self._before(state, input_ids, image_embeds_insertion_points)
            if before is not None:
                state.pending = before
                self.forward(input_ids=before, past_key_values=past_key_values)
        valid = _valid_columns(input_ids, attention_mask)
        images = image_list(pixel_values)
        chunks = self._chunks(valid, image_embeds_insertion_points, image_follows, images, state)
        flat = _flat_index(valid)
        flat_ids = input_ids.flatten().index_select(0, flat.to(input_ids.device))
        hidden = self._hidden(flat_ids, chunks, images, past_key_values)
        padded = hidden
        if len(flat) != batch * width:
            padded = hidden.new_zeros(batch * width, hidden.shape[-1])
            padded = padded.index_copy(0, flat.to(hidden.device), hidden)
        padded = padded.unflatten(0, (batch, width))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(padded[:, kept])
        if state is not None:
            state.columns += width
            state.pending = None
            ids = input_ids.detach()
            state.history = ids if state.history is None else torch.cat([state.history, ids], 1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def pack(
        self, input_ids: Tensor, points: Sequence[int], images: Sequence[Tensor]
    ) -> PackedInputs:
        """One sample as a pack.

        :param input_ids: (T,); :param points: insertion points; :param images: (3, H, W) each.
        """
        counts = tuple(self.visual.token_counts(images))
        chunk = Chunk(len(input_ids), tuple(points), counts)
        return PackedInputs(input_ids, [chunk], list(images))

    @torch.no_grad()
    def image_reads(self, packed: PackedInputs) -> ImageReads:
        """How much of what text reads in each layer comes from images, in a pack.

        For the rows of `packed.logits_index`, or all text.
        """
        rows = packed.logits_index
        if rows is None:
            rows = torch.arange(len(packed.input_ids), device=packed.input_ids.device)
        reads = ImageReads(rows)
        self._hidden(packed.input_ids, packed.chunks, packed.images, reads=reads)
        return reads

    def _hidden(
        self,
        ids: Tensor,
        chunks: Sequence[Chunk],
        images: Sequence[Tensor],
        past_key_values: Any = None,
        reads: ImageReads | None = None,
    ) -> Tensor:
        """(T, C) final hidden states of the packed text tokens."""
        counts = self.visual.token_counts(images)
        promised = [n for chunk in chunks for n in chunk.images]
        if len(ids) != sum(chunk.text for chunk in chunks) or counts != promised:
            raise ValueError(
                f"the chunks promise {sum(c.text for c in chunks)} text tokens and images of "
                f"{promised} tokens; given are {len(ids)} text tokens and images of {counts} tokens"
            )
        mechanism = self.mechanism
        if mechanism.multimodal:
            chunks = _with_rows(chunks, [image.shape[1] // SIDE for image in images])
        chunks = mechanism.compress(chunks)
        text = self.model.embed_tokens(ids)
        backend = self.attention_backend
        # Layouts first: while the host makes them, a GPU still has the last micro-step to do.
        state: StreamingState | None = None
        cache = None
        if past_key_values is not None:
            state = past_key_values.casa
            cache = FlatCache(past_key_values, state, mechanism.stream_lengths(chunks))
        plan = mechanism.plan(chunks, state, cache, text.device)

        def table(positions: Tensor | None) -> Any:
            if positions is None:
                return None
            return rope_table(self.model.config, positions, text.dtype)

        stream = table(plan.stream_positions)
        same = plan.query_positions is plan.stream_positions
        keep = None
        if state is not None:
            rows = [np.arange(a, b) for ranges in plan.keep for a, b in ranges]
            keep = on_device(np.concatenate(rows) if rows else np.zeros(0, np.int64), text.device)
        context = DecoderContext(
            mechanism=mechanism,
            plan=plan,
            rope=backbone_rope(self.model.config),
            stream_table=stream,
            query_table=stream if same else table(plan.query_positions),
            image_table=table(plan.image_positions),
            backend=backend,
            cache=cache,
            state=state,
            keep_index=keep,
            reads=reads,
        )
        if images:
            tokens = self.adapter(self.visual(images, backend, self._recomputes("vision")))
            if self.resampler is not None:
                tokens = self.resampler(tokens, counts, backend)
        else:
            tokens = text.new_zeros(0, text.shape[-1])
        recompute = cache is None and self._recomputes("decoder")
        hidden = run_decoder(self.model, text, tokens, context, recompute)
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

    def _state(self, cache: Any, batch: int) -> StreamingState:
        state: StreamingState | None = getattr(cache, "casa", None)
        if state is None:
            if getattr(cache, "is_compileable", False):  # those return all their slots, used or not
                raise ValueError(
                    f"past_key_values is a {type(cache).__name__}, whose size is fixed; expected a "
                    "cache that grows with the text: pass DynamicCache(), or no "
                    "cache_implementation"
                )
            if cache.get_seq_length() > 0:
                raise ValueError(
                    f"past_key_values already holds {cache.get_seq_length()} tokens that this "
                    "model "
                    "did not put there: start with an empty DynamicCache()"
                )
            state = cache.casa = StreamingState(batch)
        if state.batch != batch:
            raise ValueError(
                f"past_key_values belongs to a batch of {state.batch}, input_ids to one of {batch}"
            )
        return state

    def _chunks(
        self,
        valid: np.ndarray,
        points: Sequence[Any] | None,
        follows: Sequence[Sequence[bool]] | None,
        images: Sequence[Tensor],
        state: StreamingState | None,
    ) -> list[Chunk]:
        batch, width = valid.shape
        columns = [as_ints(p) for p in points] if points is not None else [[] for _ in range(batch)]
        if len(columns) != batch:
            raise ValueError(
                f"image_embeds_insertion_points lists {len(columns)} samples, input_ids holds "
                f"{batch}"
            )
        slots = sum(map(len, columns))
        if slots != len(images):
            raise ValueError(
                f"{slots} insertion points but {len(images)} images in pixel_values: every "
                "insertion "
                "point needs exactly one image"
            )
        counts = iter(self.visual.token_counts(images))
        chunks = []
        for row, sample_points in enumerate(columns):
            if any(not 0 <= p <= width for p in sample_points):
                raise ValueError(
                    f"insertion points {sample_points} of sample {row} lie outside 0..{width}, the "
                    "columns of input_ids"
                )
            before = np.concatenate([[0], np.cumsum(valid[row])])  # text tokens before each column
            chunks.append(
                Chunk(
                    text=int(before[-1]),
                    points=tuple(int(before[p]) for p in sample_points),
                    images=tuple(next(counts) for _ in sample_points),
                    past_text=0 if state is None else state.text[row],
                    follows=() if follows is None else _following(follows[row], state, row),
                    past_span=0 if state is None else state.span[row],
                )
            )
        return chunks


def _following(follows: Sequence[bool], state: StreamingState | None, row: int) -> tuple[bool, ...]:
    """What follows a frame: the first image of a stream has none before it."""
    first = state is not None and state.span[row] > 0
    return tuple(bool(f) and (i > 0 or first) for i, f in enumerate(follows))


def _with_rows(chunks: Sequence[Chunk], rows: Sequence[int]) -> list[Chunk]:
    """The chunks with the rows of their images, which multimodal RoPE asks for."""
    left = iter(rows)
    return [replace(c, rows=tuple(next(left) for _ in c.images)) for c in chunks]


def _valid_columns(input_ids: Tensor, attention_mask: Tensor | None) -> np.ndarray:
    """(B, T) bool on the host: which of the new columns hold text."""
    batch, width = input_ids.shape
    if width == 1 or attention_mask is None:
        return np.ones((batch, width), bool)
    if attention_mask.shape[0] != batch or attention_mask.shape[1] < width:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected ({batch}, {width}) "
            "or "
            "more columns, of which the last belong to these input_ids"
        )
    valid: np.ndarray = attention_mask[:, -width:].bool().cpu().numpy()
    if not valid.any(1).all():
        raise ValueError("attention_mask hides every token of a sample")
    return valid


def _flat_index(valid: np.ndarray) -> Tensor:
    """(T,) indices of the valid entries of a flattened (B, T) batch."""
    return torch.from_numpy(np.flatnonzero(valid.ravel()))


# The pipelines of transformers 4 load a processor only for configurations that are registered.
AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)

__all__ = [
    "Casa",
    "CasaForConditionalGeneration",
    "CasaPreTrainedModel",
    "GatedCrossAttention",
    "HyperAttention",
    "ChatTemplate",
    "ImageReads",
    "Insertion",
    "Message",
    "PackedInputs",
    "QFormerInsertion",
    "Segments",
    "TextIds",
    "WindowedMechanism",
]
