"""CasaForConditionalGeneration: vision tower -> fused decoder -> logits, and generation.

The entry file of an export. Both transformers generations copy only an entry file's direct relative
imports, so it names every file it reaches.

Shapes, here and in the other files of this folder: B batch, T text tokens, N image tokens, S stream
tokens (T, or T + N where images are inserted), W windows, H heads, D head width, C model width.
Samples of a batch or pack are concatenated along the token axis; there is no padding inside the
model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoProcessor,
    DynamicCache,
    GenerationMixin,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import CausalLMOutputWithPast

from .activation_checkpointing import CheckpointedBlocks
from .adapter_check import AdapterCheck
from .attention import varlen_attention
from .backbones import Backbone
from .base_model import CasaPreTrainedModel
from .batching import CasaBatch
from .block import DecoderContext
from .block_work import BlockWork
from .casa import Casa
from .chat_template import ChatTemplate
from .configuration_casa import CasaConfig
from .cross_attention import CrossAttention
from .decoder import check_backbone, fuse_layers
from .decoding import DecodeStep
from .encoding import Encoded
from .fusion import FusionMechanism, build_mechanism
from .gated import GatedCrossAttention
from .generation import StreamingGeneration
from .graphs import Graphs
from .hyper import HyperAttention
from .image_adapter import build_adapter
from .image_attention import ImageAttention
from .image_processing_casa import CasaImageProcessor
from .image_sources import ImageError
from .insertion import Insertion
from .joint_keys import JointImageKeys, JointKeys
from .lean import Lean
from .loading_options import split_options
from .mechanisms import MECHANISMS
from .messages import Message
from .outputs import CACHE, next_token_loss, one_cache, with_both_names
from .packed import PackedInputs
from .packed_model import PackedModel
from .padded import (
    PaddedInputs,
    chunks_of,
    flat_index,
    padded_inputs,
    refuse_keywords,
    unflatten,
    valid_columns,
)
from .processing_casa import CasaProcessor
from .qformer import QFormerInsertion
from .regions import CompiledRegions
from .repeated_frames import RepeatedFrames
from .room import Room
from .rope import Rope
from .segments import Segments
from .streaming import StreamingState, stream_state
from .text_ids import TextIds
from .tower_kinds import TowerKind, tower_shape
from .towers import build_tower
from .vision import VisionTower
from .vision_block import VisionBlock
from .vision_qwen import QwenTower
from .vision_siglip import SiglipTower
from .window_attention import WindowAttention
from .windowed import WindowedMechanism
from .windows import Chunk


# GenerationMixin is named again because transformers 4 looks for it among the direct bases.
class CasaForConditionalGeneration(PackedModel, StreamingGeneration, GenerationMixin):
    """A text decoder that sees images through a fusion mechanism.

    Parameters: `model.*` are the backbone's own names, `model.layers.N.fusion.*` the mechanism's,
    `visual.*` the vision tower's, `adapter.*` what leads from its width to the text's, if anything,
    `resampler.*` what a mechanism puts between tower and decoder.
    """

    # A Trainer then says by how many tokens to divide, and does not divide itself.
    accepts_loss_kwargs = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: CasaConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        vision = config.vision_config
        check_backbone(text)
        self.mechanism: FusionMechanism = build_mechanism(config.fusion, text)
        self.model = AutoModel.from_config(text)
        fuse_layers(self.model, self.mechanism)
        self.lm_head: nn.Module = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.visual: VisionTower = build_tower(vision)
        self.adapter = build_adapter(config.adapter, tower_shape(vision).out, text.hidden_size)
        self.resampler: nn.Module | None = self.mechanism.make_resampler()
        self.joint_keys = JointKeys()
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
        :raises ValueError: adapters that the export keeps apart are not loaded.
        """
        refuse_keywords(kwargs)
        self.require_adapter()
        options = self._output_options(output_attentions, output_hidden_states, return_dict)
        states: list[Tensor] | None = [] if options["output_hidden_states"] else None
        if packed is not None:
            output = self._packed_output(packed, states)
            return output if options["return_dict"] else output.to_tuple()
        points, around = image_embeds_insertion_points, (pre_image_tokens, post_image_tokens)
        cache = one_cache(past_key_values, cache)
        batch = padded_inputs(input_ids, attention_mask, pixel_values, points, cache, around)
        if cache is None and (self._caches(labels) if use_cache is None else use_cache):
            cache = DynamicCache()
        padded, states = self._continue(batch, image_follows, cache, finished, states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(padded[:, kept])
        output = CausalLMOutputWithPast(
            loss=None if labels is None else next_token_loss(logits, labels, num_items_in_batch),
            logits=logits,
            hidden_states=None if states is None else tuple(states),
            **{CACHE: cache},
        )
        if not options["return_dict"]:
            return output.to_tuple()
        output.last_hidden_state = padded  # beside the fields, so that no one gathers it
        return with_both_names(output)

    def _packed_output(
        self, packed: PackedInputs, states: list[Tensor] | None
    ) -> CausalLMOutputWithPast:
        """Logits of a pack; :param states: takes the hidden states."""
        given, listener = (packed.input_ids, packed.chunks, packed.images), packed.image_attention
        hidden = self._hidden(*given, image_attention=listener, states=states)
        if packed.logits_index is not None:
            hidden = hidden.index_select(0, packed.logits_index)
        taken = None if states is None else tuple(states)
        return CausalLMOutputWithPast(logits=self.lm_head(hidden), hidden_states=taken)

    def _continue(
        self,
        batch: PaddedInputs,
        follows: Sequence[Sequence[bool]] | None,
        cache: Any,
        finished: Sequence[bool] | None,
        states: list[Tensor] | None,
    ) -> tuple[Tensor, list[Tensor] | None]:
        """(B, T, C) final hidden states of a batch, which goes on with the stream of `cache`.

        :return: these, and those of all blocks where `states` asks for them, alike.
        """
        ids, points = batch.ids, batch.points
        rows, width = ids.shape
        valid = valid_columns(ids, batch.mask, finished)
        state = None
        if cache is not None:
            state = stream_state(cache, rows)
            # Generated ids that have not entered yet come first, unless the caller brings them.
            before = self._before(state, ids, points, valid)
            if before is not None:
                state.pending = None
                earlier, mask = before
                ended = (~mask).all(1).tolist()
                self.forward(earlier, attention_mask=mask, finished=ended, cache=cache)
        stepped = self._stepped(batch, cache, state, finished, states)
        if stepped is not None:
            return stepped
        counts = self.visual.token_counts(batch.images)
        chunks = chunks_of(valid, points, follows, counts, state)
        flat = flat_index(valid)
        flat_ids = ids.flatten().index_select(0, flat.to(ids.device))
        hidden = self._hidden(flat_ids, chunks, batch.images, cache, states=states)
        if state is not None:
            for columns, new in zip(state.image_columns, points or [], strict=False):
                columns += [state.columns + point for point in new]
            state.enter(ids)
        if states is not None:
            states = [unflatten(one, flat, rows, width) for one in states]
        return unflatten(hidden, flat, rows, width), states

    def _stepped(
        self,
        batch: PaddedInputs,
        cache: Any,
        state: StreamingState | None,
        finished: Sequence[bool] | None,
        states: list[Tensor] | None,
    ) -> tuple[Tensor, list[Tensor] | None] | None:
        """`_continue` by a decode step; None where the batch asks for more, or has nothing yet."""
        rows, width = batch.ids.shape
        # Points without images are refused where images are counted.
        brings = bool(batch.images) or any(batch.points or ())
        if state is None or state.columns == 0 or width != 1 or brings:
            return None
        hidden = self._step(cache, state, batch.ids[:, 0], finished, states)
        if hidden is None:
            return None
        state.enter(batch.ids)
        return hidden[:, None], None if states is None else [one[:, None] for one in states]

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


# The pipelines of transformers 4 load a processor only for configurations that are registered.
AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)

__all__ = [
    "AdapterCheck",
    "Backbone",
    "BlockWork",
    "Casa",
    "CasaBatch",
    "CasaForConditionalGeneration",
    "CasaImageProcessor",
    "CasaPreTrainedModel",
    "ChatTemplate",
    "CheckpointedBlocks",
    "Chunk",
    "CompiledRegions",
    "CrossAttention",
    "DecodeStep",
    "DecoderContext",
    "Encoded",
    "FusionMechanism",
    "GatedCrossAttention",
    "Graphs",
    "HyperAttention",
    "ImageAttention",
    "ImageError",
    "Insertion",
    "JointImageKeys",
    "Lean",
    "MECHANISMS",
    "Message",
    "PackedInputs",
    "QFormerInsertion",
    "QwenTower",
    "RepeatedFrames",
    "Room",
    "Rope",
    "Segments",
    "SiglipTower",
    "StreamingState",
    "TextIds",
    "TowerKind",
    "VisionBlock",
    "WindowAttention",
    "WindowedMechanism",
    "split_options",
    "varlen_attention",
]
