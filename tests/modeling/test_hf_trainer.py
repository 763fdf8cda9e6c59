"""Fine-tuning an export with `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from tests.helpers import stranger
from tests.helpers.stranger import BLUE, RED, TALL, ask
from tests.helpers.tiny_export import write_tiny_export

pytest.importorskip("accelerate")

# Answers of very different lengths: a mean of means is another loss.
ANSWERS = ["red", "It is a very tall green shape, is it not?", "no", "Blue. And it is round, too."]
SAMPLES = [
    [*ask(words, *pictures), {"role": "assistant", "content": answer}]
    for words, pictures, answer in zip(
        ("Colour?", "What is it?", "Is it?", "And these?"),
        ([RED], [TALL], [], [BLUE, RED]),
        ANSWERS,
        strict=True,
    )
]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_export(tmp_path_factory.mktemp("tuned") / "export"))


def collate(processor: Any, samples: list[Any]) -> dict[str, Any]:
    """A batch with labels on the answers."""
    batch = processor.apply_chat_template(
        samples,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        padding_side="right",
    )
    answers = batch.pop("assistant_masks").bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~answers, -100)}


def train(
    export: str, out: Path, batch: int, steps: int = 2, resume: bool = False, **options: Any
) -> tuple[Any, Any, Trainer]:
    """Updates on four samples each, in micro-batches."""
    model, processor = stranger.load(export)
    arguments = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
        max_steps=steps,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_num_workers=0,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=SAMPLES,
        eval_dataset=SAMPLES[:2],
        data_collator=lambda samples: collate(processor, samples),
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=resume or None)
    return model, processor, trainer


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_fine_tuning_accumulates_checkpoints_blocks_saves_and_reloads(
    export: str, tmp_path: Path
) -> None:
    whole, processor, trainer = train(export, tmp_path / "whole", batch=4)
    with torch.no_grad():
        before, _ = stranger.load(export)
        expected = float(before(**collate(processor, SAMPLES)).loss)
    assert losses(trainer)[0] == pytest.approx(expected, abs=2e-4)  # Trainer rounds to 4 digits
    assert losses(trainer)[1] < losses(trainer)[0]
    moved = weights(whole)
    assert sum(not torch.equal(moved[n], p) for n, p in before.named_parameters()) > 50

    # Four micro-batches divide by the tokens of all, and blocks may run again.
    for options in ({}, {"gradient_checkpointing": True}):
        parts, _, apart = train(export, tmp_path / f"parts{len(options)}", batch=1, **options)
        assert parts.gradient_checkpointing == bool(options)
        assert losses(apart) == pytest.approx(losses(trainer), abs=2e-4)
        for name, value in weights(parts).items():
            torch.testing.assert_close(value, moved[name], rtol=0, atol=1e-5)

    # A checkpoint is an export again, and evaluation and resume go on from it.
    saved, reader = stranger.load(str(tmp_path / "whole" / "checkpoint-2"))
    assert type(saved).__name__ == type(whole).__name__
    batch = collate(reader, SAMPLES)
    whole.eval()
    with torch.no_grad():
        assert torch.equal(saved(**batch).logits, whole(**batch).logits)
        measured = trainer.evaluate()["eval_loss"]
        assert measured == pytest.approx(
            float(whole(**collate(reader, SAMPLES[:2])).loss), abs=1e-4
        )
    through, _, _ = train(export, tmp_path / "through", batch=4, steps=3)
    resumed, _, again = train(export, tmp_path / "whole", batch=4, steps=3, resume=True)
    assert again.state.global_step == 3
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, weights(through)[name], rtol=0, atol=1e-6)


def test_the_loss_is_divided_by_the_tokens_that_are_named(export: str) -> None:
    model, processor = stranger.load(export)
    batch = collate(processor, SAMPLES)
    learned = int((batch["labels"][:, 1:] != -100).sum())
    mean = model(**batch).loss
    for items in (7 * learned, torch.tensor(7 * learned)):
        torch.testing.assert_close(model(**batch, num_items_in_batch=items).loss, mean / 7)
