"""Exact match on held-out questions, with the images and blind, beside the best image-free guess.

A question is the first turn of a held-out sample, or with `evaluation.ask=last` the last one after
the true turns before it.

*Blind* asks each question with the images of another sample of the same family: what a model scores
then it did not read from the picture. The *image-free guess* answers every question text with the
answer that is most frequent for it in a sample of what was trained.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from casa_train.data.prepared.shards import Split
from casa_train.data.sample import ImageSlot, Sample, Turn, keep_images, messages_of
from casa_train.data.schemas.rows import BadRow
from casa_train.evaluate.shares import by_source, show_image, spread
from casa_train.modeling.image_processing_casa import CasaImageProcessor, ImageError

GUESS_SAMPLES = 100_000
"""Training samples that the image-free guess is from, at most: some seconds of reading."""


@dataclass(frozen=True)
class Question:
    """A turn of a held-out sample.

    :param turn: what is asked; images are numbered from 0 over `history` and this turn.
    :param images: of all these turns.
    :param video: whether they are the frames of one video.
    :param history: the turns before it, with their true answers.
    """

    id: str
    source: str
    turn: Turn
    images: tuple[bytes, ...]
    video: bool = False
    history: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        return question_text(self.turn)

    @property
    def reference(self) -> str:
        return self.turn.assistant

    def messages(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """As the processor takes it with its history, showing `images` in the slots, in order."""
        return messages_of([*self.history, self.turn], self.video, images.__getitem__)[:-1]


def question_text(turn: Turn) -> str:
    """What is asked in a turn, as one text."""
    return " ".join(part for part in turn.user if isinstance(part, str))


def held_out_questions(
    splits: Mapping[str, Split],
    limits: Mapping[str, int | None],
    limit: int,
    skipped: Counter[str],
    last: bool = False,
) -> list[Question]:
    """The first turns of samples that show an image there, at most `limit`, in even shares of the
    sources and evenly over each, as validations take theirs.

    Only images of that turn are kept; later turns may show more. Samples that cannot be read are
    counted in `skipped` by reason.

    :param limits: by split, how many of its samples are used; None: all.
    :param last: the last turns of samples that show any image, with all turns before them.
    """
    rows = {n: show_image(s, np.arange(len(s))[: limits[n]], last) for n, s in splits.items()}
    questions: list[Question] = []
    for (name, _), chosen in spread(by_source(splits, rows), limit).items():
        for row in chosen:
            try:
                question = read_question(splits[name], name, row, last)
            except (BadRow, ImageError) as error:
                skipped[error.reason] += 1
                continue
            if question is not None:
                questions.append(question)
    return questions


def read_question(split: Split, name: str, row: int, last: bool = False) -> Question | None:
    """The question of a row, see `question_of`; None where it has none.

    :raises BadRow, ImageError: a row or an image that cannot be used.
    """
    sample = split.read(row)
    return question_of(f"{name}/{sample.key}", sample, last)


def training_texts(
    splits: Mapping[str, Split],
    limits: Mapping[str, int | None],
    questions: Sequence[Question],
    limit: int = GUESS_SAMPLES,
) -> Iterator[Sample]:
    """At most `limit` training samples without their images, spread evenly over what they are.

    First those of the families that are asked, in even shares; others as far as there is room.
    Samples that cannot be read are left out.

    :param limits: by split, how many of its samples are trained; None: all.
    """
    groups = by_source(splits, {n: np.arange(len(s))[: limits[n]] for n, s in splits.items()})
    families = {question.source for question in questions}
    for asked in (True, False):
        wanted = {key: rows for key, rows in groups.items() if (key[1] in families) == asked}
        for (name, _), chosen in spread(wanted, limit).items():
            limit -= len(chosen)
            for row in chosen:
                with contextlib.suppress(BadRow):
                    yield splits[name].read(row, with_images=False)


def question_of(key: str, sample: Sample, last: bool = False) -> Question | None:
    """The first turn of a sample with its own images; None where it shows none.

    :param last: the last turn, with all turns and images before it; None where none shows any.
    :raises ImageError: an image that cannot be used.
    """
    turns = sample.turns if last else sample.turns[:1]
    *history, turn = turns
    shown = [image for earlier in history for image in earlier.images]
    shown += [part.index for part in turn.user if isinstance(part, ImageSlot)]
    if not shown:
        return None
    asked = keep_images(replace(sample, turns=turns), shown)
    for image in asked.images:
        CasaImageProcessor().load(image)
    *before, turn = asked.turns
    return Question(key, sample.source, turn, asked.images, sample.video, tuple(before))


def swapped_images(questions: Sequence[Question], seed: int = 0) -> list[tuple[bytes, ...]]:
    """For each question the images of another one of its family with as many images.

    A question that is alone of its kind gets the next question's of any kind, cut or repeated to
    fit.
    """
    kinds: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        kinds[question.source, len(question.images)].append(i)
    generator = random.Random(seed)
    swapped: list[tuple[bytes, ...]] = [()] * len(questions)
    for members in kinds.values():
        order = list(members)
        generator.shuffle(order)
        for i, other in zip(order, [*order[1:], order[0]], strict=True):
            images = questions[other].images
            if other == i:
                stand_in = questions[(i + 1) % len(questions)].images
                images = (stand_in * len(images))[: len(images)]
            swapped[i] = images
    return swapped


def best_guesses(
    training: Iterable[Sample], questions: Sequence[Question], last: bool = False
) -> tuple[list[str], int]:
    """The most frequent training answer of each question text, or of its family where it is new;
    and of how many samples.

    :param last: the last turns of training samples are what is asked, not the first ones.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_family: dict[str, Counter[str]] = defaultdict(Counter)
    samples = 0
    for sample in training:
        samples += 1
        turn = sample.turns[-1 if last else 0]
        text = question_text(turn)
        by_text[text][turn.assistant] += 1
        by_family[sample.source][turn.assistant] += 1
    guesses = []
    for question in questions:
        counts = by_text.get(question.text) or by_family.get(question.source)
        guesses.append(counts.most_common(1)[0][0] if counts else "")
    return guesses, samples


@torch.no_grad()
def generate_answers(
    model: Any, processor: Any, conversations: Sequence[Any], batch_size: int, max_new_tokens: int
) -> list[str]:
    """Greedy answers, batched with left padding through the export's own interface."""
    model.eval()
    processor.tokenizer.padding_side = "left"
    answers: list[str] = []
    for start in range(0, len(conversations), batch_size):
        batch = processor.tokenize_messages(conversations[start : start + batch_size])
        batch = batch.to(model.device)
        out = model.generate_from_image(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        answers += processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def matches(answer: str, reference: str) -> bool:
    """Exact match, without regard to case, outer space and a trailing full stop."""
    return _plain(answer) == _plain(reference)


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def evaluate(
    questions: Sequence[Question],
    training: Iterable[Sample],
    answer: Callable[[list[Any]], list[str]],
    last: bool = False,
) -> dict[str, Any]:
    """Scores overall and by family, and every answer.

    :param answer: conversations -> answers; `generate_answers` with a model.
    :param training: samples that the image-free guess knows; without any there is no guess.
    :param last: the questions are last turns.
    :return: `exact_match`, `blind`, `guess` (None without training samples), `questions` (without
        any, all three are None); the same
        by family under `families`; `guess_samples`, how many training samples the guess is from;
        and `answers`, one record a question, `history` being the turns before it.
    """
    seen = answer([q.messages(q.images) for q in questions])
    swapped = swapped_images(questions)
    blind = answer([q.messages(images) for q, images in zip(questions, swapped, strict=True)])
    guesses, guess_samples = best_guesses(training, questions, last)
    records = [
        {
            "id": q.id,
            "source": q.source,
            "history": len(q.history),
            "question": q.text,
            "reference": q.reference,
            "answer": seen[i],
            "blind_answer": blind[i],
            "correct": matches(seen[i], q.reference),
            "blind_correct": matches(blind[i], q.reference),
            "guess_correct": matches(guesses[i], q.reference) if guess_samples else None,
        }
        for i, q in enumerate(questions)
    ]
    families = sorted({q.source for q in questions})
    return {
        **_scores(records),
        "guess_samples": guess_samples,
        "families": {
            family: _scores([r for r in records if r["source"] == family]) for family in families
        },
        "answers": records,
    }


def _scores(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def share(field: str) -> float | None:
        return sum(bool(r[field]) for r in records) / len(records) if records else None

    guessed = bool(records) and records[0]["guess_correct"] is not None
    return {
        "exact_match": share("correct"),
        "blind": share("blind_correct"),
        "guess": share("guess_correct") if guessed else None,
        "questions": len(records),
    }
