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

from .activation_checkpointing import check_blocks
from .attention import choose_backend
from .block import DecoderContext
from .block_work import BlockWork
from .casa import Casa
from .chat_template import ChatTemplate
from .configuration_casa import CasaConfig
from .cross_attention import CrossAttention
from .decoder import FUSED, backbone_rope, check_backbone, fuse_layers, run_decoder
from .fusion import FusionMechanism, build_mechanism
from .gated import GatedCrossAttention
from .generation import StreamingGeneration
from .hyper import HyperAttention
from .image_attention import ImageAttention
from .image_processing_casa import SIDE
from .image_sources import ImageError
from .insertion import Insertion
from .loading_options import split_options
from .mechanisms import MECHANISMS
from .messages import Message
from .outputs import CACHE, NEW_NAME, OLD_NAME, next_token_loss, one_cache, with_both_names
from .packed import PackedInputs
from .padded import (
    append_images,
    as_ints,
    check_ids,
    check_pixels,
    chunks_of,
    flat_index,
    image_list,
    unflatten,
    valid_columns,
    with_rows,
)
from .processing_casa import CasaProcessor
from .qformer import QFormerInsertion
from .rope import rope_table
from .segments import Segments, on_device
from .streaming import FlatCache, StreamingState, stream_state
from .text_ids import TextIds
from .vision import VisionTower
from .window_attention import WindowAttention
from .windowed import WindowedMechanism
from .windows import Chunk, image_spans

# Keywords of older clients and of `generate` that carry nothing this model needs.
TOLERATED = {
    "reinit_casa_handler",
    "__is_first_gen_call__",
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
    # With a device_map the cache stays where it is: its layers lie on their own devices.
    _skip_keys_device_placement = [OLD_NAME, NEW_NAME]
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

    # A Trainer then says by how many tokens to divide, and does not divide itself.
    accepts_loss_kwargs = True
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
        self.checkpointed = "none"
        self.post_init()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As the library's, and with the code, which transformers 4.51 would leave behind."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            custom_object_save(self, save_directory)

    @property
    def base_model(self) -> CasaForConditionalGeneration:
        """What trainers run for hidden states alone (TRL): the backbone by itself sees no images.
        The `last_hidden_state` of the output has them.
        """
        return self

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

    def checkpoint_activations(self, blocks: str) -> None:
        """Trades memory for work: these blocks keep only their inputs for the backward pass.

        :param blocks: none, decoder (fusion included), vision (the trained blocks) or all. In
            training mode alone; values and gradients stay what they are.
        """
        check_blocks(blocks)
        self.checkpointed = blocks

    @property
    def gradient_checkpointing(self) -> bool:
        """What transformers' `is_gradient_checkpointing` reads."""
        return self.checkpointed != "none"

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
                "checkpoint_activations('decoder') or ('vision')"
            )
        self.checkpoint_activations("all" if enable else "none")

    def _checkpoints(self, part: str) -> bool:
        """Whether the blocks of a part run again in the backward pass of this forward pass."""
        return self.training and torch.is_grad_enabled() and self.checkpointed in (part, "all")

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
        cache: Any = None,
        pre_image_tokens: Sequence[int] | None = None,
        post_image_tokens: Sequence[int] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        finished: Sequence[bool] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of a padded batch (Hugging Face's interface) or of a pack (training).

        :param input_ids: (B, T) ids; with a cache, the new tokens only.
        :param pixel_values: (3, H, W) each, values 0..255, over all samples in order.
        :param past_key_values: cache to continue; only text enters it unless the mechanism inserts.
            `cache` is the same, under the name that transformers 5.24 gives it.
        :param position_ids: ignored: positions follow from the stream.
        :param attention_mask: (B, T) or longer; its last T columns tell padding from text.
        :param image_embeds_insertion_points: for each sample, the columns of these `input_ids` at
            which its images stand.
        :param image_follows: for each sample, whether each image is a frame of the same video as
            the image before it; read by `window_scope=all_frames`.
        :param labels: (B, T) ids, -100 where nothing is learned.
        :param use_cache: whether to begin a cache where none is given. None: as the configuration
            has it, but never in training mode nor beside labels.
        :param packed: replaces all of the above; logits are then (A, vocabulary).
        :param pre_image_tokens: read where images come without insertion points: as in
            `generate_from_image`, these ids, the image and `post_image_tokens` are appended to
            every row. Otherwise the `input_ids` hold them already.
        :param num_items_in_batch: tokens to divide the loss by, see `next_token_loss`.
        :param finished: for each sample, whether its columns hold nothing: `generate` goes on with
            a batch of which some rows have ended.
        :param output_hidden_states: also return what enters each block, and the final states, as
            `hidden_states`: (B, T, C) each, or (T, C) of a pack; of text tokens, zero in padding.
        :return: logits (B, T, vocabulary), loss if `labels`, and the cache; a tuple where
            `return_dict` is False. What is None is as the configuration has it.
        :raises TypeError: unknown keywords; attention weights, which never exist as a whole.
        """
        # What is None or False asks for nothing: peft names every argument it knows.
        unknown = sorted(
            k for k, v in kwargs.items() if k not in TOLERATED and v is not None and v is not False
        )
        if unknown:
            raise TypeError(f"CasaForConditionalGeneration.forward does not take {unknown}")
        options = self._output_options(output_attentions, output_hidden_states, return_dict)
        states: list[Tensor] | None = [] if options["output_hidden_states"] else None
        if packed is not None:
            hidden = self._hidden(packed.input_ids, packed.chunks, packed.images, states=states)
            if packed.logits_index is not None:
                hidden = hidden.index_select(0, packed.logits_index)
            output = CausalLMOutputWithPast(
                logits=self.lm_head(hidden), hidden_states=None if states is None else tuple(states)
            )
            return output if options["return_dict"] else output.to_tuple()
        if input_ids is None:
            raise ValueError("forward needs input_ids (or packed)")
        check_ids(input_ids)
        # Points first: where samples were joined wrongly, their message says so.
        points = image_embeds_insertion_points
        points = None if points is None else [as_ints(p) for p in points]
        images = image_list(pixel_values)
        check_pixels(images)
        cache = one_cache(past_key_values, cache)
        if images and points is None:
            nothing_around = pre_image_tokens is None and post_image_tokens is None
            if nothing_around and not hasattr(cache, "casa"):  # later tokens of a stream read it
                raise ValueError(
                    "pixel_values without image_embeds_insertion_points would stand behind the "
                    "last token, where nothing reads them: pass the points, as the processor "
                    "returns them, or pre_image_tokens and post_image_tokens, between which the "
                    "image is then appended"
                )
            input_ids, attention_mask, points = append_images(
                input_ids, attention_mask, len(images), pre_image_tokens, post_image_tokens
            )
        batch, width = input_ids.shape
        if cache is None and (self._caches(labels) if use_cache is None else use_cache):
            cache = DynamicCache()
        valid = valid_columns(input_ids, attention_mask, finished)
        state = None
        if cache is not None:
            state = stream_state(cache, batch)
            # Generated ids that have not entered yet come first, unless the caller brings them.
            before = self._before(state, input_ids, points, valid)
            if before is not None:
                state.pending = None
                ids, mask = before
                self.forward(
                    ids, attention_mask=mask, finished=(~mask).all(1).tolist(), cache=cache
                )
        counts = self.visual.token_counts(images)
        chunks = chunks_of(valid, points, image_follows, counts, state)
        flat = flat_index(valid)
        flat_ids = input_ids.flatten().index_select(0, flat.to(input_ids.device))
        hidden = self._hidden(flat_ids, chunks, images, cache, states=states)
        padded = unflatten(hidden, flat, batch, width)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(padded[:, kept])
        if state is not None:
            for columns, new in zip(state.image_columns, points or [], strict=False):
                columns += [state.columns + point for point in new]
            state.columns += width
            state.pending = None
            ids = input_ids.detach()
            state.history = ids if state.history is None else torch.cat([state.history, ids], 1)
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=(
                None
                if states is None
                else tuple(unflatten(one, flat, batch, width) for one in states)
            ),
            **{CACHE: cache},
        )
        if not options["return_dict"]:
            return output.to_tuple()
        output.last_hidden_state = padded  # beside the fields, so that no one gathers it
        return with_both_names(output)

    def _caches(self, labels: Tensor | None) -> bool:
        """Whether a call that says nothing about it, nor brings a cache, begins one."""
        wanted = getattr(self.config, "use_cache", None)  # where callers set it
        if wanted is None:
            wanted = getattr(self.config.text_config, "use_cache", True)
        return bool(wanted) and labels is None and not self.training

    def _output_options(
        self, attentions: Any, hidden_states: Any, return_dict: Any
    ) -> dict[str, bool]:
        """What to return, as the call or else the configuration says."""
        given = {
            "output_attentions": attentions,
            "output_hidden_states": hidden_states,
            "return_dict": return_dict,
        }
        options = {
            name: bool(getattr(self.config, name) if value is None else value)
            for name, value in given.items()
        }
        if options["output_attentions"]:
            raise TypeError(
                "CasaForConditionalGeneration does not take output_attentions=True (nor a "
                "configuration with it): attention weights never exist as a whole. "
                "model.image_attention(...) tells how much of what a token reads comes from images"
            )
        return options

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
            chunks = with_rows(chunks, [image.shape[1] // SIDE for image in images])
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
            image_attention=image_attention,
        )
        if images:
            tokens = self.adapter(self.visual(images, backend, self._checkpoints("vision")))
            if self.resampler is not None:
                tokens = self.resampler(tokens, counts, backend)
        else:
            tokens = text.new_zeros(0, text.shape[-1])
        checkpointed = cache is None and self._checkpoints("decoder")
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


# The pipelines of transformers 4 load a processor only for configurations that are registered.
AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)

__all__ = [
    "MECHANISMS",
    "BlockWork",
    "Casa",
    "CasaForConditionalGeneration",
    "CasaPreTrainedModel",
    "ChatTemplate",
    "CrossAttention",
    "GatedCrossAttention",
    "HyperAttention",
    "ImageError",
    "ImageAttention",
    "Insertion",
    "Message",
    "PackedInputs",
    "QFormerInsertion",
    "Segments",
    "TextIds",
    "WindowAttention",
    "WindowedMechanism",
    "split_options",
]
