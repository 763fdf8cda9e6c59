"""python -m casa_train.export RUN [--step N] --out DIR: a checkpoint as a Hugging Face
directory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from casa_train import modeling
from casa_train.assemble import build_model, build_processor
from casa_train.caches import check_cache
from casa_train.checkpoint.export import check_target, write_export
from casa_train.checkpoint.gate import check_export
from casa_train.checkpoint.manager import CheckpointManager, Found
from casa_train.checkpoint.slices import read_weights
from casa_train.config import Config
from casa_train.errors import UserError
from casa_train.kinds import local_path
from casa_train.model_card import model_card
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.places import relocated
from casa_train.quiet import quiet_libraries
from casa_train.resume_fields import plan_record
from casa_train.run_directory import (
    CHECKPOINTS,
    CONFIG_FILE,
    MODEL_CONFIG_FILE,
    PROCESSOR,
    stored_config,
)
from casa_train.threads import use_threads

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(run: Path, out: Path, step: int | None = None, dtype: str | None = None) -> str:
    """Exports a checkpoint of a run.

    :param step: which checkpoint; None takes the newest valid one.
    :param dtype: bf16 or fp32; None takes the run's own precision.
    :return: the gate's verdict.
    :raises UserError: no such run or checkpoint, a bad target, a failed gate.
    """
    check_target(out)
    check_cache(HF_MODULES_CACHE)  # the gate loads the export by its own code
    config = load_run_config(run)
    use_threads(config.parallel.threads)
    found = find_checkpoint(run, step)
    processor = build_processor(config, run / PROCESSOR)
    refuse_other_tokens(run, found, config, processor)
    processor.tokenizer.padding_side = "left"  # what generation from a batch needs
    model = build_model(config, processor, load_model_config(run))
    chosen = DTYPES[dtype or config.parallel.precision]
    weights = read_weights(found.path)
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name in missing if not (name == "lm_head.weight" and _tied(model))]
    if missing or unexpected:
        raise UserError(
            f"{found.path} does not fit the run's configuration: missing {missing[:4]}, unexpected "
            f"{unexpected[:4]}. Was config.yaml edited?"
        )
    model.to(chosen)

    def gate(directory: Path) -> str:
        # The values that were saved, computed with in fp32.
        return check_export(directory, model.float(), gate_conversations(config))

    return write_export(
        out,
        save_model=lambda directory: model.save_pretrained(directory),
        save_processor=lambda directory: processor.save_pretrained(directory),
        source=Path(str(modeling.__file__)).parent,
        card=model_card(config, found.step, model),
        provenance={"run": config.name, "step": found.step, "dtype": str(chosen)},
        gate=gate,
    )


def load_run_config(run: Path) -> Config:
    """The configuration that a run stored, with paths that hold in any folder.

    :raises UserError: not a run directory.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{run} is not a run directory: {CONFIG_FILE} is missing. Expected the run_dir of a "
            "training, such as runs/demo."
        )
    return relocated(stored_config(path), run)


def load_model_config(run: Path) -> CasaConfig:
    """The Hugging Face configuration that a run stored.

    :raises UserError: it is missing or damaged.
    """
    path = run / MODEL_CONFIG_FILE
    again = "start the run's command once more to write it"
    if not path.is_file():
        raise UserError(f"{path} is missing; {again}.")
    try:
        stored = json.loads(path.read_text())
        return CasaConfig.from_dict(stored)  # type: ignore[no-any-return]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected the model's configuration as JSON: {again}."
        ) from error


def refuse_other_tokens(run: Path, found: Found, config: Config, processor: CasaProcessor) -> None:
    """Refuses a tokenizer or template other than that which the checkpoint was trained with: no
    comparison of logits would notice.

    :raises UserError: naming what differs. Checkpoints of earlier versions say nothing of it.
    """
    record = found.manifest["fingerprints"].get("plan")
    there = {} if record is None else json.loads(record)
    now = json.loads(plan_record(config, processor))
    names = [n for n in there if n == "model.tokenizer" or n.startswith("model.template.")]
    differ = [f"{n} {there[n]!r} there, {now.get(n)!r} here" for n in names if there[n] != now[n]]
    if differ:
        kept = run / PROCESSOR
        source = (
            f"from {kept}" if kept.is_dir() else f"from the configuration, as {kept} is missing"
        )
        raise UserError(
            f"{found.path} was trained with another tokenizer or chat template than the one read "
            f"{source}: {'; '.join(differ)} (a tokenizer by the sha256 of its content). Copy "
            f"{PROCESSOR}/ from where the run was trained, or put the tokenizer back."
        )


def find_checkpoint(run: Path, step: int | None) -> Found:
    """The newest valid checkpoint, or that of `step`; reads only, so a running job is not
    disturbed.

    :raises UserError: none, or not that one.
    """
    manager = CheckpointManager(run / CHECKPOINTS, 1, 0, {}, print)
    steps = manager.steps()
    if step is not None and step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; there are {steps or 'none'}.")
    for candidate in reversed(steps if step is None else [step]):
        found = manager.read(candidate)
        if found is not None:
            return found
    raise UserError(
        f"{run} holds no valid checkpoint (found steps: {steps or 'none'}); train first."
    )


def gate_conversations(config: Config) -> list[Any]:
    """Fixed inputs: one image, two images with text between, and text alone."""
    side = 28 * max(1, min(8, int(config.data.max_pixels**0.5) // 28))
    pictures = []
    for colour, box in (("crimson", (4, 4, side - 8, side - 12)), ("navy", (0, 9, 15, side))):
        picture = Image.new("RGB", (side, side), "ivory")
        ImageDraw.Draw(picture).ellipse(box, fill=colour)
        pictures.append({"type": "image", "image": picture})

    def text(words: str) -> dict[str, str]:
        return {"type": "text", "text": words}

    first = {"role": "user", "content": [pictures[0], text("What is in the picture?")]}
    answer = {"role": "assistant", "content": [text("A disc.")]}
    second = {"role": "user", "content": [pictures[1], text("And in this one?")]}
    alone = {"role": "user", "content": [text("What comes after seven?")]}
    return [[first], [first, answer, second], [alone]]


def _tied(model: Any) -> bool:
    return bool(model.config.tie_word_embeddings)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m casa_train.export", description=__doc__)
    parser.add_argument("run", type=local_path, help="a run directory, such as runs/demo")
    parser.add_argument("--out", type=local_path, required=True, help="the directory to write")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="default: the run's precision")
    arguments = parser.parse_args(argv)
    quiet_libraries()
    try:
        print(export(arguments.run, arguments.out, arguments.step, arguments.dtype))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"exported to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
