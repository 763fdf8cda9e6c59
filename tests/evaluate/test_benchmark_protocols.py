"""The benchmarks' prompts, scores and totals: each prompt literally, each rule by hand."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.published import PUBLISHED, rows_beside
from casa_train.evaluate.benchmarks.question import BENCHMARKS, BenchmarkQuestion
from tests.helpers.benchmark_answers import BROKEN, cases
from tests.helpers.commands import ROOT, environment

CASA, LMMS = PROTOCOLS["casa"].tasks, PROTOCOLS["lmms-eval"].tasks

ASKED = BenchmarkQuestion("7", "How MANY cats?", ("3",))
NOTED = replace(ASKED, text="The cat is")
LEAF = replace(ASKED, text="Which part is B", options=("root", "leaf", "stem"), references=("1",))
SIGN = replace(
    ASKED,
    text="Is it red?\nA. yes\nB. no\nPlease answer directly with only the letter of the correct "
    "option and nothing else.",
)
ARTIST = replace(ASKED, text="Is this Mona Lisa? Please answer yes or no.")

SHORT = "\nAnswer the question using a single word or phrase."

# Why: the authors' figures stand on these words to the letter. Their models saw "single word or
# phrase" and "Answer with the letter." in training, and answer at length without them.
CASA_PROMPTS = [
    ("chartqa", ASKED, "How MANY cats?" + SHORT),
    ("docvqa", ASKED, "How MANY cats?" + SHORT),
    ("infovqa", ASKED, "How MANY cats?" + SHORT),
    ("textvqa", ASKED, "How MANY cats?" + SHORT),
    ("gqa", ASKED, "How MANY cats?" + SHORT),
    # OCRBench asks for whole lines and formulas, so not for a word or phrase.
    ("ocrbench", ASKED, "How MANY cats?\nPlease directly answer the question."),
    # Both keep what the published question itself asks for, unlike lmms-eval in MME.
    ("realworldqa", SIGN, SIGN.text + SHORT),
    ("mme", ARTIST, "Is this Mona Lisa? Please answer yes or no." + SHORT),
    # Many of AI2D's questions lack their mark; it is put where the text has no end of its own.
    (
        "ai2d",
        LEAF,
        "Question: Which part is B?\nChoices:\nA. root\nB. leaf\nC. stem\nAnswer with the letter.",
    ),
    (
        "ai2d",
        replace(LEAF, text="Name B.", options=("x", "y")),
        "Question: Name B.\nChoices:\nA. x\nB. y\nAnswer with the letter.",
    ),
    (
        "ai2d",
        replace(LEAF, text="What is B?", options=("x", "y")),
        "Question: What is B?\nChoices:\nA. x\nB. y\nAnswer with the letter.",
    ),
]

# Why: figures of other models by lmms-eval stand on its tasks' `default` words, odd ones too.
LMMS_PROMPTS = [
    ("chartqa", ASKED, "How MANY cats?\nAnswer the question with a single word."),
    ("docvqa", ASKED, "How MANY cats?" + SHORT),
    ("infovqa", ASKED, "How MANY cats?" + SHORT),
    ("gqa", ASKED, "How MANY cats?" + SHORT),
    ("textvqa", ASKED, "How many cats?" + SHORT),  # one capital
    ("ocrbench", replace(ASKED, text=" What is it?\n"), "What is it?"),  # nothing is added
    ("realworldqa", replace(SIGN, text=SIGN.text + " "), SIGN.text),  # nothing is added
    ("mme", ARTIST, "Is this Mona Lisa?" + SHORT),  # the question's own request goes
    (
        "ai2d",
        LEAF,
        "Which part is B\nA. root\nB. leaf\nC. stem"
        "\nAnswer with the option's letter from the given choices directly.",
    ),
]


@pytest.mark.parametrize(("name", "question", "prompt"), CASA_PROMPTS)
def test_the_authors_prompts(name: str, question: BenchmarkQuestion, prompt: str) -> None:
    assert CASA[name].prompt(question) == prompt


@pytest.mark.parametrize(("name", "question", "prompt"), LMMS_PROMPTS)
def test_the_prompts_of_lmms_eval(name: str, question: BenchmarkQuestion, prompt: str) -> None:
    assert LMMS[name].prompt(question) == prompt


def test_every_prompt_is_pinned() -> None:
    for pinned in (CASA_PROMPTS, LMMS_PROMPTS):
        assert {name for name, _, _ in pinned} == set(BENCHMARKS)
    assert all(tuple(protocol.tasks) == BENCHMARKS for protocol in PROTOCOLS.values())
    assert all(protocol.name == name for name, protocol in PROTOCOLS.items())


def test_pictures_and_lengths_are_those_of_the_protocols() -> None:
    assert PROTOCOLS["casa"].image_size == 896  # what the authors evaluate at
    assert {(task.max_new_tokens, task.stop) for task in CASA.values()} == {(128, ())}
    assert PROTOCOLS["lmms-eval"].image_size is None  # it leaves pictures to the model
    lengths = {name: task.max_new_tokens for name, task in LMMS.items()}
    documents = {"docvqa": 32, "infovqa": 32}
    assert lengths == dict.fromkeys(BENCHMARKS, 16) | documents | {"ocrbench": 128, "textvqa": 128}
    stops = {name: task.stop for name, task in LMMS.items()}
    assert stops == dict.fromkeys(BENCHMARKS, ("\n\n",)) | {"textvqa": ("ASSISTANT:",)}


def scored(protocol: str, name: str, references: tuple[str, ...], answer: str) -> float:
    question = BenchmarkQuestion("7", "?", references)
    return PROTOCOLS[protocol].tasks[name].score(question, answer)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("reference", "answer", "right"),
    [
        ("20", "21", True),  # at 5 %
        ("20", "19", True),
        ("20", "21.01", False),
        ("-20", "-19.5", True),
        ("-20", "20", False),
        ("12%", "0.12", True),
        ("12%", "12", False),
        ("12", "12%", False),
        ("0", "0", True),  # nothing is within 5 % of nought
        ("0", "0.0", False),
        ("1,200", "1,200", True),  # as text
        ("1,200", "1200", False),
        ("2014", "2100", True),  # years are numbers, too
        ("Blue", "blue", True),
        ("Blue", "blue line", False),
        ("20", "20 kg", False),
        ("20", "nan", False),
        ("20", "", False),
    ],
)
def test_chartqa_forgives_a_twentieth_of_a_number_and_nothing_else(
    protocol: str, reference: str, answer: str, right: bool
) -> None:
    assert scored(protocol, "chartqa", (reference,), answer) == float(right)


def test_only_the_authors_strip_the_full_stop() -> None:
    for name in ("chartqa", "docvqa", "infovqa"):
        assert scored("casa", name, ("Blue",), " blue.\n") == 1
        assert scored("lmms-eval", name, ("Blue",), " blue.\n") < 1
    assert scored("casa", "realworldqa", ("Blue",), "blue.") == 1
    # It is stripped of an answer, not of a reference: where that has one, it is missed.
    assert scored("casa", "ocrbench", ("etc.",), "etc.") == 0
    assert scored("lmms-eval", "ocrbench", ("etc.",), "etc.") == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_documents_are_scored_by_the_nearest_reference(protocol: str, name: str) -> None:
    """ANLS by hand: one less the edits by the longer length; below one half it is nothing."""
    references = ("Mel Gibson", "Gibson, Mel")
    assert scored(protocol, name, references, "gibson,  mel") == 1  # case does not count
    assert scored(protocol, name, ("20 kg",), "20 mg") == pytest.approx(4 / 5)
    assert scored(protocol, name, ("abcd",), "abxy") == pytest.approx(1 / 2)
    assert scored(protocol, name, ("abcde",), "abxyz") == 0
    assert scored(protocol, name, ("abcd", "abxy"), "abxz") == pytest.approx(3 / 4)
    assert scored(protocol, name, references, "") == 0


def test_lengths_count_spaces_in_lmms_eval_alone() -> None:
    answer = "ab   ce"  # five characters, seven with its spaces; one edit
    assert scored("casa", "docvqa", ("ab cd",), answer) == pytest.approx(1 - 1 / 5)
    assert scored("lmms-eval", "docvqa", ("ab cd",), answer) == pytest.approx(1 - 1 / 7)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_textvqa_wants_three_people_to_agree(protocol: str) -> None:
    """Of ten answers n equal the model's: n ways to leave out one of them, and 10 - n others."""
    for n, expected in [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]:
        people = ("stop",) * n + tuple(f"no {i}" for i in range(10 - n))
        assert scored(protocol, "textvqa", people, "The Stop!") == pytest.approx(expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("2 dogs", "Two dogs."),
        ("dog", "the dog"),
        ("don't", "dont"),
        ("1000", "1,000"),
        ("9.5", "9.5"),
        ("well known", "well-known"),  # a mark between letters becomes a space ...
        ("a well known", "a well - known"),  # ... and one beside a space goes
        ("st louis", "St. Louis"),
    ],
)
def test_short_answers_are_compared_without_articles_marks_and_number_words(
    protocol: str, reference: str, answer: str
) -> None:
    assert scored(protocol, "textvqa", (reference,) * 10, answer) == 1


def test_realworldqa_is_exact_for_the_authors_and_by_chosen_letter_in_lmms_eval() -> None:
    for answer, casa, lmms in [
        ("B", 1, 1),
        ("b.", 1, 0),
        ("B. The left one", 0, 1),
        ("The answer is (B).", 0, 1),
        ("B or A", 0, 1),  # the start has more weight than the end
        ("A or B", 0, 0),
        ("a C, then (A), then B)", 0, 0),
        ("C", 0, 0),
        ("", 0, 0),
    ]:
        assert scored("casa", "realworldqa", ("B",), answer) == casa, answer
        assert scored("lmms-eval", "realworldqa", ("B",), answer) == lmms, answer
    for protocol in PROTOCOLS:
        assert scored(protocol, "realworldqa", ("Downhill",), "downhill.") == 1
        assert scored(protocol, "realworldqa", ("2",), "two") == 0


def test_ai2d_takes_the_letter_that_leads() -> None:
    for answer, right in [
        ("B", True),
        ("b", True),
        (" B.", True),
        ("B. leaf", True),
        ("(B)", True),  # punctuation does not count
        ("B leaf", False),
        ("leaf", False),
        ("A. root or B. leaf", False),
        ("", False),
    ]:
        for tasks in (CASA, LMMS):
            assert tasks["ai2d"].score(LEAF, answer) == float(right), answer
    assert CASA["ai2d"].score(LEAF, "Answer: B") == CASA["ai2d"].score(LEAF, "Answer: B. leaf") == 1
    assert LMMS["ai2d"].score(LEAF, "Answer: B") == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_gqa_is_equal_but_for_case_and_punctuation(protocol: str) -> None:
    assert scored(protocol, "gqa", ("t-shirt",), "T-Shirt.") == 1
    assert scored(protocol, "gqa", ("t-shirt",), "a t-shirt") == 0
    assert scored(protocol, "gqa", ("no",), "") == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ocrbench_is_right_where_a_reference_stands_in_the_answer(protocol: str) -> None:
    assert scored(protocol, "ocrbench", ("CENTRE", "center"), "It says Center") == 1
    assert scored(protocol, "ocrbench", ("CENTRE",), "cent re") == 0
    assert scored(protocol, "ocrbench", ("no 5",), "ＮＯ\u3000５") == 1  # full-width forms
    formula = BenchmarkQuestion("7", "?", ("x ^ { 2 }",), dataset="HME100k")
    score = PROTOCOLS[protocol].tasks["ocrbench"].score
    assert score(formula, "It is x^{2}\n+ 1") == 1  # spaces do not count
    assert score(formula, "X^{2}") == 0  # case does
    assert score(replace(formula, dataset="IIIT5K"), "x^{2}") == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_mme_reads_the_yes_or_no_at_the_start(protocol: str) -> None:
    for answer, said in [
        ("Yes", "Yes"),
        ("yes, it is", "Yes"),
        (" Y.", "Yes"),
        ("No.", "No"),
        ("n", "No"),
        ("It is not", ""),
        ("not sure", "No"),  # its first letters
        ("know", "No"),
        ("", ""),
    ]:
        for reference in ("Yes", "No"):
            right = float(said == reference)
            assert scored(protocol, "mme", (reference,), answer) == right, answer


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", BENCHMARKS)
def test_no_answer_makes_a_scorer_raise(protocol: str, name: str) -> None:
    task = PROTOCOLS[protocol].tasks[name]
    questions = [question for question, _, _ in cases(name, len(BROKEN))]
    scores = [
        task.score(question, answer) for question, answer in zip(questions, BROKEN, strict=True)
    ]
    assert all(0 <= score <= 1 for score in scores)
    assert task.total(questions, scores)["score"] >= 0


def parts(name: str, scores: list[tuple[str, str, float]]) -> dict[str, float]:
    questions = [
        BenchmarkQuestion(str(i), "?", ("Yes",), category=category, pair=pair)
        for i, (category, pair, _) in enumerate(scores)
    ]
    casa, lmms = (
        tasks[name].total(questions, [score for _, _, score in scores]) for tasks in (CASA, LMMS)
    )
    assert casa == lmms
    return casa


def test_chartqa_is_the_mean_over_all_questions_and_over_either_half() -> None:
    human, augmented = [("human_test", "", s) for s in (1, 0, 0)], [("augmented_test", "", 1)]
    assert parts("chartqa", human + augmented) == pytest.approx(
        {"score": 50, "human": 100 / 3, "augmented": 100}
    )
    assert parts("chartqa", human) == pytest.approx({"score": 100 / 3, "human": 100 / 3})


@pytest.mark.parametrize("name", ["docvqa", "infovqa", "textvqa", "realworldqa", "ai2d", "gqa"])
def test_most_are_the_mean_in_percent(name: str) -> None:
    assert parts(name, [("", "", s) for s in (1, 0.5, 0.9)]) == pytest.approx({"score": 80})


def test_ocrbench_is_of_a_thousand_on_a_part_too() -> None:
    kinds = [("Digit String Recognition", "", s) for s in (1, 0)]
    kinds += [("Doc-oriented VQA", "", s) for s in (1, 1)]
    expected = {"score": 750, "Digit String Recognition": 50, "Doc-oriented VQA": 100}
    assert parts("ocrbench", kinds) == pytest.approx(expected)


def test_mme_adds_right_questions_and_right_pairs_of_each_category() -> None:
    """By hand: `count` has 3 of 4 questions and 1 of 2 pairs, 75 + 50; `OCR` 1 of 2 and no pair;
    `code_reasoning` both and its pair. A question without its partner does not count.
    """
    total = parts(
        "mme",
        [
            ("count", "1.png", 1),
            ("OCR", "1.png", 1),  # another picture: names are those of a category
            ("count", "2.png", 0),
            ("count", "1.png", 1),
            ("OCR", "1.png", 0),
            ("count", "2.png", 1),
            ("code_reasoning", "9.png", 1),
            ("code_reasoning", "9.png", 1),
            ("code_reasoning", "alone.png", 0),
            ("scene", "alone.png", 1),
        ],
    )
    assert total == pytest.approx(
        {
            "score": 375,
            "perception": 175,
            "cognition": 200,
            "count": 125,
            "OCR": 50,
            "code_reasoning": 200,
        }
    )


def test_a_perfect_mme_is_2800_points() -> None:
    """Fourteen categories of 200: 2,000 of perception, 800 of cognition, as in its paper."""
    perception = "existence count position color posters celebrity scene landmark artwork OCR"
    cognition = "commonsense_reasoning numerical_calculation text_translation code_reasoning"
    kinds = f"{perception} {cognition}".split()
    total = parts("mme", [(kind, "1", 1) for kind in kinds for _ in range(2)])
    assert (total["score"], total["perception"], total["cognition"]) == (2800, 2000, 800)


def test_nothing_to_count_is_an_error() -> None:
    for tasks in (CASA, LMMS):
        for task in tasks.values():
            with pytest.raises(ValueError):
                task.total([], [])
        with pytest.raises(ValueError, match="none is whole"):
            tasks["mme"].total([ASKED], [1])


def test_published_rows_are_those_of_the_authors_tables() -> None:
    """One figure of each row, chosen to tell rows and columns apart, and who stands beside whom."""
    assert [(row.name, *list(row.figures.items())[i % 9]) for i, row in enumerate(PUBLISHED)] == [
        ("Helium1-VL-2B (insertion), card", "chartqa", 81.6),
        ("Helium1-VL-2B (insertion), 2026", "docvqa", 88.3),
        ("CASA-Helium1-VL-2B, card", "infovqa", 48.6),
        ("CASA-Helium1-VL-2B, 2026", "ocrbench", 740),
        ("CASA-Helium1-VL-2B-Shared, 2026", "textvqa", 74.5),
        ("mPLUG-Owl3 8B", "realworldqa", 63.9),
        ("mPLUG-Owl3 2B", "ai2d", 62.6),
        ("Qwen2.5-VL-3B", "gqa", 61.0),
        ("CASA-Qwen2_5-VL-3B, card", "mme", 1918),
        ("CASA-Qwen2_5-VL-3B, 2026", "chartqa", 81.8),
        ("CASA-Qwen2_5-VL-3B-Shared, 2026", "docvqa", 87.8),
    ]
    assert rows_beside("helium") == PUBLISHED[:7]
    assert rows_beside("llama") == rows_beside("helium")
    assert rows_beside("qwen2_5_vl_text") == PUBLISHED[5:]
    assert rows_beside("unheard_of") == PUBLISHED


@pytest.mark.fresh
def test_scoring_needs_no_torch() -> None:
    """So that answers can be scored where there is none, lmms-eval's environment among them."""
    ask = "import sys, casa_train.evaluate.benchmarks.protocols; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
