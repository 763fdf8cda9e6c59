"""Texts without pictures: does an export say what the backbone said that it was trained from?

A frozen backbone does, bit for bit; of one that trained this shows how far it went.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from casa_train.distributed.threads import use_threads
from casa_train.errors import UserError
from casa_train.export.loading import DTYPE_OPTION, load_model, load_processor
from casa_train.io.files import write_atomic
from casa_train.io.tables import aligned
from casa_train.run.configuration import load_run_config
from casa_train.run.layout import TEXT_FILE

ASKED = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 7 plus 5?",
    "Name three animals that can fly.",
    "Why is the sky blue?",
    "Translate to French: good morning.",
)
# Whole models of images and text, whose text decoder is asked without images.
WHOLE = ("qwen2_5_vl",)


def compare_texts(
    run: Path, export: Path, asked: Sequence[str] = ASKED, max_new_tokens: int = 32
) -> dict[str, Any]:
    """Asks the export and the plain backbone alike; writes and returns `text_answers.json`.

    :param asked: user turns; both read the ids that the export's own template makes of them.
    :param max_new_tokens: of each greedy answer.
    :raises UserError: a run whose backbone began at random, or is not there any more.
    """
    config = load_run_config(run)
    use_threads(config.parallel.threads)
    name = config.model.backbone.pretrained
    if name is None:
        raise UserError(
            f"{run}: model.backbone.pretrained names no backbone, so there is none to compare "
            "with. Leave --text out."
        )
    model, processor = load_model(export, "auto").eval(), load_processor(export)
    plain = _plain(name, next(model.parameters()).dtype).eval()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    plain.to(device)
    ends = model.generation_config.eos_token_id
    # Published ones often bring a penalty for repetitions, which would part equal logits.
    model.generation_config, plain.generation_config = GenerationConfig(), GenerationConfig()
    options = {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "eos_token_id": ends,
        "pad_token_id": processor.tokenizer.pad_token_id,
    }
    rows = []
    for question in asked:
        batch = processor.tokenize_messages([{"role": "user", "content": question}]).to(device)
        ids = batch["input_ids"]
        with torch.inference_mode():
            largest = _difference(model(**batch).logits, plain(input_ids=ids).logits)
            ours = model.generate_from_image(**batch, **options)[0, ids.shape[1] :]
            theirs = plain.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)[
                0, ids.shape[1] :
            ]
        answers = [
            processor.tokenizer.decode(answer, skip_special_tokens=True)
            for answer in (ours, theirs)
        ]
        rows.append(
            {
                "question": question,
                "largest_difference": largest,
                "same_tokens": torch.equal(ours, theirs),
                "answer": answers[0],
                "plain_answer": answers[1],
            }
        )
    result = {"export": str(export), "backbone": name, "texts": rows}
    write_atomic(run / TEXT_FILE, json.dumps(result, indent=1) + "\n")
    return result


def text_table(result: Mapping[str, Any]) -> str:
    """The comparison as text, what both have in common last."""
    rows = [("asked", "logits differ by", "answers", "answer")]
    texts = result["texts"]
    for text in texts:
        said = " ".join(text["answer"].split())
        rows.append(
            (
                text["question"],
                f"{text['largest_difference']:.1e}" if text["largest_difference"] else "0",
                "equal" if text["same_tokens"] else "differ",
                said if len(said) <= 60 else f"{said[:57]}...",
            )
        )
    bits = sum(text["largest_difference"] == 0 for text in texts)
    tokens = sum(text["same_tokens"] for text in texts)
    return (
        f"{aligned(rows)}\nwithout a picture, beside {result['backbone']}: logits equal bit for "
        f"bit in {bits} of {len(texts)} texts, answers token for token in {tokens}"
    )


def _plain(name: str, dtype: torch.dtype) -> Any:
    """The backbone as transformers loads it.

    :raises UserError: it is not there, or cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        options: dict[str, Any] = {"trust_remote_code": False}  # left unsaid, it would ask
        config = AutoConfig.from_pretrained(name, **options)
        kind = AutoModelForImageTextToText if config.model_type in WHOLE else AutoModelForCausalLM
        return kind.from_pretrained(name, **options, **{DTYPE_OPTION: dtype})
    except (OSError, ValueError) as error:
        raise UserError(
            f"the run's model.backbone.pretrained {name} cannot be loaded "
            f"({str(error).splitlines()[0]}); expected the backbone that it was trained from. Put "
            "it back there, or leave --text out."
        ) from error


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of logits, over the tokens that both have rows for."""
    rows = min(ours.shape[-1], theirs.shape[-1])
    if torch.equal(ours[..., :rows], theirs[..., :rows]):
        return 0.0
    return float((ours[..., :rows].double() - theirs[..., :rows].double()).abs().max())
