"""easy-VQA (https://github.com/vzhou842/easy-VQA): one shape in one colour, and questions about it.

The published set of 4,000 and 1,000 pictures of 64 x 64 pixels with 38,575 and 9,673 questions,
from its package on PyPI, in FineVision's schema. Its training pictures become `train`, its test
pictures `validation`.

A sample's source is the family of its first question, so that scores tell families apart. Where
fewer samples are taken than there are, they have even shares of the families, and of the answers
within each.
"""

from __future__ import annotations

import argparse
import importlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from casa_train.errors import UserError
from data_recipes import whole
from data_recipes.easyvqa_questions import FAMILIES, WORLDS, Asked, read_question
from data_recipes.pipeline import Encoding, Row, check_least
from data_recipes.synthetic_drawing import shuffled
from data_recipes.synthetic_scenes import SPLITS, SplitName

T = TypeVar("T")

PACKAGE = "easy-vqa"
ORIGIN = {"dataset": "easyvqa", "subset": "easyvqa"}
VERSION = 1  # raise when the same arguments would write something else
ANSWERS = ("words", "sentences")
PLACEHOLDER = "<image>"  # in a question of a sample with several pictures

Conversation = tuple[int, tuple[Asked, ...]]
"""A picture's number and what is asked about it, turn by turn."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the recipe."""
    whole.add_arguments(parser, "writing")
    parser.add_argument(
        "--tasks",
        default="all",
        metavar="A,B,...",
        help=f"which questions, out of {', '.join(FAMILIES)} (default: all of them, of which "
        "three in four are to be answered with yes or no)",
    )
    parser.add_argument(
        "--answers",
        choices=ANSWERS,
        default=ANSWERS[0],
        help="as published, or as whole sentences, one for each question and answer "
        f"(default: {ANSWERS[0]})",
    )
    parser.add_argument(
        "--turns",
        type=int,
        default=1,
        metavar="N",
        help="questions about one picture in one sample, at most; none that an earlier one gives "
        "away (default: 1)",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=1,
        metavar="N",
        help="pictures in one training sample, each before its own questions: what a chat template "
        "says once a sample is then read once for all; held-out samples have one (default: 1)",
    )
    for name, split in (("samples", "training"), ("validation", "held-out")):
        parser.add_argument(
            f"--{name}",
            type=int,
            metavar="N",
            help=f"{split} samples, balanced (default: all that there are)",
        )


def run(arguments: argparse.Namespace) -> None:
    """Writes the dataset, or says that it is there already.

    :raises UserError: the package is missing, bad numbers or tasks, or a directory that holds
        something else.
    """
    tasks = whole.chosen_tasks(arguments.tasks, FAMILIES)
    check_least(
        ("--seed", arguments.seed, 0),
        ("--turns", arguments.turns, 1),
        ("--pictures", arguments.pictures, 1),
        ("--workers", arguments.workers, 1),
        *(("--samples", n, 1) for n in [arguments.samples] if n is not None),
        *(("--validation", n, 0) for n in [arguments.validation] if n is not None),
    )
    sizes: dict[SplitName, int] = {}
    for split, name in zip(SPLITS, ("validation", "samples"), strict=True):
        there = len(conversations(split, arguments.seed, tasks, arguments.turns))
        if split == "train":
            there //= arguments.pictures
        given = getattr(arguments, name)
        sizes[split] = there if given is None else given
        if sizes[split] > there:
            raise UserError(
                f"--{name} is {given}, but easy-VQA gives {there} samples of {', '.join(tasks)} "
                f"with --turns {arguments.turns} and --pictures {arguments.pictures}; expected at "
                "most so many, or leave it out."
            )
    wanted = {
        "version": VERSION,
        "samples": sizes["train"],
        "validation": sizes["validation"],
        "seed": arguments.seed,
        "tasks": tasks,
        "answers": arguments.answers,
        "turns": arguments.turns,
        "pictures": arguments.pictures,
        "tokenizer": arguments.tokenizer,
        "template": arguments.template or "auto",
    }

    write_splits = partial(_write_splits, arguments.out, wanted, sizes, arguments.workers)
    whole.prepare(arguments.out, "easyvqa", wanted, write_splits)


def _write_splits(
    out: Path,
    wanted: Mapping[str, Any],
    sizes: Mapping[SplitName, int],
    workers: int,
    encoding: Encoding,
) -> dict[str, Any]:
    """Returns what was written, by split, with what is right without a picture."""
    seed, tasks, turns = wanted["seed"], tuple(wanted["tasks"]), wanted["turns"]
    sentences = wanted["answers"] == "sentences"
    pictures: dict[SplitName, int] = {"train": wanted["pictures"], "validation": 1}
    first = {
        split: [t[0] for _, t in conversations(split, seed, tasks, turns)[: size * pictures[split]]]
        for split, size in sizes.items()
    }
    summary: dict[str, Any] = {}
    for split, size in sizes.items():
        if size == 0:
            continue
        jobs = [
            QuestionJob(
                split, seed, tasks, turns, pictures[split], sentences, i, min(i + whole.SHARD, size)
            )
            for i in range(0, size, whole.SHARD)
        ]
        found = whole.write(out / split, jobs, encoding, workers, "easyvqa", ORIGIN)
        guesses = blind_guesses(first[split], first["train"])
        summary[split] = {**found, "blind_guess": guesses}
        for family, guess in guesses.items():
            print(
                f"{split}: {family}: {guess['questions']} questions, of which the most frequent "
                f"answer is right in {guess['share']:.3f}, the most frequent one of training to "
                f"each question in {guess['by_question']:.3f}"
            )
    return summary


@dataclass(frozen=True)
class QuestionJob:
    """Samples `start` to `stop` of a split."""

    split: SplitName
    seed: int
    tasks: tuple[str, ...]
    turns: int
    pictures: int
    sentences: bool
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split} {self.start} to {self.stop}"

    @property
    def weight(self) -> int:
        return self.stop - self.start

    def rows(self) -> Iterator[Row]:
        every = conversations(self.split, self.seed, self.tasks, self.turns)
        paths = _published(self.split).pictures
        for i in range(self.start, self.stop):
            talks = every[i * self.pictures : (i + 1) * self.pictures]
            texts: list[tuple[str, str]] = []
            for _, turns in talks:
                said = [turn.sentences() if self.sentences else turn.words() for turn in turns]
                if self.pictures > 1:  # each where it is asked about
                    said[0] = f"{PLACEHOLDER}{said[0][0]}", said[0][1]
                texts += said
            families = {turns[0].family for _, turns in talks}
            source = f"easyvqa_{families.pop()}" if len(families) == 1 else "easyvqa"
            row = whole.rated_row(source, texts, visual=True)
            images = [paths[picture].read_bytes() for picture, _ in talks]
            yield Row(f"{self.split}-{i:07d}", row, images)


# -------------------------------------------------------------------------------- the published set


@dataclass(frozen=True)
class Published:
    """One split as published: pictures by number, and what is asked about each."""

    pictures: Mapping[int, Path]
    questions: Mapping[int, Sequence[Asked]]


@lru_cache(maxsize=2)
def _published(split: SplitName) -> Published:
    """:raises UserError: the package is not installed, or holds other data."""
    try:
        package = importlib.import_module("easy_vqa")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {PACKAGE}, which holds the data, is not installed; run: pip install "
            f"{PACKAGE}==1.0"
        ) from error
    if split == "train":
        questions, paths = package.get_train_questions(), package.get_train_image_paths()
    else:
        questions, paths = package.get_test_questions(), package.get_test_image_paths()
    asked: dict[int, list[Asked]] = defaultdict(list)
    for text, answer, picture in zip(*questions, strict=True):
        asked[picture].append(read_question(text, answer))
    if lacking := sorted(set(asked) - set(paths)):
        raise UserError(
            f"the package {PACKAGE} lacks {len(lacking)} pictures that it asks about, such as "
            f"{lacking[0]}.png of {split}; install it anew: pip install --force-reinstall "
            f"{PACKAGE}==1.0"
        )
    return Published({number: Path(paths[number]) for number in sorted(paths)}, asked)


def conversations(
    split: SplitName, seed: int, tasks: Sequence[str], turns: int
) -> list[Conversation]:
    """Every question of the chosen families, in the order in which samples are taken.

    :param turns: of a conversation, at most.
    """
    return list(_conversations(split, seed, tuple(tasks), turns))


@lru_cache(maxsize=4)
def _conversations(
    split: SplitName, seed: int, tasks: tuple[str, ...], turns: int
) -> tuple[Conversation, ...]:
    published = _published(split)
    key = SPLITS.index(split)

    def generator(purpose: int, number: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(seed, spawn_key=(key, purpose, number))
        return np.random.Generator(np.random.Philox(sequence))

    kinds: dict[str, dict[tuple[str, ...], list[Conversation]]] = {
        task: defaultdict(list) for task in tasks
    }
    for picture in published.pictures:
        asked = [q for q in published.questions.get(picture, ()) if q.family in tasks]
        for talk in cut(shuffled(generator(0, picture), asked), turns):
            kinds[talk[0].family][talk[0].kind].append((picture, talk))
    rng = generator(1, 0)
    dealt_families = [
        dealt([shuffled(rng, kinds[task][kind]) for kind in sorted(kinds[task])]) for task in tasks
    ]
    return tuple(dealt(dealt_families))


def cut(asked: Sequence[Asked], turns: int) -> list[tuple[Asked, ...]]:
    """Questions about one picture as conversations in which none gives a later one's answer away.

    :param turns: of a conversation, at most.
    """
    found = []
    while asked:
        talk: list[Asked] = []
        later: list[Asked] = []
        possible = WORLDS
        for question in asked:
            if len(talk) == turns or (talk and question.given(possible)):
                later.append(question)
            else:
                talk.append(question)
                possible = possible & question.possible
        found.append(tuple(talk))
        asked = later
    return found


def dealt(piles: Sequence[Sequence[T]]) -> list[T]:
    """One of each pile in turn, for as long as a pile has any."""
    longest = max(map(len, piles), default=0)
    return [pile[i] for i in range(longest) for pile in piles if i < len(pile)]


def blind_guesses(asked: Sequence[Asked], known: Sequence[Asked]) -> dict[str, dict[str, Any]]:
    """What is right without a picture, by family.

    :param known: what a guess may be from.
    :return: `questions`, the most frequent `answer` to them and its `share`, and the share
        `by_question` that is right where each question is answered as is most frequent in `known`.
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        counts[question.text][question.answer] += 1
    best = {text: answers.most_common(1)[0][0] for text, answers in counts.items()}
    guesses = {}
    for family in FAMILIES:
        here = [question for question in asked if question.family == family]
        if here:
            answer, number = Counter(question.answer for question in here).most_common(1)[0]
            guesses[family] = {
                "questions": len(here),
                "answer": answer,
                "share": number / len(here),
                "by_question": sum(best.get(q.text) == q.answer for q in here) / len(here),
            }
    return guesses
