"""An export is done only when what users load computes what was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from casa_train.errors import UserError
from casa_train.export.loading import load_model, load_processor

TOLERANCE = 1e-4
NEW_TOKENS = 8


@torch.no_grad()
def check_export(directory: Path, trained: nn.Module | None, conversations: list[Any]) -> str:
    """Compares the trained model with the reloaded export, in fp32, on fixed conversations.

    Training logits (packed) must equal the reloaded model's (padded batch), and greedy generation
    with the cache must pick the token that the full forward pass picks.

    :param trained: the model in memory, with the values that were saved. None where there is none:
        then the reloaded one's packs stand in for it, and its values are for others to check.
    :param conversations: messages as `tokenize_messages` takes them, each ending with a user's
        turn.
    :return: the verdict as one line.
    :raises UserError: naming the largest difference.
    """
    model, processor = load_model(directory, torch.float32), load_processor(directory)
    model.eval()
    trained = model if trained is None else trained
    was_training = trained.training
    trained.eval()
    differences = []
    for messages in conversations:
        batch = processor.tokenize_messages(messages)
        expected = _packed_logits(trained, batch)
        given = model(**batch).logits[0]
        differences.append((expected - given).abs().max())
    worst = float(torch.stack(differences).max())  # a tensor's max keeps NaN, Python's drops it
    if not worst <= TOLERANCE:
        raise UserError(
            f"export gate: reloaded logits differ from the trained model's by {worst:.2e}, more "
            f"than {TOLERANCE:.0e}. The export was left in {directory} for inspection."
        )
    gap = max(
        _generation_gap(model, dict(processor.tokenize_messages(messages)))
        for messages in conversations
    )
    if not gap <= TOLERANCE:
        raise UserError(
            "export gate: cached greedy generation picks a token whose logit in the full forward "
            f"is {gap:.2e} below the best. The export was left in {directory} for inspection."
        )
    trained.train(was_training)
    return (
        f"export gate: {len(conversations)} conversations, logits equal to {worst:.1e}, "
        f"{NEW_TOKENS} cached greedy tokens each as the full forward picks them"
    )


@torch.no_grad()
def packed_logits(model: nn.Module, processor: Any, conversations: Sequence[Any]) -> list[Tensor]:
    """(T, vocabulary) logits of each conversation, by the path of training, without dropout."""
    was_training = model.training
    model.eval()
    logits = [_packed_logits(model, processor.tokenize_messages(c)) for c in conversations]
    model.train(was_training)
    return logits


def _packed_logits(trained: nn.Module, batch: Any) -> Tensor:
    """(T, vocabulary) logits of one conversation, by the path that training takes."""
    inputs = trained.pack(  # type: ignore[operator]
        batch["input_ids"][0], batch["image_embeds_insertion_points"][0], batch["pixel_values"]
    )
    logits: Tensor = trained(packed=inputs).logits
    return logits


def _generation_gap(model: Any, batch: dict[str, Any]) -> float:
    """How far below the best logit of the full forward the generated tokens are, at most."""
    prompt = batch["input_ids"]
    out = model.generate_from_image(
        **batch,
        past_key_values=DynamicCache(),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    full = model(
        input_ids=out,
        pixel_values=batch["pixel_values"],
        image_embeds_insertion_points=batch["image_embeds_insertion_points"],
    ).logits[0]
    gap = 0.0
    ends = model.generation_config.eos_token_id
    for position in range(prompt.shape[1], out.shape[1]):
        row = full[position - 1].clone()
        if ends is not None:
            row[ends] = float("-inf")  # min_new_tokens forbids the end here, too
        gap = max(gap, float(row.max() - row[out[0, position]]))
    return gap
