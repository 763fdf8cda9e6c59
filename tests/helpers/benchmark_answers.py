"""Made-up questions of the benchmarks, as the reader makes them and as rows of the datasets, and
answers to them: right, nearly right and broken.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from typing import Any

from casa_train.evaluate.benchmarks.question import BenchmarkQuestion
from casa_train.evaluate.benchmarks.sources import OCRBENCH_TYPES

# What models write that scorers were not made for.
BROKEN = (
    *("", " ", "\n", "\n\n", ".", "...", "%", "%%", "-", "?!", "''", '"', "( )", "\t\t", "\u200b"),
    *(
        "A",
        "b",
        "B.",
        "c.",
        "(C)",
        "(d)",
        "A)",
        "D:",
        "A, B",
        "A and B",
        "B or C.",
        "AB",
        "A.B.C.D",
    ),
    *("A. red\nB. blue", "  C. the cat", "\nD.", "Answer: B", "Answer: B. red", "E", "Z."),
    *("The answer is (D).", "the answer is A, not B", "I choose C because A is wrong", "答案是B。"),
    *(
        "Best answer is b",
        "정답은 C",
        "A is wrong. The correct option is D!",
        "Both A and B",
        "an A",
    ),
    *("12%", "12 %", "0.12", "12.0%", "1,234", "1234", "1,234.5 kg", "$5", "5 years", "5years"),
    *("0", "0.0", "-0", "-3.5", "+7", ".5", "5.", "1e3", "1_000", "nan", "inf", "-inf", "1 000"),
    *("one", "Two", "ten", "none", "three cats", "a", "the", "The a an", "1/2", "10-20", "3.14.15"),
    *("１２", "Ａ", "ＹＥＳ", "％", "１２％", "　yes　", "é", "e\u0301", "ﬁ", "ß", "STRASSE", "½"),
    *(
        "\u00a05\u00a0",
        "yes\u00a0",
        "5\u202f000",
        "x²",
        "٣",
        "Ω",
        "ς",
        "🐱",
        "naïve",
        "“yes”",
        "‘no’",
    ),
    *("yes", "No", "YES.", "no!", "y", "N", "Y.", "x", "yes\nno", "No, it is not", "not sure"),
    *("know", "nope", "I say yes", "ye.s", "n.o.", '"yes"', "'No'", "yes and no", "yesterday"),
    *("dont", "it's", "its a dog's life", "what're you", "o'clock", "somebody'd", "shes", "Im"),
    *(
        "red, blue",
        "red , blue",
        "red/blue",
        "red / blue",
        "well-known",
        "well - known",
        "a;b",
        "(a)",
    ),
    *("line\nbreak", "tab\there", "two  spaces", " lead", "trail ", "x^{2} + 1", "\\frac{1}{2}"),
    *("yes. " * 60, "no" * 400, "the " * 200, "a. b. c. " * 30, "9" * 400, "word " * 300 + "A"),
)
WORDS = (
    *("Red", "the cat", "42", "0.12", "12%", "1,234", "Dr. Smith", "two", "STOP", "2 km/h", "0"),
    *("São Paulo", "x^2 + y", "ＡＢＣ", "left-hand side", "9:30", "yes", "No", "A", "b", "5.5 kg"),
    *("don't", "somebody's car", "Straße 5", "p. 12", "$3,000.00", "(none)", "10", "  two  spaces"),
)
MME_KINDS = ("existence", "count", "OCR", "celebrity", "code_reasoning", "text_translation")


def made_up(name: str, number: int, rng: random.Random) -> BenchmarkQuestion:
    """A question as the reader makes it, of words, spaces and marks that published ones have."""
    text = rng.choice(
        ("What IS this", " how many cats?", "Name the sign.", "¿Qué?\n", "is it A or B")
    )
    kind = ""
    options: tuple[str, ...] = ()
    references: tuple[str, ...] = (rng.choice(WORDS),)
    dataset = pair = ""
    if name == "chartqa":
        kind = rng.choice(("human_test", "augmented_test"))
    elif name in ("docvqa", "infovqa"):
        references = tuple(rng.sample(WORDS, rng.randint(1, 5)))
    elif name == "textvqa":
        few = rng.sample(WORDS, 3)
        references = tuple(rng.choice(few) for _ in range(10))
    elif name == "ocrbench":
        kind = OCRBENCH_TYPES[number % len(OCRBENCH_TYPES)]
        references = tuple(rng.sample(WORDS, rng.randint(1, 3)))
        dataset = "HME100k" if kind.startswith("Handwritten Math") else "SROIE"
    elif name == "realworldqa":
        text += "\nA. left\nB. right\nPlease answer directly with only the letter of the correct "
        text += "option and nothing else."
        references = (rng.choice(("A", "B", "C", "D", *WORDS)),)
    elif name == "ai2d":
        options = tuple(rng.sample(WORDS, rng.randint(2, 6)))
        references = (str(rng.randrange(len(options))),)
    elif name == "mme":
        text += " Please answer yes or no."
        references = (rng.choice(("Yes", "No")),)
        kind, pair = MME_KINDS[number // 2 % len(MME_KINDS)], f"{number // 2}.png"
    return BenchmarkQuestion(str(number), text, references, options, kind, dataset, pair)


def published(name: str, question: BenchmarkQuestion) -> dict[str, Any]:
    """The question as a row of its dataset."""
    answer: Any = question.references[0]
    row: dict[str, Any] = {"question": question.text}
    if name in ("docvqa", "infovqa", "textvqa"):
        row |= {"answers": list(question.references), "question_id": 7, "questionId": "7"}
    else:
        row |= {"answer": list(question.references) if name == "ocrbench" else answer}
    kinds = {"chartqa": "type", "ocrbench": "question_type", "mme": "category"}
    if name in kinds:
        row[kinds[name]] = question.category
    if name == "ocrbench":
        row["dataset"] = question.dataset
    if name == "ai2d":
        row["options"] = list(question.options)
    if name == "mme":
        row["question_id"] = question.pair
    return row


def written(name: str, question: BenchmarkQuestion, rng: random.Random) -> str:
    """An answer: right, nearly right or broken."""
    if rng.random() < 0.35:
        return rng.choice(BROKEN)
    answer = rng.choice(question.references)
    if question.options:
        index = int(answer)
        answer = rng.choice((chr(ord("A") + index), question.options[index], "B", "A"))
    for _ in range(rng.randint(0, 3)):
        answer = rng.choice(CHANGES)(answer, rng)
    return answer


def _cut(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + text[at + 1 :]


def _put(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice("aA1 .,%'\n\u00a0é，") + text[at:]


def _scale(text: str, rng: random.Random) -> str:
    """A number next to the 5 % that ChartQA forgives."""
    try:
        return str(float(text.rstrip("%")) * rng.choice((0.94, 0.95, 0.96, 1.05, 1.06, 0.01, 100)))
    except ValueError:
        return text


def _wide(text: str, rng: random.Random) -> str:
    """In the full-width forms of ASCII."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


def _wrapped(text: str, rng: random.Random) -> str:
    """With a line break at its spaces."""
    return text.replace(" ", "\n")


CHANGES: tuple[Callable[[str, random.Random], str], ...] = (
    _cut,
    _put,
    _scale,
    _wide,
    _wrapped,
    lambda text, rng: text.upper(),
    lambda text, rng: text.lower(),
    lambda text, rng: text + rng.choice((".", "..", " .", "%", " kg", "\n", "!", ". It is so.")),
    lambda text, rng: rng.choice((" ", "\n", "Answer: ", "The answer is ", "It is ", '"')) + text,
    lambda text, rng: f"({text})",
    lambda text, rng: unicodedata.normalize("NFD", text),
)


Case = tuple[BenchmarkQuestion, dict[str, Any], str]


def cases(name: str, amount: int) -> list[Case]:
    rng = random.Random(f"{name} 20251219")
    made = []
    for number in range(amount):
        question = made_up(name, number, rng)
        made.append((question, published(name, question), written(name, question, rng)))
    return made
