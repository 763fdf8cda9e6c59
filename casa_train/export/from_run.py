"""A checkpoint of a run as a Hugging Face directory that has passed the gate."""

from __future__ import annotations

import json
from math import isqrt
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from casa_train import modeling
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.checkpoint.slices import read_weights
from casa_train.config.schema import CheckpointConfig, Config
from casa_train.data.processor import build_processor
from casa_train.distributed.ranks import Ranks
from casa_train.distributed.threads import use_threads
from casa_train.errors import UserError
from casa_train.export.adapters import KEEP, MERGE, Merge, chosen_way, save_kept
from casa_train.export.gate import check_export
from casa_train.export.model_card import model_card
from casa_train.export.writer import check_target, write_export
from casa_train.io.caches import check_cache
from casa_train.io.precision import DTYPES
from casa_train.modeling.image_processing_casa import SIDE
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.run.layout import CHECKPOINTS, PROCESSOR
from casa_train.run.resume_fields import plan_record
from casa_train.setup.model import build_model
from casa_train.setup.own_mechanisms import own_class


def export(
    run: Path,
    out: Path,
    step: int | None = None,
    dtype: str | None = None,
    lora: str | None = None,
) -> str:
    """Exports a checkpoint of a run.

    :param step: which checkpoint; None takes the newest valid one.
    :param dtype: bf16 or fp32; None takes the run's own precision.
    :param lora: what becomes of adapters: merge or keep; None takes what the run says.
    :return: the gate's verdict.
    :raises UserError: no such run or checkpoint, adapters that are not there, a bad target, a
        failed gate.
    """
    check_target(out)
    check_cache(HF_MODULES_CACHE)  # the gate loads the export by its own code
    config = load_run_config(run)
    way = chosen_way(config, lora)
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
    conversations = gate_conversations(config.data.max_pixels)
    merge = Merge(model, processor, conversations) if way == MERGE else None
    model.to(chosen)

    def save_model(directory: Path) -> None:
        if way == KEEP:
            save_kept(model, config, directory)
        else:
            model.save_pretrained(directory)

    def gate(directory: Path) -> str:
        # The values that were saved, computed with in fp32.
        verdict = check_export(directory, model.float(), conversations)
        return verdict if merge is None else f"{verdict}\n{merge.line(model, chosen)}"

    return write_export(
        out,
        save_model=save_model,
        save_processor=lambda directory: processor.save_pretrained(directory),
        source=Path(str(modeling.__file__)).parent,
        card=model_card(config, found.step, model, way),
        provenance={"run": config.name, "step": found.step, "dtype": str(chosen)},
        gate=gate,
        mechanism=own_class(model.mechanism),
    )


def refuse_other_tokens(
    run: Path, found: SavedCheckpoint, config: Config, processor: CasaProcessor
) -> None:
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


def find_checkpoint(run: Path, step: int | None) -> SavedCheckpoint:
    """The newest valid checkpoint, or that of `step`; reads only, so a running job is not
    disturbed.

    :raises UserError: none, or not that one.
    """
    manager = CheckpointManager(run / CHECKPOINTS, CheckpointConfig(), {}, Ranks())
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


def gate_conversations(max_pixels: int) -> list[Any]:
    """Fixed inputs: one image, two images with text between, and text alone."""
    side = SIDE * max(1, min(8, isqrt(max_pixels) // SIDE))
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
