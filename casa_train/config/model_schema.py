"""The fields of `model`: backbone, vision tower, chat template."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from casa_train.config.bounds import MOST_COUNT, Bound, Choice, PathOrHubId, Sizes, Switch
from casa_train.config.resume_marks import ADDED

_COUNT = Bound(1, MOST_COUNT, "at least 1")
_DEPTH = Bound(1, 1000, "1 to 1000")
_PARAMETERS = Bound(0, 10**13, "a number of parameters from 0 on")
_POSITIVE = Bound(0, words="a positive number", open_least=True)
_NOT_NEGATIVE = Bound(0, words="0 or more")

BackboneFields = Annotated[
    dict[str, Any],
    Sizes(
        {
            **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), _COUNT),
            **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _COUNT),
            **dict.fromkeys(
                ("max_position_embeddings", "sliding_window", "pretraining_tp"), _COUNT
            ),
            "num_hidden_layers": _DEPTH,
            "rms_norm_eps": _POSITIVE,
            "rope_theta": _POSITIVE,
            "no_rope_layer_interval": _COUNT,
            "max_window_layers": Bound(0, MOST_COUNT, "0 or more"),
            "initializer_range": _NOT_NEGATIVE,
            "attention_dropout": Bound(0, 1, "0 or more, below 1", open_most=True),
        }
    ),
]
VisionFields = Annotated[
    dict[str, Any],
    Sizes(
        {
            **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), _COUNT),
            **dict.fromkeys(("num_heads", "in_channels", "window_size"), _COUNT),
            **dict.fromkeys(("patch_size", "spatial_merge_size", "temporal_patch_size"), _COUNT),
            **dict.fromkeys(("num_attention_heads", "num_channels", "num_patches"), _COUNT),
            "tokens_per_second": _COUNT,
            **dict.fromkeys(("depth", "num_hidden_layers"), _DEPTH),
            "initializer_range": _NOT_NEGATIVE,
            "layer_norm_eps": _POSITIVE,
        }
    ),
]


LORA = "lora"


@dataclass
class LoraSettings:
    """Low-rank adapters beside the decoder's frozen linears; for `trainable: lora` alone."""

    rank: Annotated[int, _COUNT] = 16
    """Inner width of every adapter."""
    alpha: Annotated[float, _POSITIVE] = 32.0
    """What an adapter adds counts alpha / rank."""
    dropout: Annotated[float, Bound(0, 1, "0 or more, below 1", open_most=True)] = 0.0
    """Share of an adapter's inputs that are left out in training."""
    targets: list[str] | None = None
    """Which linears of the decoder's layers have one: names (`q_proj`, `mlp.up_proj`) or regular
    expressions that match the end of a name from a dot on (`layers\\.[0-3]\\..*`: a bare dot is any
    character, so that `layers.1.*` is layers 10 to 19, too). null: all of them, the projections of
    self-attention and of the feed-forward networks."""


@dataclass
class BackboneConfig:
    """The text decoder."""

    pretrained: PathOrHubId | None = None
    """Directory or hub id to start from; its configuration gives the sizes. Of a Qwen2.5-VL
    checkpoint the language model is taken. null: random."""
    config: BackboneFields = field(default_factory=dict)
    """Fields of the Hugging Face text configuration, `model_type` among them (llama, helium,
    mistral, qwen2, qwen2_5_vl_text, qwen3, smollm3). Layers with a sliding window are refused;
    a new mistral has one unless `sliding_window` is null. The vocabulary size follows from the
    tokenizer unless it is given."""
    trainable: Annotated[Any, Switch(LORA)] = True
    """Whether embeddings, decoder layers and head train (true, false), or low-rank adapters beside
    its frozen weights (lora: see `lora`); fusion layers always do."""
    lora: Annotated[LoraSettings, ADDED] = field(default_factory=LoraSettings)
    """The adapters of `trainable: lora`, which needs the package peft. Their rate is that of
    `optim.groups.lora`."""
    resize_embeddings: bool = False
    """Where the tokenizer has more tokens than the pretrained backbone has rows, give the new ones
    rows of embedding and head that start as the mean of the others."""


@dataclass
class VisionConfig:
    """The vision tower, and what leads from its width to the text's."""

    type: Annotated[str, Choice("qwen2_5_vl", "siglip2"), ADDED] = "qwen2_5_vl"
    """Whose tower: Qwen2.5-VL's, an image token for 28 x 28 pixels, or SigLIP2's of any aspect
    (NaFlex), 32 x 32 pixels. A checkpoint with the other one is refused."""
    pretrained: PathOrHubId | None = None
    """Directory or hub id of a checkpoint with the tower: of Qwen2.5-VL, of SigLIP2 (NaFlex), whole
    or its vision model alone, or an export of this project. null: random weights."""
    config: VisionFields = field(default_factory=dict)
    """Fields of the tower's Hugging Face configuration, `Qwen2_5_VLVisionConfig` or
    `Siglip2VisionConfig`."""
    train_last_blocks: Annotated[int, Bound(-1, MOST_COUNT, "-1, 0 or more")] = 4
    """How many of the last blocks train, the merger (SigLIP2: the last norm) with them; 0 none, -1
    everything."""
    adapter: Annotated[str, Choice("linear", "mlp"), ADDED] = "linear"
    """From image tokens to the text's width: linear, which stands only where the widths differ, or
    mlp, two linears with GELU between them. It always trains, with the fusion."""


@dataclass
class TemplateConfig:
    """The chat template. What is null is taken from the tokenizer's own, and where that has none,
    empty; `model/template=NAME` or `model.template=NAME` chooses a ready file of
    `conf/model/template`, `model.template=auto` the tokenizer's own. On the command line `\\n`,
    `\\t` and `\\\\` are a line break, a tab and a backslash."""

    bos: str | None = None
    """What every conversation begins with."""
    system: str | None = None
    """Text of the system turn of a conversation that brings none of its own; empty: no such turn.
    """
    system_start: str | None = None
    """Before a system text, default or given."""
    system_end: str | None = None
    """After it."""
    system_always: bool | None = None
    """Whether such a conversation has a system turn even where `system` is empty."""
    user_start: str | None = None
    """Before a question."""
    user_end: str | None = None
    """After it."""
    assistant_start: str | None = None
    """Before an answer; where it ends, a model begins to generate."""
    answer_start: str | None = None
    """What an answer begins with that the model generates, such as a space."""
    assistant_end: str | None = None
    """After an answer. Its first token is learned with the answer and ends generation; what stands
    behind that token is context."""
    image_start: str | None = None
    """Before an image."""
    image_end: str | None = None
    """After it."""
    trim: list[str] | None = None
    """Roles out of system, user and assistant whose texts lose their outer white space."""


@dataclass
class Matched:
    """What a start chose for `match` or `new_parameters`: it stands in a run's config.yaml, not in
    files of yours."""

    wanted: Annotated[int, _PARAMETERS] = 0
    """New parameters that were wished for."""
    reached: Annotated[int, _PARAMETERS] = 0
    """Those that the model has."""
    intermediate_size: Annotated[int | None, _COUNT] = None
    """`model.backbone.config.intermediate_size` as it was; null: it still is."""
    fusion: dict[str, Any] = field(default_factory=dict)
    """The mechanism and its options as they were; empty: they still are."""


@dataclass
class ModelConfig:
    """What is assembled."""

    tokenizer: PathOrHubId | None = None
    """Directory or hub id of a fast tokenizer. null: the pretrained backbone's."""
    init_from: PathOrHubId | None = None
    """An export to start a later stage from: every weight, the fusion's too. Beside it `pretrained`
    loads nothing: it only says where the earlier stage began."""
    template: TemplateConfig = field(default_factory=TemplateConfig)
    """Literal text around turns and images."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The text decoder."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """The vision tower."""
    match: Annotated[dict[str, Any] | None, ADDED] = None
    """A mechanism that this model is to have as many new parameters as, within 2 %: a name of
    `conf/fusion` (model.match=gated_cross_attention), a YAML file, or mechanism and options
    (model.match={mechanism: casa, every: 2}). New are those beyond the insertion model of the same
    configuration. The start widens the decoder's feed-forward networks, or, of a pretrained
    backbone, chooses options of the mechanism; see conf/README.md. null: as many as there are."""
    new_parameters: Annotated[int | None, _PARAMETERS, ADDED] = None
    """The same by a number of new parameters. null: as `match` says."""
    matched: Annotated[Matched | None, ADDED] = None
    """Written by the start of a run whose parameters were matched; what it chose stands in the
    fields themselves. null: nothing was."""
