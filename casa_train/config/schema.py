"""The whole configuration as dataclasses, a docstring under every field: the manual.

Beside a field's type stands what it may be (`bounds.py`) and whether a run that goes on may have
another value (`resume_marks.py`). `compose.py` reads conf/ into the dataclasses; the fields of
`model` and `data` have files of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from casa_train.config.bounds import (
    Bound,
    Choice,
    LocalPath,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Resume,
)
from casa_train.config.data_schema import ORDER, DataConfig
from casa_train.config.model_schema import LORA, ModelConfig
from casa_train.config.resume_marks import ADDED, FREE, Added, Free, Kept, marks, matches


@dataclass
class GroupConfig:
    """One parameter group."""

    patterns: list[str] = field(default_factory=list)
    """Regular expressions searched in parameter names; those of LoRA's adapters begin with
    `lora.`, before the rest of the name."""
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
    precision: Annotated[str, Choice("bf16", "fp32")] = "bf16"
    """bf16 (fp32 masters and accumulation) or fp32."""
    activation_checkpointing: Annotated[str, Choice("none", "decoder", "vision", "all"), FREE] = (
        "none"
    )
    """Blocks that keep only their inputs for the backward pass and run again there: none, decoder
    (fusion included), vision (the trained blocks) or all. Less memory, more work, the same
    numbers."""
    compile: Annotated[str, Choice("auto", "off", "on"), FREE] = "auto"
    """Compile the blocks of the model by torch.compile: auto (on a GPU), off or on. The same
    numbers within rounding. The first step compiles; on a CPU for 18 s, and steps then take 4
    to 12 % less. On a GPU it is not measured (`bench step --compile` does). Validations and exports
    stay as they are."""
    joint_image_keys: Annotated[str, Choice("auto", "off"), FREE] = "auto"
    """Make the keys and values of the image tokens for all layers by one norm and one product,
    where layers have projections of their own and image tokens do not change (casa and
    cross_attention by default). The same numbers, rounded elsewhere; less work and less memory.
    auto leaves it out where it would take memory: where blocks of the decoder keep only their
    inputs (activation_checkpointing decoder or all), and under ZeRO-3, which holds one layer at a
    time; and where a layer's projections are more than linears (adapters, hooks). off: never."""
    frozen_precision: Annotated[str, Choice("bf16", "fp8"), ADDED] = "bf16"
    """Of the products of frozen vision blocks: bf16 (as `precision` says), or fp8, whose operands
    are rounded to e4m3 row by row, on a GPU of compute capability 8.9 or more (emulated on a CPU),
    and a copy of these weights more. No GPU has measured what it gains. The start says how far it
    moves the tower's output. Not under ZeRO-3; validations run it too, checkpoints and exports hold
    the weights as they were."""
    threads: NonNegativeInt = 0
    """CPU threads of each rank's torch, also when the run is exported and evaluated; 0 leaves
    torch's choice: one a core, or OMP_NUM_THREADS, which torchrun sets to 1. Sums round differently
    with another number. On a CPU small models gain little from a second thread."""


@dataclass
class TrainerConfig:
    """The loop."""

    steps: PositiveInt = 1000
    """Optimiser steps of the run."""
    log_every: Annotated[PositiveInt, FREE] = 10
    """Steps between two console lines; metrics.jsonl has every step."""
    max_hours: Annotated[NonNegativeFloat, FREE] = 0.0
    """Save and leave with code 75 before so many hours of this start have passed; 0: no limit."""
    watchdog_minutes: Annotated[float, Bound(0, 1e6, "0 (off) or more"), FREE] = 30.0
    """Leave with code 75 and write every thread's stack when nothing went forward for so long; more
    than the longest step, save or start. 0 turns it off."""
    max_skipped_steps: Annotated[PositiveInt, FREE] = 5
    """Steps in a row without finite loss and gradients, each left out, that end the run."""
    deterministic: bool = False
    """Use torch's deterministic algorithms: the same run on the same machine repeats bit for bit,
    slower on a GPU. An operation that has none ends the run by name."""
    gc_every: Annotated[NonNegativeInt, FREE] = 100
    """Steps between two collections of Python's garbage, on all ranks at once and at no other time;
    0 leaves them to Python."""
    worst_case: Annotated[bool | None, FREE] = None
    """Run one pack with both budgets full, forward and backward, before the first step of every
    start, so that a lack of memory shows at once; changes nothing of the run. null: where there is
    a GPU."""
    audit: Annotated[bool, FREE] = True
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
    resume: Annotated[str, Choice("auto", "never")] = "auto"
    """auto continues from the newest valid checkpoint; never starts over in an empty directory."""
    resume_allow: list[str] = field(default_factory=list)
    """Fields (dotted names) that may differ from the run's own configuration on resume. What the
    positions in the data are counted by stays all the same: seed, sources and their rates, budgets,
    bounds on pixels, ratings, locality, lanes."""


BENCHMARKS = (
    "chartqa",
    "docvqa",
    "infovqa",
    "ocrbench",
    "textvqa",
    "realworldqa",
    "ai2d",
    "gqa",
    "mme",
)
"""In the order of the paper's tables."""


@dataclass
class BenchmarkConfig:
    """A part of a benchmark that validations ask."""

    source: LocalPath | None = None
    """Folder of local copies, such as DIR with DIR/ChartQA. null: from the hub."""
    samples: PositiveInt = 200
    """Questions, evenly over the benchmark and always the same; those of MME that count together
    stay together. More than there are: all."""
    protocol: Annotated[str, Choice("casa", "lmms-eval")] = "casa"
    """How it is asked and scored: as the authors of CASA do, or as lmms-eval does."""


@dataclass
class EvaluationConfig:
    """Held-out samples: during training, and by `python -m casa_train.evaluate`."""

    every: NonNegativeInt = 0
    """Steps between two validations during training, the last step is one, too; 0: none. They
    measure `data.validation`, `benchmarks`, or both."""
    loss_samples: PositiveInt = 512
    """Held-out samples at most whose loss and exact match every validation computes: the same ones
    each time, in even shares of the sources. They cost about a third of training on as many."""
    ask: Annotated[str, Choice("every", "last")] = "every"
    """Which answers count: every one of a conversation, or the last alone, after the true turns
    before it. `last` is for held-out samples whose last turn is the question and earlier ones are
    its history: validations measure that answer alone, and the fixed questions and `evaluate` ask
    it with all images of the sample; with `every` they ask the first turn. Live captions are one
    turn, and benchmarks have their own questions: both are the same either way."""
    questions: NonNegativeInt = 8
    """Fixed questions that every validation answers, for the report, and as many of each of
    `benchmarks` whose answers are kept for it; 0: none."""
    benchmarks: dict[str, BenchmarkConfig] = field(default_factory=dict)
    """Benchmarks that every validation scores by name: chartqa, docvqa, infovqa, ocrbench, textvqa,
    realworldqa, ai2d, gqa, mme. Answers are as long as `max_new_tokens` and the protocol allow."""
    batch_size: PositiveInt = 32
    """Questions that `evaluate` answers at once."""
    max_samples: PositiveInt = 1000
    """Questions of `evaluate` at most, in even shares of the held-out sources."""
    max_new_tokens: PositiveInt = 16
    """Longest generated answer."""
    live_clips: NonNegativeInt = 64
    """Held-out clips with live captions that `evaluate` plays at most, in even shares of the
    sources and `batch_size` side by side; 0: none."""
    attention_samples: NonNegativeInt = 64
    """Questions over which `evaluate` measures how much answers read from the image, layer by
    layer; 0: not at all."""
    attention_while_training: NonNegativeInt = 0
    """Held-out samples of each source, always the same, over which every validation measures how
    much of what tokens read comes from images, by layer: tokens of the last question, those that
    predict its answer, and those around images. A forward pass a sample; 0: not at all."""


@dataclass
class ExportConfig:
    """Exports that a run makes of itself, by a process in the background without a GPU."""

    every: NonNegativeInt = 0
    """Export the checkpoint of every n-th step to RUN/exports/step_N, a multiple of
    checkpoint.every; 0: none."""
    best: bool = False
    """Save the step whenever a validation's loss is the lowest so far, and export it to
    RUN/exports/best."""
    lora: Annotated[str, Choice("merge", "keep")] = "merge"
    """What these exports do with a run's LoRA adapters: merge adds them to the backbone's weights,
    keep leaves them beside, in peft's format. `--lora` of the command says so for one export."""


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
    profile_steps: list[PositiveInt] = field(default_factory=list)
    """Steps that are taken apart into `profile/` of the run directory: milliseconds by part of the
    model beside the least that they could take, and of the last of them a trace. Two, such as
    [20,21], are enough; see conf/README.md for what they cost."""
    profile_trace: bool = True
    """Whether that last one is recorded as a trace; without it its times are those of any step."""
    peak_tflops: PositiveFloat | None = None
    """What one device can do at most, in TFLOP/s, for the utilisation (mfu). null: what is known of
    the GPU in bf16; of CPUs, unknown GPUs and fp32 nothing is."""


@dataclass
class Config:
    """A run."""

    name: Annotated[str, FREE] = "run"
    """Names the run; its directory is runs/NAME."""
    run_dir: Annotated[LocalPath, FREE] = "runs/${name}"
    """Where everything of the run is written."""
    seed: Annotated[int, Bound(0, 2**63 - 1, "0 or more"), Kept(ORDER)] = 0
    """Seeds weights and data order."""
    dry_run: Annotated[bool, FREE] = False
    """Print parameters, memory and floating-point work of the run instead of running it: in
    seconds, without data, tokenizer, GPU or network."""
    planned_ranks: Annotated[PositiveInt | None, FREE] = None
    """Ranks that the dry run, `inspect` and `bench step` count with, null: 1. A run itself has as
    many as were started."""
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
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    """Resumable checkpoints."""
    evaluation: Annotated[EvaluationConfig, FREE] = field(default_factory=EvaluationConfig)
    """Held-out samples."""
    export: Annotated[ExportConfig, FREE] = field(default_factory=ExportConfig)
    """Exports while the run goes on."""
    metrics: Annotated[MetricsConfig, FREE] = field(default_factory=MetricsConfig)
    """Where numbers go."""


GROUP_OF_ADAPTERS = "optim.groups.lora."
# Options of mechanisms that came when runs had begun without them, at their defaults.
OPTIONS_ADDED = {"fusion.ffn_width": 0}

# Names that fields had in earlier versions: run directories and users' own files may hold them.
RENAMED = {"world_size": "planned_ranks"}


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


def resume_mark(name: str) -> Resume | None:
    """What stands beside a field, or a section that it lies in; None where nothing does: then
    `checkpoint.resume_allow` can let it differ.

    :param name: dotted, as in `flatten`.
    """
    return next((mark for at, mark in marks(Config).items() if matches(at, name)), None)


def run_fields(config: Config) -> dict[str, Any]:
    """The fields that determine what a run computes."""
    defaults = flatten(Config())
    adapted = config.model.backbone.trainable == LORA
    fields = {}
    for name, value in flatten(config).items():
        mark = resume_mark(name)
        if isinstance(mark, Free) or (
            isinstance(mark, Added) and name in defaults and value == defaults[name]
        ):
            continue
        if name in OPTIONS_ADDED and value == OPTIONS_ADDED[name]:
            continue
        if not adapted and name.startswith(GROUP_OF_ADAPTERS):
            continue  # runs began when there was no such group, and it is without effect
        fields[name] = value
    return fields


def fingerprint(config: Config, leave_out: Collection[str] = ()) -> str:
    """sha256 over `run_fields`, less those to leave out."""
    fields = {name: value for name, value in run_fields(config).items() if name not in leave_out}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
