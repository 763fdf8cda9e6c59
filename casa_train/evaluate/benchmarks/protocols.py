"""Two ways to ask and to score the nine benchmarks: the authors' and lmms-eval's.

Free of torch and transformers, so that answers can be scored anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from casa_train.evaluate.benchmarks import scorers, totals
from casa_train.evaluate.benchmarks.question import BenchmarkQuestion

Prompt = Callable[[BenchmarkQuestion], str]
Score = Callable[[BenchmarkQuestion, str], float]
Total = Callable[[Sequence[BenchmarkQuestion], Sequence[float]], dict[str, float]]

# The authors' words, from their evaluation script of 2026; the figures of the paper's second
# version stand on them.
CASA_SHORT = "\nAnswer the question using a single word or phrase."
"""After every question but OCRBench's and AI2D's. LLaVA-1.5's words for short answers, which
FineVision's data teach too."""
CASA_OCR = "\nPlease directly answer the question."
"""After OCRBench's, whose answers may be a whole line or a formula."""
CASA_CHOICE_BEFORE = "Question: "
CASA_CHOICES = "\nChoices:\n"
CASA_CHOICE_AFTER = "\nAnswer with the letter."
"""Around AI2D's: as the training data write questions with options ..."""
CASA_ANSWER_BEFORE = "Answer: "
"""... and their answers, which is taken off before the letter is looked for."""

# The `lmms_eval_specific_kwargs` of lmms-eval 0.7.3's tasks under `default`. Its OCRBench and
# RealWorldQA add nothing.
LMMS_CHARTQA = "\nAnswer the question with a single word."
LMMS_SHORT = "\nAnswer the question using a single word or phrase."
"""DocVQA, InfoVQA, TextVQA, GQA, MME."""
LMMS_AI2D = "\nAnswer with the option's letter from the given choices directly."
LMMS_MME_REMOVED = " Please answer yes or no."
"""MME's questions end with it; lmms-eval puts its own words in its place."""

LMMS_STOP = ("\n\n",)
"""lmms-eval ends an answer here where a task names no end of its own."""
LMMS_TEXTVQA_STOP = ("ASSISTANT:",)
LMMS_TEXTVQA_TOKENS = 128
"""lmms-eval's TextVQA names no limit; this is what its Qwen2.5-VL takes then."""


@dataclass(frozen=True)
class Task:
    """One benchmark under one protocol.

    :param prompt: the text after the picture.
    :param score: of a raw answer, 0 to 1; whatever is stripped, is stripped inside. No answer
        makes it raise.
    :param total: `score`, the published figure in its unit: percent, of 1,000 for OCRBench, the
        sum of perception and cognition for MME; then its parts by name. ValueError where nothing
        counts: no question, or no whole pair of MME.
    :param stop: an answer ends before the first of these.
    """

    prompt: Prompt
    score: Score
    total: Total
    max_new_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Protocol:
    """How every benchmark is asked and scored.

    :param image_size: the processor's: at most the pixels of a square of this side; None: the
        export's own limit.
    :param tasks: by benchmark.
    :param source: where it is from, in words.
    """

    name: str
    image_size: int | None
    tasks: Mapping[str, Task]
    source: str


def _after(suffix: str) -> Prompt:
    return lambda question: question.text + suffix


def _casa_choices(question: BenchmarkQuestion) -> str:
    mark = "" if question.text.endswith(("?", ".")) else "?"
    asked = CASA_CHOICE_BEFORE + question.text + mark
    return asked + CASA_CHOICES + _lettered(question) + CASA_CHOICE_AFTER


def _lmms_choices(question: BenchmarkQuestion) -> str:
    return f"{question.text}\n{_lettered(question)}{LMMS_AI2D}"


def _lettered(question: BenchmarkQuestion) -> str:
    options = enumerate(question.options)
    return "\n".join(f"{scorers.letter_of(i)}. {option}" for i, option in options)


def _lmms_stripped(question: BenchmarkQuestion) -> str:
    return question.text.strip()


def _lmms_textvqa(question: BenchmarkQuestion) -> str:
    """lmms-eval writes a TextVQA question with one capital, its first letter."""
    return question.text.capitalize() + LMMS_SHORT


def _lmms_mme(question: BenchmarkQuestion) -> str:
    return question.text.strip().replace(LMMS_MME_REMOVED, "") + LMMS_SHORT


def _by(rule: Callable[[Sequence[str], str], float]) -> Score:
    return lambda question, answer: rule(question.references, answer)


def _by_without_stop(rule: Callable[[Sequence[str], str], float]) -> Score:
    return lambda question, answer: rule(question.references, scorers.without_full_stop(answer))


def _ocrbench(question: BenchmarkQuestion, answer: str) -> float:
    formula = question.dataset == "HME100k"
    rule = scorers.contains_formula if formula else scorers.contains
    return rule(question.references, answer)


def _casa_ocrbench(question: BenchmarkQuestion, answer: str) -> float:
    return _ocrbench(question, scorers.without_full_stop(answer))


def _casa_ai2d(question: BenchmarkQuestion, answer: str) -> float:
    letter = answer.strip().removeprefix(CASA_ANSWER_BEFORE)
    return scorers.leading_letter(question.references, letter)


def _casa(prompt: Prompt, score: Score, total: Total = totals.percentage) -> Task:
    return Task(prompt, score, total, max_new_tokens=128)


def _lmms(
    prompt: Prompt,
    score: Score,
    max_new_tokens: int,
    total: Total = totals.percentage,
    stop: tuple[str, ...] = LMMS_STOP,
) -> Task:
    return Task(prompt, score, total, max_new_tokens, stop)


CASA = Protocol(
    name="casa",
    image_size=896,
    tasks={
        "chartqa": _casa(
            _after(CASA_SHORT), _by_without_stop(scorers.relaxed_accuracy), totals.chartqa
        ),
        "docvqa": _casa(_after(CASA_SHORT), _by_without_stop(scorers.anls_star)),
        "infovqa": _casa(_after(CASA_SHORT), _by_without_stop(scorers.anls_star)),
        "ocrbench": _casa(_after(CASA_OCR), _casa_ocrbench, totals.ocrbench),
        "textvqa": _casa(_after(CASA_SHORT), _by(scorers.vqa_accuracy)),
        "realworldqa": _casa(_after(CASA_SHORT), _by_without_stop(scorers.exact_match)),
        "ai2d": _casa(_casa_choices, _casa_ai2d),
        "gqa": _casa(_after(CASA_SHORT), _by(scorers.exact_match_without_punctuation)),
        "mme": _casa(_after(CASA_SHORT), _by(scorers.yes_or_no), totals.mme),
    },
    source="the evaluation script of CASA's authors (2026)",
)

LMMS_EVAL = Protocol(
    name="lmms-eval",
    image_size=None,
    tasks={
        "chartqa": _lmms(_after(LMMS_CHARTQA), _by(scorers.relaxed_accuracy), 16, totals.chartqa),
        "docvqa": _lmms(_after(LMMS_SHORT), _by(scorers.anls), 32),
        "infovqa": _lmms(_after(LMMS_SHORT), _by(scorers.anls), 32),
        "ocrbench": _lmms(_lmms_stripped, _ocrbench, 128, totals.ocrbench),
        "textvqa": _lmms(
            _lmms_textvqa,
            _by(scorers.vqa_accuracy),
            LMMS_TEXTVQA_TOKENS,
            stop=LMMS_TEXTVQA_STOP,
        ),
        "realworldqa": _lmms(_lmms_stripped, _by(scorers.choice_or_text), 16),
        "ai2d": _lmms(_lmms_choices, _by(scorers.leading_letter), 16),
        "gqa": _lmms(_after(LMMS_SHORT), _by(scorers.exact_match_without_punctuation), 16),
        "mme": _lmms(_lmms_mme, _by(scorers.yes_or_no), 16, totals.mme),
    },
    source="the tasks of lmms-eval 0.7.3",
)

PROTOCOLS = {protocol.name: protocol for protocol in (CASA, LMMS_EVAL)}
