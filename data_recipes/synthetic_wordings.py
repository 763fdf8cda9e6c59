"""Freely worded questions about the pictures of the synthetic recipe, answered in whole sentences.

A question names its subject: the circle, the red shape, the squares. Its answer is one sentence
that repeats this subject and follows from question and picture alone, however the question is
worded. So exact match is meaningful, and a wording that was never trained can be scored like any
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_recipes.synthetic_drawing import pick

NUMBERS = ("one", "two", "three", "four")
NOUNS = {  # for a shape that is not named
    "colour": ("shape", "figure", "object"),
    "shape": ("figure", "object", "thing"),
}
ALONE_SHARE = 0.5  # of the questions about the only shape of a picture, so many do not name it


@dataclass(frozen=True)
class Wordings:
    """How one thing is asked, with slots `{thing}` and `{where}`.

    :param held_out: those that training may leave out, to see what becomes of them.
    """

    trained: tuple[str, ...]
    held_out: tuple[str, ...]

    @property
    def every(self) -> tuple[str, ...]:
        return self.trained + self.held_out


COLOUR = Wordings(
    (
        "What colour is the {thing}{where}?",
        "Which colour does the {thing}{where} have?",
        "What is the colour of the {thing}{where}?",
        "What colour do you see on the {thing}{where}?",
        "In what colour is the {thing}{where} painted?",
        "Can you tell me the colour of the {thing}{where}?",
        "Please name the colour of the {thing}{where}.",
        "Tell me which colour the {thing}{where} has.",
        "Look at the {thing}{where}. What colour is it?",
        "What colour would you say the {thing}{where} is?",
    ),
    (
        "The {thing}{where} is of which colour?",
        "Say what colour the {thing}{where} is.",
        "I want to know the colour of the {thing}{where}.",
    ),
)
SHAPE = Wordings(
    (
        "What is the {thing}{where}?",
        "What shape does the {thing}{where} have?",
        "What kind of shape is the {thing}{where}?",
        "Which shape is the {thing}{where}?",
        "What do you call the {thing}{where}?",
        "Can you tell me what the {thing}{where} is?",
        "Please name the {thing}{where}.",
        "Tell me what the {thing}{where} is.",
        "Look at the {thing}{where}. What shape is it?",
        "What would you say the {thing}{where} is?",
    ),
    (
        "The {thing}{where} is of which shape?",
        "Say what the {thing}{where} is.",
        "I want to know what the {thing}{where} is.",
    ),
)
COUNT = Wordings(
    (
        "How many {thing} are there{where}?",
        "How many {thing} do you see{where}?",
        "How many {thing} can be seen{where}?",
        "Count the {thing}{where}.",
        "What is the number of {thing}{where}?",
        "Can you tell me how many {thing} there are{where}?",
        "Please count all {thing}{where}.",
        "Tell me how many {thing} there are{where}.",
        "Look at the {thing}{where}. How many are there?",
        "How many {thing} would you say there are{where}?",
    ),
    (
        "The {thing}{where} are how many?",
        "Say how many {thing} there are{where}.",
        "I want to know the number of {thing}{where}.",
    ),
)
WORDINGS = {"colour": COLOUR, "shape": SHAPE, "count": COUNT}
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


def ask(
    rng: np.random.Generator,
    wordings: Sequence[str],
    task: str,
    subject: str,
    answer: str,
    where: str,
    only: bool,
) -> tuple[str, str]:
    """A question and its answer.

    :param wordings: one of them is picked.
    :param task: one of `WORDINGS`.
    :param subject: what the question names: a kind, a colour or a plural, by task.
    :param answer: as a word: a colour, a kind, or a number in digits.
    :param where: which picture, such as " in the first image"; empty: the only one.
    :param only: whether the picture shows nothing else, so that it need not be named.
    """
    wording = pick(rng, wordings)
    unnamed = only and rng.random() < ALONE_SHARE
    noun = pick(rng, NOUNS.get(task, ("",)))
    if task == "colour":
        thing = noun if unnamed else subject
        sentence = f"The {thing}{where} is {answer}."
    elif task == "shape":
        thing = noun if unnamed else f"{subject} {noun}"
        sentence = f"The {thing}{where} is a {answer}."
    else:
        thing, number = subject, int(answer)
        counted = SINGULAR.get(subject, "shape") if number == 1 else subject
        verb = "is" if number == 1 else "are"
        sentence = f"There {verb} {NUMBERS[number - 1]} {counted}{where}."
    return wording.replace("{thing}", thing).replace("{where}", where), sentence


def without_picture(question: str, answer: str) -> tuple[str, str]:
    """A question that begins with "What is" or "What comes", and its answer as a sentence."""
    rest = question.removeprefix("What ").removesuffix("?")
    if rest.startswith("is "):
        return question, f"{rest.removeprefix('is ')} is {answer}."
    return question, f"{answer.capitalize()} {rest}."
