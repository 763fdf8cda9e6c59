"""How much of what answers read comes from the image, by layer: CASA's implicit gate, and others'.

The reference answers are given to the model, and what their tokens read is recorded where they are
predicted (`modeling/image_attention.py`), with each question's own image and with another's. Of a
question with turns before it, only its own answer counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from casa_train.evaluate.exact_match import Question, swapped_images

Array = np.ndarray[Any, np.dtype[np.float64]]
LOW, HIGH = 10, 90  # per cent of the questions between which a layer's spread is told


def measure_image_attention(
    model: Any, processor: Any, questions: Sequence[Question], limit: int
) -> dict[str, Any] | None:
    """What `limit` questions, spread evenly, read from images.

    :param model: an export's, as plain transformers loads it.
    :return: `questions`, their number, and `quantities` by name (`image share` and the like; none
        for plain cross-attention, which reads nothing but images): the `layers` that have it, and
        for each layer its `mean` over questions, where each is the mean over its answer's tokens,
        `low` and `high`, between which lie 80 % of the questions, and the mean `blind`, with
        another sample's image; `uniform`, what equal attention to all keys would give, or None; and
        `sources`, each with `questions` and `mean`. None for an export that cannot tell.
    """
    if limit == 0 or _listening(model) is None:
        return None
    model.eval()
    swapped = swapped_images(questions)
    chosen = range(0, len(questions), -(-len(questions) // limit))
    seen = [_of_question(model, processor, questions[i], questions[i].images) for i in chosen]
    blind = [_of_question(model, processor, questions[i], swapped[i]) for i in chosen]
    sources = [questions[i].source for i in chosen]
    names = [name for name in seen[0] if name != "uniform"]
    return {
        "questions": len(chosen),
        "quantities": {
            name: _summary(
                list(seen[0][name]),
                np.array([list(values[name].values()) for values in seen]),
                np.array([list(values[name].values()) for values in blind]),
                [values["uniform"][-1] for values in seen if "uniform" in values],
                sources,
            )
            for name in names
        },
    }


def _listening(model: Any) -> Callable[[Any], Any] | None:
    """The method of an export that measures; exports of earlier versions have another name."""
    found: Any = getattr(model, "image_attention", None) or getattr(model, "image_reads", None)
    return found  # type: ignore[no-any-return]


def _of_question(
    model: Any, processor: Any, question: Question, images: Sequence[bytes]
) -> dict[str, dict[int, float]]:
    """By quantity and layer, the mean over the answer's tokens; `uniform` under layer -1."""
    answer = {"role": "assistant", "content": [{"type": "text", "text": question.reference}]}
    messages = question.messages(images)
    batch = processor.apply_chat_template(
        [[*messages, answer]],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
    ).to(model.device)
    (points,) = batch["image_embeds_insertion_points"]
    packed = model.pack(batch["input_ids"][0], points, batch["pixel_values"])
    if "image_follows" in batch:
        packed.chunks = [replace(packed.chunks[0], follows=tuple(batch["image_follows"][0]))]
    # The positions whose next token is part of the answer, as training counts them.
    rows = batch["assistant_masks"][0][1:].nonzero()[:, 0]
    if question.history:  # whose answers come before the last message
        before = processor.apply_chat_template([messages], tokenize=True)[0]
        rows = rows[rows + 1 >= len(before)]
    packed.logits_index = rows
    listening = _listening(model)
    assert listening is not None
    listener = listening(packed)
    found = {
        name: {layer: float(values.nanmean()) for layer, values in sorted(layers.items())}
        for name, layers in listener.values.items()
    }
    if listener.uniform is not None:
        found["uniform"] = {-1: float(listener.uniform.nanmean())}
    return found


def _summary(
    layers: list[int],
    seen: Array,
    blind: Array,
    uniform: list[float],
    sources: Sequence[str],
) -> dict[str, Any]:
    """:param seen: (questions, layers); :param blind: alike."""
    low, high = np.percentile(seen, [LOW, HIGH], axis=0)
    of = np.array(sources)
    return {
        "layers": layers,
        "mean": seen.mean(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "blind": blind.mean(0).tolist(),
        "uniform": float(np.mean(uniform)) if uniform else None,
        "sources": {
            source: {
                "questions": int((of == source).sum()),
                "mean": seen[of == source].mean(0).tolist(),
            }
            for source in sorted(set(sources))
        },
    }
