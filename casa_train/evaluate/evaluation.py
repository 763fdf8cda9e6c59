"""The evaluation of a run, or of every job of a sweep: its export answers the validation sets."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from casa_train.config.compose import compose_onto, search_path
from casa_train.config.data_schema import SourceConfig
from casa_train.config.schema import Config, flatten
from casa_train.data.prepared.shards import Split
from casa_train.distributed.threads import use_threads
from casa_train.errors import UserError, named
from casa_train.evaluate.attention_to_images import measure_image_attention
from casa_train.evaluate.exact_match import (
    evaluate,
    generate_answers,
    held_out_questions,
    training_texts,
)
from casa_train.evaluate.live_clips import evaluate_clips, first_clips
from casa_train.export.from_run import export as write_export
from casa_train.export.from_run import find_checkpoint
from casa_train.export.loading import load_model, load_processor
from casa_train.export.writer import exported_step
from casa_train.io.files import EXPORT_MARKER, sha256, write_atomic
from casa_train.run.configuration import load_run_config
from casa_train.run.layout import EVALUATION_FILE, EXPORT, EXPORTS
from casa_train.run.sweep import run_directories

OVERRIDES = (
    "evaluation.ask",
    "evaluation.max_samples",
    "evaluation.max_new_tokens",
    "evaluation.batch_size",
    "evaluation.attention_samples",
    "evaluation.live_clips",
    "data.validation",
    "data.sources",
    "parallel.threads",
)
"""What an evaluation depends on, beside the export; the rest of a run's configuration is done."""


def evaluation_config(
    run: Path, overrides: Sequence[str], config_dir: Path | None = None
) -> Config:
    """The configuration of a run with overrides of an evaluation on top.

    :param config_dir: a folder of the user's own with groups for evaluations: `held_out=photos`
        is DIR/held_out/photos.yaml, which begins with `# @package _global_`.
    :raises UserError: no run, an override of something else, or a value that cannot be.
    """
    config = load_run_config(run)
    search_path(config_dir)  # refuses what is no folder
    composed = []
    for override in (given.lstrip("+") for given in overrides):
        name, equals, _ = override.partition("=")
        if equals and _known(name):
            composed.append(f"++{override}")  # whether the run had such a source or not
        elif equals and config_dir is not None and (config_dir / name).is_dir():
            composed.append(f"+{override}")
        else:
            raise UserError(
                f"override {override!r} says nothing to an evaluation; expected NAME=VALUE, where "
                f"NAME is one of {', '.join(OVERRIDES)} or a field below them, such as "
                "data.validation.NAME.path=DIR, or a folder in that of --config-dir."
            )
    if not composed:
        return config
    changed = compose_onto(config, composed, config_dir)
    before, after = flatten(config), flatten(changed)
    for name in sorted({*before, *after}):
        if not _known(name) and before.get(name) != after.get(name):
            raise UserError(
                f"{' '.join(overrides)} sets {name} to {after.get(name)!r}, which says nothing to "
                f"an evaluation; expected {', '.join(OVERRIDES)} or fields below them alone. Take "
                f"it out of the files in {config_dir}."
            )
    return changed


def _known(name: str) -> bool:
    return any(name == known or name.startswith(f"{known}.") for known in OVERRIDES)


def evaluate_run(
    run: Path, export: Path, overrides: Sequence[str] = (), config_dir: Path | None = None
) -> dict[str, Any]:
    """Evaluates an export on the run's validation splits; writes and returns `evaluation.json`.

    The export is loaded as a user would: plain transformers and its own remote code.

    :param overrides: of the run's configuration, see `OVERRIDES`.
    :param config_dir: see `evaluation_config`.
    :raises UserError: no export, or no validation questions with images.
    """
    config = evaluation_config(run, overrides, config_dir)
    use_threads(config.parallel.threads)
    if not (export / EXPORT_MARKER).is_file():
        raise UserError(
            f"{export} is not an export; name one with --export (a run keeps its own in "
            f"{run / EXPORTS}), or write one with 'python -m casa_train.export {run} --out "
            f"{export}'."
        )
    held_out = config.data.validation
    if not held_out:
        raise UserError(
            f"{run}: data.validation names no held-out split, so nothing can be evaluated. Name "
            "one: data.validation.NAME.path=DIR/validation."
        )
    splits = {}
    for name, source in held_out.items():
        with named(f"data.validation.{name}.path"):
            splits[name] = Split(Path(source.path))
    skipped: Counter[str] = Counter()
    limits = _limits(held_out)
    last = config.evaluation.ask == "last"
    questions = held_out_questions(splits, limits, config.evaluation.max_samples, skipped, last)
    clips = first_clips(splits, limits, config.evaluation.live_clips, skipped)
    if not questions and not clips:
        raise UserError(
            f"{run}: the validation splits {', '.join(splits)} hold no question about an image "
            f"and no live captions (skipped: {dict(skipped) or 'none'})."
        )
    training = training_texts(
        _trained(config.data.sources), _limits(config.data.sources), questions
    )
    model, processor = load_model(export, "auto"), load_processor(export)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    batch_size = config.evaluation.batch_size
    live = evaluate_clips(clips, model.eval(), processor, batch_size) if clips else None
    result: dict[str, Any] = evaluate(
        questions,
        training,
        functools.partial(
            generate_answers,
            model,
            processor,
            batch_size=batch_size,
            max_new_tokens=config.evaluation.max_new_tokens,
        ),
        last,
    )
    result = {
        "export": str(export),
        "step": exported_step(export),
        "overrides": list(overrides),
        "ask": config.evaluation.ask,
        "validation": {name: source.path for name, source in held_out.items()},
        "weights_sha256": {
            str(p.relative_to(export)): sha256(p) for p in sorted(export.rglob("*.safetensors"))
        },
        "seconds": time.perf_counter() - began,
        "skipped": dict(skipped),
        "live": live,
        "attention": measure_image_attention(
            model, processor, questions, config.evaluation.attention_samples
        )
        if questions
        else None,
        **result,
    }
    write_atomic(run / EVALUATION_FILE, json.dumps(result, indent=1) + "\n")
    return result


def scores_said(result: Mapping[str, Any]) -> list[str]:
    """The scores of an evaluation in words, those that there are."""
    said = []
    if result["exact_match"] is not None:
        said += [f"exact match {result['exact_match']:.3f}", f"blind {result['blind']:.3f}"]
    if (live := result.get("live")) and live["match"] is not None:
        said.append(f"live captions {live['match']:.3f}")
        if live["blind_match"] is not None:  # of one clip there is none
            said.append(f"blind {live['blind_match']:.3f}")
    return said


def _limits(sources: Mapping[str, SourceConfig]) -> dict[str, int | None]:
    return {name: source.limit for name, source in sources.items()}


def _trained(sources: Mapping[str, SourceConfig]) -> dict[str, Split]:
    """The training splits that are there: they only serve the image-free guess."""
    splits = {}
    for name, source in sources.items():
        try:
            splits[name] = Split(Path(source.path))
        except UserError as error:
            print(f"the image-free guess knows nothing of data.sources.{name}: {error}")
    return splits


def evaluate_sweep(
    sweep: Path,
    only: str = "*",
    overrides: Sequence[str] = (),
    config_dir: Path | None = None,
) -> int:
    """Exports and evaluates the newest checkpoint of every job, where that is not done yet.

    :param overrides: see `evaluate_run`; an evaluation with others is not the same.
    :param config_dir: see `evaluation_config`.
    :return: how many jobs could not be evaluated; each is named with its reason.
    :raises UserError: there is no run.
    """
    failures = 0
    for run in run_directories(sweep, only):
        try:
            step = find_checkpoint(run, None).step
            if exported_step(run / EXPORT) != step:
                write_export(run, run / EXPORT)
            done = "already evaluated"
            there = run / EVALUATION_FILE
            ask = evaluation_config(run, overrides, config_dir).evaluation.ask
            same = _read(there, "step") == step and (_read(there, "ask") or "every") == ask
            if not same or (_read(there, "overrides") or []) != [*overrides]:
                result = evaluate_run(run, run / EXPORT, overrides, config_dir)
                done = ", ".join(scores_said(result))
            print(f"{run.name}: step {step}, {done}", flush=True)
        except UserError as error:
            failures += 1
            print(f"error: {run.name}: {error}", file=sys.stderr)
    return failures


def _read(path: Path, name: str) -> Any:
    """A field of a JSON file; None without one."""
    try:
        return json.loads(path.read_text())[name]
    except (OSError, ValueError, LookupError, TypeError):
        return None
