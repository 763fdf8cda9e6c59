"""Assembles a run from top to bottom; the only file that knows every folder.

Order matters: everything that a user can get wrong is checked before the first weight is made, and
before the run directory is touched.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from transformers import AutoConfig

from casa_train import __version__
from casa_train.audit import Audit
from casa_train.checkpoint.manager import CheckpointManager, Found
from casa_train.config import Config, SourceConfig, fingerprint, run_fields, to_config
from casa_train.data.loader import PackLoader
from casa_train.data.materialize import Failure, Materializer
from casa_train.data.mixture import SourceSize
from casa_train.data.plan import Planner
from casa_train.data.shards import Split
from casa_train.data.tokens import load_tokenizer, tokenizer_fingerprint
from casa_train.engine import Engine, init_processes
from casa_train.errors import UserError
from casa_train.files import write_atomic
from casa_train.metrics.sinks import ConsoleSink, JsonlSink, Sink
from casa_train.modeling.attention import choose_backend
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.optim import build_groups, build_optimizer, describe, rate_factor, set_rates
from casa_train.trainer import Progress, Trainer

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "flash-attn",
    "webdataset",
    "hydra-core",
    "numpy",
    "pillow",
)


def train(config: Config) -> None:
    """Runs, or goes on with, the run that `config` describes. Every rank calls it.

    :raises UserError: whatever the user can mend.
    """
    if config.parallel.threads:
        torch.set_num_threads(config.parallel.threads)
    processor = build_processor(config)
    splits = open_splits(config.data.sources, processor)
    planner = build_planner(config, splits, processor)
    model = build_model(config, processor)
    groups = build_groups(model.named_parameters(), config.optim.groups)
    fingerprints = {
        "config": fingerprint(config),
        "data": json.dumps({name: split.fingerprint for name, split in sorted(splits.items())}),
    }
    rank, world, device = init_processes()
    run_dir = Path(config.run_dir)
    sinks: list[Sink] = []
    try:
        if config.data.packs_per_step % world:
            raise UserError(
                f"data.packs_per_step is {config.data.packs_per_step}, which {world} ranks do not "
                "divide; choose a multiple of the world size."
            )
        agree(lambda: prepare_run_directory(run_dir, config), rank)
        say = print if rank == 0 else _silent
        lines = [
            *banner(config, model, world, device),
            *describe(model.named_parameters(), groups),
        ]
        for line in lines:
            say(line)

        accumulation = config.data.packs_per_step // world
        engine = Engine(
            model,
            build_optimizer(groups, config.optim),
            config.parallel.zero_stage,
            config.parallel.precision,
            accumulation,
            config.optim.clip,
        )
        materializer = Materializer(
            splits, processor, config.data.text_tokens, config.data.image_tokens
        )
        loader = PackLoader(
            planner, materializer, config.data.packs_per_step, rank, world, config.data.workers
        )
        checkpoints = CheckpointManager(
            run_dir / CHECKPOINTS,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every,
            fingerprints,
            say,
        )
        progress = Progress()
        found = checkpoints.latest()
        if found is not None:
            check_resume(found, fingerprints, world, config)
            engine.load(found.path)
            loader.load_state_dict(found.state["data"])
            checkpoints.load_rng(found)
            progress = Progress(**found.state["progress"])
            say(f"resuming from {found.path} at step {found.step}")
        if progress.step >= config.trainer.steps:
            say(
                f"nothing to do: {run_dir} already holds step {progress.step} of "
                f"{config.trainer.steps}"
            )
        if rank == 0:
            sinks = [
                JsonlSink(run_dir / METRICS_FILE),
                ConsoleSink(config.trainer.steps, progress.step, config.trainer.log_every),
            ]
        audit = None
        if config.trainer.audit and found is None:
            audit = Audit(engine, model.mechanism.zero_at_start)
        engine.train()
        Trainer(
            engine=engine,
            loader=loader,
            device=device,
            world=world,
            steps=config.trainer.steps,
            save_every=config.checkpoint.every,
            max_bad_share=config.data.max_bad_share,
            set_rates=lambda step: set_rates(engine.param_groups, _factor(config, step)),
            save=checkpoints.save,
            quarantine=Quarantine(run_dir / f"quarantine_{rank}.jsonl").add,
            gather=_gather,
            sinks=sinks,
            audit=audit,
            progress=progress,
        ).run()
        dist.barrier()
        engine.close()
        dist.barrier()
    finally:
        for sink in sinks:
            sink.close()


def agree(work: Callable[[], None], rank: int) -> None:
    """Rank 0 does something that may fail for a reason the user can mend; every rank hears of it.

    :raises UserError: on every rank, so that none waits for the others.
    """
    message: list[str | None] = [None]
    if rank == 0:
        try:
            work()
        except UserError as error:
            message = [str(error)]
    dist.broadcast_object_list(message)
    if message[0] is not None:
        raise UserError(message[0])


def build_processor(config: Config) -> CasaProcessor:
    """Tokenizer, chat template and image code.

    :raises UserError: a tokenizer that cannot be loaded or lacks the template's tokens.
    """
    tokenizer = load_tokenizer(config.model.tokenizer)
    try:
        return CasaProcessor(tokenizer, config.data.max_pixels, dict(config.model.template))
    except (ValueError, TypeError) as error:
        raise UserError(f"model.template: {error}") from error


def open_splits(sources: Mapping[str, SourceConfig], processor: CasaProcessor) -> dict[str, Split]:
    """Opens prepared splits by source name.

    :raises UserError: a missing, empty or damaged split, or one prepared with another tokenizer.
    """
    splits = {}
    expected = tokenizer_fingerprint(processor.tokenizer)
    for name, source in sources.items():
        split = splits[name] = Split(Path(source.path))
        if split.tokenizer_fingerprint != expected:
            raise UserError(
                f"data source {name!r} ({source.path}) was prepared with another tokenizer "
                f"({split.tokenizer_fingerprint[:12]}...) than model.tokenizer "
                f"({expected[:12]}...): "
                "run its recipe again with --tokenizer, or set model.tokenizer to the one it used."
            )
    return splits


def build_planner(config: Config, splits: Mapping[str, Split], processor: CasaProcessor) -> Planner:
    """The plan of packs over all sources."""
    sizes = {
        name: SourceSize(
            len(split), config.data.sources[name].weight, config.data.sources[name].repeats
        )
        for name, split in splits.items()
    }
    return Planner(
        splits,
        sizes,
        processor,
        config.data.text_tokens,
        config.data.image_tokens,
        config.seed,
        config.data.open_packs,
    )


def build_model_config(config: Config, processor: CasaProcessor) -> CasaConfig:
    """The Hugging Face configuration of the model that `config` describes.

    :raises UserError: fields that no supported model has.
    """
    text = dict(config.model.backbone.config)
    model_type = text.pop("model_type", None)
    tokenizer = processor.tokenizer
    text.setdefault("vocab_size", len(tokenizer))
    if text["vocab_size"] < len(tokenizer):
        raise UserError(
            f"model.backbone.config.vocab_size is {text['vocab_size']}, but the tokenizer has "
            f"{len(tokenizer)} tokens; leave it out or raise it."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        text.setdefault(name, getattr(tokenizer, name))
    try:
        text_config = AutoConfig.for_model(model_type, **text)
    except ValueError as error:
        raise UserError(
            f"model.backbone.config.model_type is {model_type!r}, unknown to transformers; "
            "choose llama, helium or qwen2."
        ) from error
    return CasaConfig(
        text_config=text_config,
        vision_config=dict(config.model.vision.config),
        fusion=dict(config.fusion),
        architectures=["CasaForConditionalGeneration"],
    )


def build_model(config: Config, processor: CasaProcessor) -> CasaForConditionalGeneration:
    """The model with its first weights, the same on every rank, frozen where the run freezes it.

    :raises UserError: an unknown mechanism, backbone or setting.
    """
    torch.manual_seed(config.seed)
    try:
        model = CasaForConditionalGeneration(build_model_config(config, processor))
        model.initialise_fusion()
        set_trainable(model, config)
    except ValueError as error:
        raise UserError(str(error)) from error
    ends = processor.asst_end_tokens[:1] or [processor.tokenizer.eos_token_id]
    model.generation_config.eos_token_id = ends[0]
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
    return model


def set_trainable(model: CasaForConditionalGeneration, config: Config) -> None:
    """Freezes what the configuration freezes; fusion layers and the adapter always train."""
    trainable = config.model.backbone.trainable
    for part in (model.model, model.lm_head):
        part.requires_grad_(trainable)
    for layer in model.model.layers:
        if layer.fusion is not None:
            layer.fusion.requires_grad_(True)
    model.visual.set_trainable(config.model.vision.train_last_blocks)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(
            f"nothing trains: model.backbone.trainable is false, model.vision.train_last_blocks "
            "is 0 "
            f"and the mechanism {config.fusion['mechanism']!r} adds no parameters."
        )


def banner(
    config: Config, model: CasaForConditionalGeneration, world: int, device: torch.device
) -> list[str]:
    """What the run is, in a few lines."""
    vision, backbone = model.config.vision_config, model.config.text_config
    accumulation = config.data.packs_per_step // world
    dtype = torch.bfloat16 if config.parallel.precision == "bf16" else torch.float32
    backend = choose_backend("auto", device, dtype)
    parts: dict[str, nn.Module] = {"backbone": model.model, "vision": model.visual}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    fusion = sum(p.numel() for n, p in model.named_parameters() if ".fusion." in n)
    return [
        f"casa_train {__version__}: run {config.name} in {config.run_dir}",
        f"backbone {backbone.model_type}: {backbone.num_hidden_layers} layers, width "
        f"{backbone.hidden_size}, {sizes['backbone'] - fusion:,} parameters",
        f"vision tower: {vision.depth} blocks, width {vision.hidden_size}, {sizes['vision']:,} "
        f"parameters, {model.visual.frozen_blocks} frozen blocks",
        f"fusion {config.fusion['mechanism']}: {fusion:,} new parameters",
        f"attention backend: {backend} on {device.type}",
        f"{world} ranks x {accumulation} micro-steps, ZeRO-{config.parallel.zero_stage}, "
        f"{config.parallel.precision}, {torch.get_num_threads()} threads; a pack holds "
        f"{config.data.text_tokens} text and {config.data.image_tokens} image tokens",
    ]


def prepare_run_directory(run_dir: Path, config: Config) -> None:
    """Writes configuration and environment; moves an earlier life away under `resume=never`.

    :raises UserError: the directory belongs to another configuration or cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        stored = run_dir / CONFIG_FILE
        if stored.exists() and config.checkpoint.resume == "never":
            _move_away(run_dir)
        if stored.exists():
            check_same_run(stored, config)
        write_atomic(stored, OmegaConf.to_yaml(OmegaConf.structured(config)))
        write_atomic(run_dir / "environment.json", json.dumps(environment(), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"run directory {run_dir} cannot be written: {error}") from error


def check_same_run(stored: Path, config: Config) -> None:
    """Refuses a run directory of another configuration.

    :raises UserError: listing every differing field that `resume_allow` does not name.
    """
    try:
        theirs = run_fields(to_config(OmegaConf.load(stored)))  # type: ignore[arg-type]
    except (UserError, OSError, ValueError) as error:
        raise UserError(
            f"{stored} cannot be read as this version's configuration ({error}). Choose another "
            "name, "
            "or checkpoint.resume=never to start over."
        ) from error
    ours = run_fields(config)
    differing = [
        f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} now"
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name) and name not in config.checkpoint.resume_allow
    ]
    if differing:
        raise UserError(
            f"{stored.parent} belongs to another configuration: {'; '.join(differing)}. Choose "
            "another "
            "name=..., start over with checkpoint.resume=never, or allow the fields by name with "
            "checkpoint.resume_allow=[...]."
        )


def check_resume(found: Found, fingerprints: Mapping[str, str], world: int, config: Config) -> None:
    """Refuses a checkpoint whose data or world size is not this run's.

    :raises UserError: with both values.
    """
    theirs = found.manifest["fingerprints"]
    if theirs["data"] != fingerprints["data"] and "data" not in config.checkpoint.resume_allow:
        raise UserError(
            f"{found.path} was trained on other data: index digests {theirs['data']} there, "
            f"{fingerprints['data']} now. Restore the data, or start over with "
            "checkpoint.resume=never."
        )
    if found.manifest["world_size"] != world:
        raise UserError(
            f"{found.path} was saved by {found.manifest['world_size']} ranks, this run has "
            f"{world}. "
            "Start with the same number of ranks."
        )


def environment() -> dict[str, Any]:
    """Versions, commit and host, as they stood when the run started."""
    commit: str | None = None
    try:
        root = Path(__file__).resolve().parent.parent
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "--verify", "HEAD"], capture_output=True, text=True
        )
        dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True)
        commit = head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "") or None
    except OSError:
        pass  # no git on this machine: the commit stays unknown
    return {
        "casa_train": __version__,
        "git_commit": commit,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "host": platform.node(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "command": sys.argv,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


class Quarantine:
    """Appends samples that could not be used to a file of this rank.

    :param path: made with the first failure.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, failures: Sequence[Failure]) -> None:
        if failures:
            with self.path.open("a", encoding="utf-8") as file:
                for failure in failures:
                    file.write(json.dumps(dataclasses.asdict(failure)) + "\n")


def _factor(config: Config, step: int) -> float:
    optim = config.optim
    return rate_factor(step, config.trainer.steps, optim.warmup_steps, optim.decay_steps)


def _gather(value: Any) -> Sequence[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _move_away(run_dir: Path) -> None:
    number = 1
    while (run_dir / f"previous_{number}").exists():
        number += 1
    earlier = [p for p in run_dir.iterdir() if not p.name.startswith("previous_")]
    (run_dir / f"previous_{number}").mkdir()
    for path in earlier:
        os.rename(path, run_dir / f"previous_{number}" / path.name)


def _silent(line: str) -> None:
    """Ranks other than 0 print nothing."""
