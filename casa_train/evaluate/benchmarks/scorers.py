"""What a raw answer scores against the references, 0 to 1, by the rule of each benchmark.

Each function that says *as lmms-eval* gives what lmms-eval 0.7.3 gives for the same answer, which
a test compares with lmms-eval itself. White space around an answer never counts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from anls_star import anls_score

from casa_train.evaluate.benchmarks.vqa_answers import vqa_normalised


def until(answer: str, stops: Sequence[str]) -> str:
    """An answer up to the first of what ends it."""
    cuts = [answer.find(stop) for stop in stops if stop in answer]
    return answer[: min(cuts)] if cuts else answer


def without_full_stop(answer: str) -> str:
    """Without outer white space and the full stops that end it: a model trained on sentences ends
    short answers with one.
    """
    return answer.strip().rstrip(".").strip()


def relaxed_accuracy(references: Sequence[str], answer: str) -> float:
    """ChartQA's (arXiv 2203.10244, section 5.1): a number within 5 % of the reference, other
    answers equal but for case. As lmms-eval.

    A percentage is a hundredth: 12% is 0.12 and not 12. What Python reads as a number is one;
    thousands separators make it text. A reference of zero has no 5 %, so it is compared as text.
    """
    return float(any(_relaxed(reference, answer.strip()) for reference in references))


def _relaxed(reference: str, answer: str) -> bool:
    expected, found = _number(reference), _number(answer)
    if not expected or found is None:
        return answer.lower() == reference.lower()
    return abs(found - expected) / abs(expected) <= 0.05


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(references: Sequence[str], answer: str) -> float:
    """Average normalised Levenshtein similarity of DocVQA and InfoVQA: the best reference's, 0
    below one half. As lmms-eval, whose lengths count spaces that its distances do not.
    """
    answer = answer.strip()
    plain = " ".join(answer.lower().split())
    nearest = 1.0
    for reference in references:
        distance = edit_distance(" ".join(reference.lower().split()), plain)
        # Upper case can be longer: the German sharp s becomes two letters.
        length = max(len(reference.upper()), len(answer.upper()))
        nearest = min(nearest, distance / length if length else 0.0)
    return 1 - nearest if nearest <= 0.5 else 0.0


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and substitutions between two texts (Levenshtein)."""
    row = list(range(len(a) + 1))
    for i, letter in enumerate(b):
        above, row = row, [i + 1]
        for j, other in enumerate(a):
            row.append(min(above[j] + (letter != other), above[j + 1] + 1, row[j] + 1))
    return row[-1]


def anls_star(references: Sequence[str], answer: str) -> float:
    """ANLS* (arXiv 2402.03848) by its authors' package; on plain texts the ANLS of DocVQA, with
    the length of what is compared.
    """
    any_of = tuple(references)  # the package takes a list for all of them together
    return anls_score(any_of, answer.strip(), return_gt=False, return_key_scores=False)


def vqa_accuracy(references: Sequence[str], answer: str) -> float:
    """TextVQA's, of some ten people's answers: how often a third of three others agree, averaged
    over leaving out each one. As lmms-eval.
    """
    people = [vqa_normalised(reference) for reference in references]
    found = vqa_normalised(answer.strip())
    agree = people.count(found)
    left_out = agree * min(1.0, (agree - 1) / 3) + (len(people) - agree) * min(1.0, agree / 3)
    return left_out / len(people)


def exact_match(references: Sequence[str], answer: str) -> float:
    """Equal but for case."""
    return float(any(answer.strip().lower() == r.strip().lower() for r in references))


PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match_without_punctuation(references: Sequence[str], answer: str) -> float:
    """Equal but for case and ASCII punctuation. As lmms-eval: spaces that removed punctuation
    leaves behind count.
    """

    def plain(text: str) -> str:
        return text.lower().translate(PUNCTUATION)

    return float(any(plain(answer.strip()) == plain(reference) for reference in references))


def letter_of(option: int) -> str:
    """The letter that stands before an option, counted from 0."""
    return string.ascii_uppercase[option]


LEADING_LETTER = re.compile(r"\s*([A-Z])\.")


def leading_letter(references: Sequence[str], answer: str) -> float:
    """Whether the answer is the letter of the right option, alone or with a full stop and more
    behind it; `references` are indices of options. As lmms-eval's multiple-choice filter of AI2D.
    """
    found = LEADING_LETTER.match(answer)
    letters = [letter_of(int(reference)) for reference in references]
    return exact_match_without_punctuation(letters, found[1] if found else answer)


CHOICES = "ABCD"


def choice_or_text(references: Sequence[str], answer: str) -> float:
    """RealWorldQA: where the reference is a letter of A to D, the letter that the answer chooses;
    else equal but for case and full stops at the end. As lmms-eval.
    """
    text = answer.lower().strip().rstrip(".")

    def right(reference: str) -> bool:
        if reference.upper() in tuple(CHOICES):
            return chosen_letter(answer, CHOICES) == reference.upper()
        return text == reference.lower()

    return float(any(right(reference.strip()) for reference in references))


FORMS = (("({})", 6), ("{}.", 5), ("{}:", 4), ("{})", 3), ("{} ", 2))
"""How a chosen letter may be written, and the rank of each: a higher one wins."""
PHRASES = (
    *("the answer is", "the correct answer is", "the best answer is", "my answer is"),
    *("answer is", "correct answer is", "best answer is"),
    *("the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "the correct choice is", "correct choice is", "my choice is", "choice is"),
    *("i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
"""What comes before a chosen letter in a sentence, also in Korean, Chinese and Japanese."""
AT_START, AT_END, AFTER_PHRASE, ANYWHERE = 10, 9, 7, 0


def chosen_letter(answer: str, letters: str) -> str:
    """The letter that an answer chooses, "" where there is none: of the ways to write it the one
    of the highest rank, of several at one rank the last. As lmms-eval.
    """
    inner = answer.strip()
    for mark in ",.!?;:'\"":
        inner = inner.strip(mark)
    text = f" {inner} "
    inner = inner.strip()
    lowered = text.lower()
    said = [lowered.find(phrase) + len(phrase) for phrase in PHRASES if phrase in lowered]
    found: list[tuple[int, int, str]] = []  # rank, where, letter
    for letter in letters:
        found += [(rank, text.rfind(form.format(letter)), letter) for form, rank in FORMS]
        found += [(AFTER_PHRASE, text.find(letter, after), letter) for after in said]
        if inner.startswith(letter) and not inner[1:2].isalpha():
            found.append((AT_START, 0, letter))
        if inner.endswith(letter) and not inner[-2:-1].isalpha():
            found.append((AT_END, len(text), letter))
    found = [candidate for candidate in found if candidate[1] >= 0]
    found = found or [(ANYWHERE, text.rfind(c), c) for c in letters if c in text]
    return max(found, default=(ANYWHERE, 0, ""))[2]


FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: ord(" ")}


def contains(references: Sequence[str], answer: str) -> float:
    """OCRBench: whether a reference stands in the answer, but for case and the full-width forms of
    ASCII. As lmms-eval.
    """

    def plain(text: str) -> str:
        return text.translate(FULL_WIDTH).lower().strip().replace("\n", " ")

    return float(any(plain(reference) in plain(answer.strip()) for reference in references))


def contains_formula(references: Sequence[str], answer: str) -> float:
    """OCRBench's handwritten formulas: whether one stands in the answer but for spaces and line
    breaks; case counts. As lmms-eval.
    """

    def plain(text: str) -> str:
        return text.strip().replace("\n", "").replace(" ", "")

    return float(any(plain(reference) in plain(answer) for reference in references))


def yes_or_no(references: Sequence[str], answer: str) -> float:
    """MME: the yes or no among the answer's first four characters. As lmms-eval."""
    plain = answer.lower().strip().replace(".", "")
    said = {"y": "yes", "n": "no"}.get(plain) or next(
        (word for word in ("yes", "no") if word in plain[:4]), ""
    )
    return float(any(said == r.lower().strip().replace(".", "") for r in references))
