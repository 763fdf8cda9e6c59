"""How easy-VQA asks, and its answers as whole sentences.

Every picture of the set shows one shape in one colour. Each wording has one rule, which says what a
question is about and turns its published answer into a sentence. Two answers to one question never
give the same sentence, so exact match on sentences is exact match on the published answers.
"""

from __future__ import annotations

import re
from collections.abc import Set
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from casa_train.errors import UserError

SHAPES = ("circle", "rectangle", "triangle")
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
FAMILIES = ("colour", "shape", "yes_no")
YES, NO = "yes", "no"
ANSWERS = {"colour": COLOURS, "shape": SHAPES, "yes_no": (YES, NO)}

World = tuple[str, str]
"""What a picture may show: a shape and its colour."""
WORLDS: frozenset[World] = frozenset(product(SHAPES, COLOURS))


@dataclass(frozen=True)
class Rule:
    """One wording.

    :param wording: the question as published, with what it names in place of `{thing}`.
    :param sentence: the answer; to yes or no, what is said where the thing is there.
    :param absent: to yes or no, what is said where it is not there.
    :param negated: whether "yes" says that it is not there.
    """

    wording: str
    family: str
    sentence: str
    absent: str = ""
    negated: bool = False

    @property
    def pattern(self) -> re.Pattern[str]:
        """What its questions match."""
        return re.compile(re.escape(self.wording).replace(r"\{thing\}", r"(?P<thing>(\w+ )?\w+)"))


def _yes_no(wording: str, sentence: str, absent: str, negated: bool = False) -> Rule:
    return Rule(wording, "yes_no", sentence, absent, negated)


THERE = "there is a {thing}", "there is no {thing}"
THERE_IN = "there is a {thing} in the image", "there is no {thing} in the image"
CONTAINS = "the image contains a {thing}", "the image does not contain a {thing}"
PRESENT = "a {thing} is present", "no {thing} is present"

RULES = (
    Rule("what color is the {thing}?", "colour", "The {thing} is {answer}."),
    Rule("what is the color of the {thing}?", "colour", "The color of the {thing} is {answer}."),
    Rule("what shape is in the image?", "shape", "The shape in the image is a {answer}."),
    Rule("what shape does the image contain?", "shape", "The image contains a {answer}."),
    Rule("what shape is present?", "shape", "The shape is a {answer}."),
    Rule("what is the {thing}?", "shape", "The {thing} is a {answer}."),
    _yes_no("is there a {thing}?", *THERE),
    _yes_no("is there not a {thing}?", *THERE, negated=True),
    _yes_no("is there a {thing} in the image?", *THERE_IN),
    _yes_no("is there not a {thing} in the image?", *THERE_IN, negated=True),
    _yes_no("does the image contain a {thing}?", *CONTAINS),
    _yes_no("does the image not contain a {thing}?", *CONTAINS, negated=True),
    _yes_no("is a {thing} present?", *PRESENT),
    _yes_no("is no {thing} present?", *PRESENT, negated=True),
)


@dataclass(frozen=True)
class Asked:
    """A published question, its answer, and the wording that it has.

    :param thing: what it names, such as "red shape", "circle" or "shape"; empty: nothing.
    """

    text: str
    answer: str
    rule: Rule
    thing: str

    @property
    def family(self) -> str:
        """One of `FAMILIES`."""
        return self.rule.family

    @property
    def kind(self) -> tuple[str, ...]:
        """What balanced samples hold in even shares within a family."""
        return self.answer, str(self.rule.negated)

    @property
    def possible(self) -> Set[World]:
        """What a picture may show of which this is asked and answered so."""
        named = self.thing.removesuffix("shape").strip()
        holding = {world for world in WORLDS if not named or named in world}
        if self.family != "yes_no":
            return {world for world in holding if self.answer in world}
        there = (self.answer == YES) != self.rule.negated
        return holding if there else WORLDS - holding

    def given(self, possible: Set[World]) -> bool:
        """Whether what is known already, and the question's own words, give its answer away."""
        others = [answer for answer in ANSWERS[self.family] if answer != self.answer]
        return not any(
            Asked(self.text, answer, self.rule, self.thing).possible & possible for answer in others
        )

    def words(self) -> tuple[str, str]:
        """Question and answer as published."""
        return self.text, self.answer

    def sentences(self) -> tuple[str, str]:
        """The question with a capital letter, and its answer as one sentence."""
        if self.family == "yes_no":
            there = (self.answer == YES) != self.rule.negated
            said = self.rule.sentence if there else self.rule.absent
            sentence = f"{self.answer.capitalize()}, {said}."
        else:
            sentence = self.rule.sentence
        sentence = sentence.replace("{thing}", self.thing).replace("{answer}", self.answer)
        return self.text[0].upper() + self.text[1:], sentence


def read_question(text: str, answer: str) -> Asked:
    """A published question by the rule of its wording.

    :raises UserError: no rule knows it, so these are other data.
    """
    found = _rule(text)
    if found is None or answer not in ANSWERS[found[0].family]:
        raise UserError(
            f"the package easy-vqa asks {text!r} with the answer {answer!r}, which its release 1.0 "
            "does not; install that one: pip install easy-vqa==1.0."
        )
    return Asked(text, answer, *found)


@lru_cache(maxsize=1024)
def _rule(text: str) -> tuple[Rule, str] | None:
    for rule in RULES:
        if match := rule.pattern.fullmatch(text):
            thing = match.groupdict().get("thing", "")
            if thing in ("", "shape", *SHAPES) or thing.removesuffix(" shape") in COLOURS:
                return rule, thing
    return None
