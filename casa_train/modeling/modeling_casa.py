"""CasaForConditionalGeneration: vision tower -> fused decoder -> logits, and generation.

The entry file of an export. Both transformers generations copy only an entry file's direct relative
imports, so it names every file it reaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .attention import Segments, choose_backend
from .casa import Casa
from .configuration_casa import CasaConfig
from .decoder import DecoderContext, check_backbone, fuse_layers, rope_table, run_decoder
from .fusion import FusionMechanism
from .image_processing_casa import SIDE
from .insertion import Insertion
from .mechanisms import build_mechanism
from .packed import PackedInputs
from .streaming import FlatCache, StreamingState
from .vision import VisionTower
from .windows import Chunk

# Keywords of older clients and of `generate` that carry nothing this model needs.
TOLERATED = {
    "reinit_casa_handler",
    "__is_first_gen_call__",
    "return_dict",
    "cache_position",
    "token_type_ids",
    "output_attentions",
    "output_hidden_states",
    "next_sequence_length",
    "is_first_iteration",
}
# The attention backend that each of transformers' names asks for.
BACKEND_OF = {"flash_attention_2": "flash_attn", "sdpa": "auto", "eager": "sdpa", None: "auto"}


class CasaPreTrainedModel(PreTrainedModel):
    config_class = CasaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_cache_class = True
    _no_split_modules = [
        "LlamaDecoderLayer",
        "HeliumDecoderLayer",
        "Qwen2DecoderLayer",
        "VisionBlock",
    ]

    def _init_weights(self, module: nn.Module) -> None:
        """The first weights of what is not loaded, alike in both transformers generations."""
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.text_config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class CasaForConditionalGeneration(CasaPreTrainedModel, GenerationMixin):
    """A text decoder that sees images through a fusion mechanism.

    Parameters: `model.*` are the backbone's own names, `model.layers.N.fusion.*` the mechanism's,
    `visual.*` the Qwen2.5-VL tower's, `adapter.*` a linear where vision and text widths differ.
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
        self.streaming_cache: Any = None
        self.post_init()

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
            if layer.fusion is not None:
                self.mechanism.initialise(layer)

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
        :param labels: (B, T) ids, -100 where nothing is learned.
        :param packed: replaces all of the above; logits are then (A, vocabulary).
        :return: logits (B, T, vocabulary), loss if `labels`, and the cache.
        :raises TypeError: unknown keywords.
        """
        unknown = sorted(set(kwargs) - TOLERATED)
        if unknown:
            raise TypeError(f"CasaForConditionalGeneration.forward does not take {unknown}")
        if packed is not None:
            hidden = self._hidden(packed.input_ids, packed.chunks, packed.images, None, None)
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
        valid = _valid_columns(input_ids, attention_mask)
        images = _as_list(pixel_values)
        chunks = self._chunks(valid, image_embeds_insertion_points, images, state)
        flat = _flat_index(valid)
        flat_ids = input_ids.flatten().index_select(0, flat.to(input_ids.device))
        cache = None
        if state is not None:
            cache = FlatCache(past_key_values, state, self.mechanism.stream_lengths(chunks))
        hidden = self._hidden(flat_ids, chunks, images, state, cache)
        padded = hidden
        if len(flat) != batch * width:
            padded = hidden.new_zeros(batch * width, hidden.shape[-1])
            padded = padded.index_copy(0, flat.to(hidden.device), hidden)
        padded = padded.unflatten(0, (batch, width))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(padded[:, kept])
        if state is not None:
            state.columns += width
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

    def _hidden(
        self,
        ids: Tensor,
        chunks: Sequence[Chunk],
        images: Sequence[Tensor],
        state: StreamingState | None,
        cache: FlatCache | None,
    ) -> Tensor:
        """(T, C) final hidden states of the packed text tokens."""
        counts = self.visual.token_counts(images)
        promised = [n for chunk in chunks for n in chunk.images]
        if len(ids) != sum(chunk.text for chunk in chunks) or counts != promised:
            raise ValueError(
                f"the chunks promise {sum(c.text for c in chunks)} text tokens and images of "
                f"{promised} tokens; given are {len(ids)} text tokens and images of {counts} tokens"
            )
        text = self.model.embed_tokens(ids)
        backend = self.attention_backend
        if images:
            tokens = self.adapter(self.visual(images, backend))
        else:
            tokens = text.new_zeros(0, text.shape[-1])
        plan = self.mechanism.plan(chunks, state, cache, text.device)

        def table(positions: Tensor | None) -> Any:
            return (
                None if positions is None else rope_table(self.model.config, positions, text.dtype)
            )

        keep = None
        if state is not None:
            rows = [np.arange(a, b) for ranges in plan.keep for a, b in ranges]
            keep = torch.from_numpy(np.concatenate(rows) if rows else np.zeros(0, np.int64))
            keep = keep.to(text.device)
        context = DecoderContext(
            plan=plan,
            stream_table=table(plan.stream_positions),
            query_table=table(plan.query_positions),
            image_table=table(plan.image_positions),
            backend=backend,
            cache=cache,
            state=state,
            keep_index=keep,
        )
        hidden = run_decoder(self.model, text, tokens, context)
        if state is not None and cache is not None:
            cache.commit()
            state.text = [a + chunk.text for a, chunk in zip(state.text, chunks, strict=True)]
            state.images = [a + sum(c.images) for a, c in zip(state.images, chunks, strict=True)]
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
        images: Sequence[Tensor],
        state: StreamingState | None,
    ) -> list[Chunk]:
        batch, width = valid.shape
        columns = [_ints(p) for p in points] if points is not None else [[] for _ in range(batch)]
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
                    past_images=0 if state is None else state.images[row],
                )
            )
        return chunks

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Cuts `input_ids` down to the columns that the stream has not seen."""
        state = getattr(past_key_values, "casa", None)
        new = input_ids[:, (0 if state is None else state.columns) :]
        inputs = {
            "input_ids": new.contiguous(),
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": 1,
        }
        for name in ("pixel_values", "image_embeds_insertion_points"):
            if kwargs.get(name) is not None:
                inputs[name] = kwargs[name]
        return inputs

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        # Images enter once; later steps bring text only.
        for name in ("pixel_values", "image_embeds_insertion_points"):
            updated.pop(name, None)
        return updated

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`; beams and several return sequences are refused by name."""
        config = kwargs.get("generation_config") or self.generation_config
        for name in ("num_beams", "num_return_sequences"):
            value = kwargs.get(name, getattr(config, name, None))
            if value is not None and value > 1:
                raise ValueError(
                    f"{name}={value} is not supported: a stream's state cannot be reordered or "
                    "repeated yet; use greedy decoding or sampling with one sequence"
                )
        return super().generate(*args, **kwargs)

    @torch.no_grad()
    def generate_from_image(
        self,
        input_ids: Tensor,
        pixel_values: Sequence[Tensor] | Tensor | None,
        image_embeds_insertion_points: Sequence[Any] | None,
        attention_mask: Tensor | None = None,
        *,
        reset_streaming: bool = True,
        pre_image_tokens: Sequence[int] | None = None,
        post_image_tokens: Sequence[int] | None = None,
        past_key_values: Any = None,
        **generate_kwargs: Any,
    ) -> Tensor:
        """Generates from text and images, or continues a stream.

        :param input_ids: (B, T) new ids.
        :param pixel_values: images of the new ids.
        :param image_embeds_insertion_points: for each sample, columns of the new ids.
        :param reset_streaming: False continues the stream of `past_key_values` (or of the last
            call). The last id of a call enters the cache with the next one, in the older window.
        :param pre_image_tokens: with images but no insertion points for them, these ids are
            appended to every row, then the image stands, then `post_image_tokens`.
        :return: (B, T + new) the given ids and the new ones, as `generate` returns.
        """
        images = _as_list(pixel_values)
        if image_embeds_insertion_points is None and images:
            input_ids, attention_mask, image_embeds_insertion_points = _append_images(
                input_ids, attention_mask, len(images), pre_image_tokens, post_image_tokens
            )
        if past_key_values is None:
            past_key_values = None if reset_streaming else self.streaming_cache
        elif reset_streaming and getattr(past_key_values, "casa", None) is not None:
            raise ValueError(
                "past_key_values holds a stream, but reset_streaming is true: pass "
                "reset_streaming=False to continue it or a new DynamicCache() to start over"
            )
        if past_key_values is None:
            past_key_values = DynamicCache()
        self.streaming_cache = past_key_values
        state = getattr(past_key_values, "casa", None)
        ids, mask, offset = input_ids, attention_mask, 0
        if mask is None:
            mask = torch.ones_like(ids)
        points = image_embeds_insertion_points
        if state is not None and state.history is not None and state.pending is not None:
            # `generate` wants every id of the stream; points count from the first id that is new.
            earlier = torch.cat([state.history, state.pending], 1).to(ids.device)
            offset = earlier.shape[1]
            ids = torch.cat([earlier, ids], 1)
            mask = torch.cat([torch.ones_like(earlier), mask[:, -input_ids.shape[1] :]], 1)
            shift = state.pending.shape[1]
            points = None if points is None else [[p + shift for p in _ints(row)] for row in points]
        out = self.generate(
            input_ids=ids,
            attention_mask=mask,
            pixel_values=images or None,
            image_embeds_insertion_points=points,
            past_key_values=past_key_values,
            **generate_kwargs,
        )
        generated: Tensor = out if isinstance(out, Tensor) else out.sequences
        past_key_values.casa.pending = generated[:, past_key_values.casa.columns :]
        return generated[:, offset:]

    def start_ca_streaming_states(self) -> None:
        """Begins a stream: the next `generate_from_image(reset_streaming=False)` continues it."""
        self.streaming_cache = DynamicCache()

    def reset_ca_streaming_states(self) -> None:
        """Forgets the stream that `generate_from_image` keeps."""
        self.streaming_cache = None

    reset_casa_streaming_states = reset_ca_streaming_states


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


def _as_list(pixel_values: Sequence[Tensor] | Tensor | None) -> list[Tensor]:
    if pixel_values is None:
        return []
    if isinstance(pixel_values, Tensor) and pixel_values.ndim == 3:
        return [pixel_values]
    return list(pixel_values)


def _ints(points: Any) -> list[int]:
    values = points.tolist() if isinstance(points, Tensor) else list(points)
    return [int(p) for p in values]


def _append_images(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    images: int,
    before: Sequence[int] | None,
    after: Sequence[int] | None,
) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Appends one image to every row, with the ids that stand around it."""
    batch, width = input_ids.shape
    if images != batch:
        raise ValueError(
            f"{images} images for a batch of {batch} and no image_embeds_insertion_points: pass "
            "the "
            "points, or one image a row"
        )
    around = [*(before or []), *(after or [])]
    extra = torch.tensor([around] * batch, dtype=input_ids.dtype, device=input_ids.device)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    ids = torch.cat([input_ids, extra.reshape(batch, len(around))], 1)
    mask = torch.cat([mask, mask.new_ones(batch, len(around))], 1)
    return ids, mask, [[width + len(before or [])] for _ in range(batch)]


__all__ = [
    "Casa",
    "CasaForConditionalGeneration",
    "CasaPreTrainedModel",
    "Insertion",
    "PackedInputs",
    "Segments",
]
