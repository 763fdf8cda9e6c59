"""The whole configuration as dataclasses, a docstring under every field: the manual.

`compose.py` reads conf/ into them and refuses values that contradict each other. Bounds of numbers
and places of files are part of the types (`kinds.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from casa_train.config.bounds import (
    MOST_COUNT,
    Bound,
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PathOrHubId,
    PositiveFloat,
    PositiveInt,
    Share,
)


@dataclass
class BackboneConfig:
    """The text decoder."""

    pretrained: PathOrHubId | None = None
    """Directory or hub id to start from; its configuration gives the sizes. Of a Qwen2.5-VL
    checkpoint the language model is taken. null: random."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the Hugging Face text configuration, `model_type` among them (llama, helium,
    qwen2, qwen2_5_vl_text). The vocabulary size follows from the tokenizer unless it is given."""
    trainable: bool = True
    """Whether embeddings, decoder layers and head train; fusion layers always do."""
    resize_embeddings: bool = False
    """Where the tokenizer has more tokens than the pretrained backbone has rows, give the new ones
    rows of embedding and head that start as the mean of the others."""


@dataclass
class VisionConfig:
    """The Qwen2.5-VL vision tower."""

    pretrained: PathOrHubId | None = None
    """Directory or hub id of a Qwen2.5-VL checkpoint with the tower. null: random weights."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of `Qwen2_5_VLVisionConfig`."""
    train_last_blocks: Annotated[int, Bound(-1, MOST_COUNT, "-1, 0 or more")] = 4
    """How many of the last blocks train, the merger with them; 0 none, -1 everything."""


_COUNT = Bound(1, MOST_COUNT, "at least 1")
_DEPTH = Bound(1, 1000, "1 to 1000")
_POSITIVE = Bound(0, words="a positive number", open_least=True)
# Numbers of the two free-form sections above; of others only that they are finite.
SIZES = {
    "model.backbone.config": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "head_dim"), _COUNT),
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), _COUNT),
        **dict.fromkeys(("max_position_embeddings", "sliding_window", "pretraining_tp"), _COUNT),
        "num_hidden_layers": _DEPTH,
        "rms_norm_eps": _POSITIVE,
        "rope_theta": _POSITIVE,
        "max_window_layers": Bound(0, MOST_COUNT, "0 or more"),
        "initializer_range": Bound(0, words="0 or more"),
        "attention_dropout": Bound(0, 1, "0 or more, below 1", open_most=True),
    },
    "model.vision.config": {
        **dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), _COUNT),
        **dict.fromkeys(("num_heads", "in_channels", "window_size", "tokens_per_second"), _COUNT),
        **dict.fromkeys(("patch_size", "spatial_merge_size", "temporal_patch_size"), _COUNT),
        "depth": _DEPTH,
        "initializer_range": Bound(0, words="0 or more"),
    },
}


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


@dataclass
class SourceConfig:
    """One prepared split."""

    path: LocalPath = "???"
    """Directory with `index.arrow`, `meta.json` and shards."""
    weight: PositiveFloat | None = None
    """Relative rate. Either every source has one or none has; then rates follow the sizes."""
    repeats: PositiveInt = 1
    """Passes over this source that count as one epoch (over-sampling)."""
    limit: PositiveInt | None = None
    """Use only the first so many samples. null: all."""


@dataclass
class StreamDatasetConfig:
    """One published dataset of parquet files, read as it is."""

    source: PathOrHubId = "???"
    """Hub id, or a directory with the same files, its README.md included."""
    schema: str = "finevision"
    """How rows are read: a name in `casa_train.data.schemas`."""
    subsets: list[str] = field(default_factory=list)
    """Its subsets (configurations of the dataset card); empty: all of them."""
    exclude: list[str] = field(default_factory=list)
    """Subsets that stay out."""
    repeats: dict[str, PositiveInt] = field(default_factory=dict)
    """By subset: passes that count as one epoch (over-sampling), 1 where it is not named."""
    split: str = "train"
    """The split to read."""
    revision: str | None = None
    """Commit or branch of the hub's repository. null: main, as it is when the run starts; a resumed
    run whose files have changed since is refused."""


@dataclass
class StreamConfig:
    """Training from published datasets without preparing them (`data=finevision_stream`)."""

    datasets: dict[str, StreamDatasetConfig] = field(default_factory=dict)
    """Datasets by name, NAME=null deletes one; used where `data.sources` is empty."""
    lanes: PositiveInt = 256
    """Logical lanes, each with its own row groups and packs; the number of ranks must divide it.
    The order of samples depends on it, so it stays the same for the life of a run."""
    open_units: PositiveInt = 4
    """Row groups that a lane draws rows from at a time: more mix better and take more memory."""
    memory_mib: PositiveInt = 4096
    """Memory of each loader process for row groups and for the samples of unfinished packs; what
    does not fit is read again. The start prints about how much is needed."""
    attempts: PositiveInt = 8
    """How often a failed read is tried before the run ends."""
    retry_seconds: NonNegativeFloat = 1.0
    """Wait after the first failed read; it doubles with every further one, up to a minute."""


@dataclass
class DataConfig:
    """Sources and budgets."""

    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Prepared training sources by name; an experiment or the command line can override an entry,
    or delete it: NAME=null."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """What is read from published datasets instead of prepared sources."""
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out splits by name, NAME=null deletes one; validation and evaluation read them, training
    never does."""
    text_tokens: Annotated[int, Bound(2, MOST_COUNT, "at least 2")] = 2048
    """Text budget of a packed sequence."""
    image_tokens: Annotated[int, Bound(2, MOST_COUNT, "at least 2")] = 20480
    """Image-token budget of a packed sequence."""
    max_pixels: Annotated[int, Bound(784, MOST_COUNT, "at least 784 (28x28)")] = 952 * 952
    """Upper bound on the pixels of an image; larger ones are shrunk, aspect kept."""
    min_pixels: NonNegativeInt = 0
    """Smaller images are enlarged to so many pixels at least, aspect kept, by the rule of
    Qwen2.5-VL's own image processor; `max_pixels` and the bound on a video's frames go before it.
    0 enlarges none, but to the side of a token: the sizes of runs from before this field."""
    ratings: dict[str, Annotated[int, Bound(1, 5, "a rating 1..5")]] = field(default_factory=dict)
    """Least rating, 1 to 5, of a turn to be trained, by name: relevance, image_correspondence,
    visual_dependency, formatting. Turns without a rating stay. FineVision's authors found that
    filtering by them hurts, so nothing is filtered unless asked."""
    packs_per_step: PositiveInt = 128
    """Packed sequences of one optimiser step over all ranks; accumulation is this over the world
    size, which must divide it. A resumed run may change it (`checkpoint.resume_allow`)."""
    open_packs: PositiveInt = 24
    """Packs that best-fit keeps open."""
    balance_block: PositiveInt = 32
    """Steps whose packs are sorted by size together, so that the ranks of a micro-step get packs of
    about the same cost."""
    balance_group: PositiveInt = 64
    """Packs of about the same size that stay together; divides balance_block x packs_per_step. The
    number of ranks is a good value."""
    video_share: Share = 0.25
    """Share of packs that are video, where sources of both modalities are mixed."""
    locality: NonNegativeInt = 0
    """0 shuffles all samples of a source; n its shards, and then the samples of n shards at a time,
    for object stores."""
    workers: NonNegativeInt = 2
    """Loader processes of each rank; 0 materialises in the training process."""
    max_bad_share: Share = 0.01
    """Stop when more than this share of the samples (of at least 1,000) could not be used."""


@dataclass
class GroupConfig:
    """One parameter group."""

    patterns: list[str] = field(default_factory=list)
    """Regular expressions searched in parameter names."""
    lr: NonNegativeFloat = 1e-4
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay; never applied to norms and biases."""
    required: bool = True
    """Whether a group that matches no trainable parameter is an error."""


Decay = Annotated[float, Bound(0, 1, "0 or more, below 1", open_most=True)]


@dataclass
class OptimConfig:
    """AdamW and its schedule: linear warm-up, constant, linear decay."""

    groups: dict[str, GroupConfig] = field(default_factory=dict)
    """Groups by name; every trainable parameter matches exactly one."""
    betas: list[Decay] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's two decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    decay_steps: NonNegativeInt = 0
    """Steps of linear decay to zero at the end of the run."""
    clip: NonNegativeFloat = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns it off."""


@dataclass
class ParallelConfig:
    """How the model is spread and in which precision it runs."""

    zero_stage: Annotated[int, Bound(1, 3, "1, 2 or 3")] = 2
    """DeepSpeed ZeRO stage: 1, 2 or 3."""
    precision: str = "bf16"
    """bf16 (fp32 masters and accumulation) or fp32."""
    activation_checkpointing: str = "none"
    """Blocks that keep only their inputs for the backward pass and run again there: none, decoder
    (fusion included), vision (the trained blocks) or all. Less memory, more work, the same
    numbers."""
    threads: NonNegativeInt = 0
    """CPU threads of each rank's torch, also when the run is exported and evaluated; 0 leaves
    torch's choice: one a core, or OMP_NUM_THREADS, which torchrun sets to 1. Sums round differently
    with another number. On a CPU small models gain little from a second thread."""


@dataclass
class TrainerConfig:
    """The loop."""

    steps: PositiveInt = 1000
    """Optimiser steps of the run."""
    log_every: PositiveInt = 10
    """Steps between two console lines; metrics.jsonl has every step."""
    max_hours: NonNegativeFloat = 0.0
    """Save and leave with code 75 before so many hours of this start have passed; 0: no limit."""
    watchdog_minutes: Annotated[float, Bound(0, 1e6, "0 (off) or more")] = 30.0
    """Leave with code 75 and write every thread's stack when nothing went forward for so long; more
    than the longest step, save or start. 0 turns it off."""
    max_skipped_steps: PositiveInt = 5
    """Steps in a row without finite loss and gradients, each left out, that end the run."""
    deterministic: bool = False
    """Use torch's deterministic algorithms: the same run on the same machine repeats bit for bit,
    slower on a GPU. An operation that has none ends the run by name."""
    gc_every: NonNegativeInt = 100
    """Steps between two collections of Python's garbage, on all ranks at once and at no other time;
    0 leaves them to Python."""
    worst_case: bool | None = None
    """Run one pack with both budgets full, forward and backward, before the first step of every
    start, so that a lack of memory shows at once; changes nothing of the run. null: where there is
    a GPU."""
    audit: bool = True
    """Check after the first step with a non-zero rate that what should move moved and nothing
    else.
    """


@dataclass
class CheckpointConfig:
    """Resumable checkpoints."""

    every: PositiveInt = 1000
    """Steps between two checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Checkpoints kept, newest first."""
    keep_every: NonNegativeInt = 0
    """Keep every n-th step's checkpoint for good; 0 keeps none."""
    resume: str = "auto"
    """auto continues from the newest valid checkpoint; never starts over in an empty directory."""
    resume_allow: list[str] = field(default_factory=list)
    """Fields (dotted names) that may differ from the run's own configuration on resume. What the
    positions in the data are counted by stays all the same: seed, sources and their rates, budgets,
    bounds on pixels, ratings, locality, lanes."""


@dataclass
class EvaluationConfig:
    """Held-out samples: during training, and by `python -m casa_train.evaluate`."""

    every: NonNegativeInt = 0
    """Steps between two validations during training, the last step is one, too; 0: none. They need
    `data.validation`."""
    loss_samples: PositiveInt = 512
    """Held-out samples at most whose loss and exact match every validation computes: the same ones
    each time, in even shares of the sources. They cost about a third of training on as many."""
    questions: NonNegativeInt = 8
    """Fixed questions that every validation answers, for the report; 0: none."""
    batch_size: PositiveInt = 32
    """Questions that `evaluate` answers at once."""
    max_samples: PositiveInt = 1000
    """Questions of `evaluate` at most, in even shares of the held-out sources."""
    max_new_tokens: PositiveInt = 16
    """Longest generated answer."""
    attention_samples: NonNegativeInt = 64
    """Questions over which `evaluate` measures how much answers read from the image, layer by
    layer; 0: not at all."""


@dataclass
class ExportConfig:
    """Exports that a run makes of itself, by a process in the background without a GPU."""

    every: NonNegativeInt = 0
    """Export the checkpoint of every n-th step to RUN/exports/step_N, a multiple of
    checkpoint.every; 0: none."""
    best: bool = False
    """Save the step whenever a validation's loss is the lowest so far, and export it to
    RUN/exports/best."""


@dataclass
class MetricsConfig:
    """Where the numbers of a run go beside metrics.jsonl and the console."""

    tensorboard: bool = True
    """Write `tensorboard/` in the run directory."""
    wandb: bool = False
    """Report to Weights & Biases; without a login (WANDB_API_KEY or netrc), or where its server is
    out of reach, into `wandb/` in the run directory, which `wandb sync` uploads later."""
    wandb_project: str = "casa_train"
    """Project of the run there."""
    wandb_entity: str | None = None
    """User or team there. null: the login's own."""
    wandb_tags: list[str] = field(default_factory=list)
    """Tags of the run there."""
    peak_tflops: PositiveFloat | None = None
    """What one device can do at most, in TFLOP/s, for the utilisation (mfu). null: what is known of
    the GPU in bf16; of CPUs, unknown GPUs and fp32 nothing is."""


@dataclass
class Config:
    """A run."""

    name: str = "run"
    """Names the run; its directory is runs/NAME."""
    run_dir: LocalPath = "runs/${name}"
    """Where everything of the run is written."""
    seed: Annotated[int, Bound(0, 2**63 - 1, "0 or more")] = 0
    """Seeds weights and data order."""
    dry_run: bool = False
    """Print parameters, memory and floating-point work of the run instead of running it: in
    seconds, without data, tokenizer, GPU or network."""
    world_size: PositiveInt | None = None
    """Ranks that the dry run counts with, null: 1. A run itself has as many as were started."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What is assembled."""
    fusion: dict[str, Any] = field(default_factory=dict)
    """The fusion mechanism and its options: `mechanism` plus what its class documents."""
    data: DataConfig = field(default_factory=DataConfig)
    """Sources and budgets."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and schedule."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Ranks and precision."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Resumable checkpoints."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Held-out samples."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Exports while the run goes on."""
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    """Where numbers go."""


# Fields that do not change what the run computes: they may differ on resume.
FREE_FIELDS = (
    "name",
    "run_dir",
    "dry_run",
    "world_size",
    "parallel.activation_checkpointing",
    "data.workers",
    "data.max_bad_share",
    "data.stream.memory_mib",
    "data.stream.attempts",
    "data.stream.retry_seconds",
    "trainer.log_every",
    "trainer.audit",
    "trainer.worst_case",
    "trainer.gc_every",
    "trainer.max_hours",
    "trainer.watchdog_minutes",
    "trainer.max_skipped_steps",
    "checkpoint",
    "evaluation",
    "export",
    "data.validation",
    "metrics",
)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted field names to plain values; every dict is opened."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    walk("", json.loads(json.dumps(asdict(config))))
    return flat


def run_fields(config: Config) -> dict[str, Any]:
    """The fields that determine what a run computes."""
    return {
        name: value
        for name, value in flatten(config).items()
        if not any(name == free or name.startswith(free + ".") for free in FREE_FIELDS)
    }


def fingerprint(config: Config, leave_out: Collection[str] = ()) -> str:
    """sha256 over `run_fields`, less those to leave out."""
    fields = {name: value for name, value in run_fields(config).items() if name not in leave_out}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
