"""Prompts, settings, scores and totals of the benchmarks beside lmms-eval's own, run as lmms-eval
runs them: its task of each benchmark, on made-up questions in place of the download.

`make test-lmms` has the environment; the ordinary one has no lmms-eval, and skips.
"""

from __future__ import annotations

import importlib
import os
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.scorers import (
    chosen_letter,
    exact_match_without_punctuation,
    without_full_stop,
)
from casa_train.evaluate.benchmarks.vqa_answers import vqa_normalised
from tests.helpers.benchmark_answers import BROKEN, Case, cases

if os.environ.get("CI_REQUIRED") != "1":
    pytest.importorskip("lmms_eval", reason="`make test-lmms` has lmms-eval")

import datasets  # noqa: E402
import lmms_eval  # noqa: E402
import lmms_eval.api.metrics as lmms_metrics  # noqa: E402  (before tasks: it fills their registry)
from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.api.task import ConfigurableTask  # noqa: E402
from lmms_eval.utils import load_yaml_config  # noqa: E402

FILES = {name: f"{name}/{name}.yaml" for name in BENCHMARKS} | {
    "docvqa": "docvqa/docvqa_val.yaml",
    "infovqa": "infovqa/infovqa_val.yaml",
    "textvqa": "textvqa/textvqa_val.yaml",
}
ANSWERS = 500


class Task(ConfigurableTask):  # type: ignore[misc]
    """lmms-eval's task of a benchmark, with rows in place of its download."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.rows = rows
        root = Path(lmms_eval.__file__).parent / "tasks"
        config = load_yaml_config(str(root / FILES[name]))
        config.pop("process_docs", None)  # GQA's downloads the pictures
        super().__init__(config=config)

    def download(self, dataset_kwargs: Any = None) -> None:
        rows = datasets.Dataset.from_list(self.rows)
        self.dataset = datasets.DatasetDict({self.config.test_split: rows})
        self.dataset_no_image = self.dataset

    def results(self, row: dict[str, Any], answer: str) -> dict[str, Any]:
        """By metric, as its evaluator has them: filters, then the task's own results."""
        asked = {"task": self.config.task, "doc_id": 0, "repeats": 1}
        instance = Instance("generate_until", (), 0, metadata=asked, resps=[answer])
        (filters,) = self._filters
        filters.apply([instance], [row])
        done: dict[str, Any] = self.process_results(row, [instance.filtered_resps[filters.name]])
        return done

    def score(self, row: dict[str, Any], answer: str) -> float:
        value = next(v for k, v in self.results(row, answer).items() if k != "submission")
        return float(value["score"] if isinstance(value, dict) else value)


def fresh(row: dict[str, Any]) -> dict[str, Any]:
    """A copy: TextVQA's scorer changes the answers of the row that it is given."""
    return {k: list(v) if isinstance(v, list) else v for k, v in row.items()}


@pytest.fixture(scope="module", params=BENCHMARKS)
def benchmark(request: pytest.FixtureRequest) -> tuple[str, Task, list[Case]]:
    made = cases(request.param, ANSWERS)
    return request.param, Task(request.param, [row for _, row, _ in made]), made


def test_prompts_are_those_of_lmms_eval(benchmark: tuple[str, Task, list[Case]]) -> None:
    name, theirs, made = benchmark
    ours = PROTOCOLS["lmms-eval"].tasks[name]
    for question, row, _ in made:
        assert ours.prompt(question) == theirs.doc_to_text(fresh(row))


def test_answers_end_where_lmms_eval_ends_them(benchmark: tuple[str, Task, list[Case]]) -> None:
    name, theirs, _ = benchmark
    ours = PROTOCOLS["lmms-eval"].tasks[name]
    settings = dict(theirs.config.generation_kwargs)
    assert tuple(settings["until"]) == ours.stop
    if name == "textvqa":
        assert settings == {"until": ["ASSISTANT:"]}, "it names a limit now: take it"
    else:
        assert settings["max_new_tokens"] == ours.max_new_tokens
        assert not settings["do_sample"] and settings["temperature"] == 0


def test_scores_are_those_of_lmms_eval(benchmark: tuple[str, Task, list[Case]]) -> None:
    name, theirs, made = benchmark
    ours = PROTOCOLS["lmms-eval"].tasks[name]
    scores = []
    for question, row, answer in made:
        expected = theirs.score(fresh(row), answer)
        found = ours.score(question, answer)
        assert found == pytest.approx(expected, abs=1e-12), (question, answer)
        scores.append(expected)
    right, wrong = sum(s > 0 for s in scores), sum(s == 0 for s in scores)
    assert len(scores) == ANSWERS and min(right, wrong) >= 50, (right, wrong)


def test_every_broken_answer_scores_as_in_lmms_eval(
    benchmark: tuple[str, Task, list[Case]],
) -> None:
    name, theirs, made = benchmark
    ours = PROTOCOLS["lmms-eval"].tasks[name]
    for i, answer in enumerate(BROKEN):
        question, row, _ = made[i]
        expected = theirs.score(fresh(row), answer)
        assert ours.score(question, answer) == pytest.approx(expected, abs=1e-12), answer


def without_answer(text: str) -> str:
    return text.strip().removeprefix("Answer: ")


# Where the authors' protocol scores as lmms-eval does -> what it does to the answer before.
CASA = {
    "chartqa": without_full_stop,
    "ocrbench": without_full_stop,
    "textvqa": str,
    "ai2d": without_answer,
    "gqa": str,
    "mme": str,
}


@pytest.mark.parametrize("name", CASA)
def test_the_authors_protocol_scores_with_the_same_functions(name: str) -> None:
    made = cases(name, ANSWERS)
    theirs = Task(name, [row for _, row, _ in made])
    ours = PROTOCOLS["casa"].tasks[name]
    for question, row, answer in made:
        expected = theirs.score(fresh(row), CASA[name](answer))
        assert ours.score(question, answer) == pytest.approx(expected, abs=1e-12), (
            question,
            answer,
        )


@pytest.mark.parametrize("name", ["docvqa", "infovqa"])
def test_anls_star_is_the_anls_of_lmms_eval_on_answers_in_plain_words(name: str) -> None:
    """They differ in what counts as length: spaces at an end or in a row, letters whose capitals
    are two. Without those they are one.
    """
    made = cases(name, ANSWERS)
    theirs = Task(name, [row for _, row, _ in made])
    ours = PROTOCOLS["casa"].tasks[name]
    compared = 0
    for question, row, answer in made:
        texts = (answer := without_full_stop(answer), *question.references)
        if any(t != " ".join(t.split()) or len(t.upper()) != len(t.lower()) for t in texts):
            continue
        compared += 1
        expected = theirs.score(fresh(row), answer)
        assert ours.score(question, answer) == pytest.approx(expected, abs=1e-12), answer
    assert compared >= 200


def test_totals_are_those_of_lmms_eval(
    benchmark: tuple[str, Task, list[Case]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, theirs, _ = benchmark
    made = cases(name, 1000)
    ours = PROTOCOLS["lmms-eval"].tasks[name]
    questions = [question for question, _, _ in made]
    total = ours.total(questions, [ours.score(q, answer) for q, _, answer in made])
    by_metric: dict[str, list[Any]] = {}
    for _, row, answer in made:
        for metric, value in theirs.results(fresh(row), answer).items():
            by_metric.setdefault(metric, []).append(value)
    if name == "ocrbench":
        utils = importlib.import_module("lmms_eval.tasks.ocrbench.utils")
        # It adds to a module's dict, so a second call would count on.
        monkeypatch.setattr(utils, "OCRBench_score", dict.fromkeys(utils.OCRBench_score, 0))
        results = by_metric["ocrbench_accuracy"]
        accuracy = utils.ocrbench_aggregate_accuracy(results, Namespace(output_path=str(tmp_path)))
        assert total["score"] == pytest.approx(1000 * accuracy, abs=1e-9)
        for kind, right in utils.OCRBench_score.items():
            assert total[kind] == pytest.approx(right)  # a hundred of each
    elif name == "mme":
        utils = importlib.import_module("lmms_eval.tasks.mme.utils")
        parts = {
            part: utils.mme_aggregate_results(by_metric[f"mme_{part}_score"])
            for part in ("perception", "cognition")
        }
        assert total["score"] == pytest.approx(sum(parts.values()))
        for part, points in parts.items():
            assert total[part] == pytest.approx(points)
    elif name == "chartqa":
        for part, metric in (("score", "overall"), ("human", "human_split")):
            expected = lmms_metrics.mean(by_metric[f"relaxed_{metric}"])
            assert total[part] == pytest.approx(100 * expected)
        augmented = lmms_metrics.mean(by_metric["relaxed_augmented_split"])
        assert total["augmented"] == pytest.approx(100 * augmented)
    else:
        (metric,) = (m for m in by_metric if m != "submission")
        assert total == pytest.approx({"score": 100 * lmms_metrics.mean(by_metric[metric])})


def test_short_answers_are_normalised_as_by_lmms_eval() -> None:
    """Each contraction, number and mark of its tables, and the broken answers."""
    module = importlib.import_module("lmms_eval.tasks._task_utils.vqa_eval_metric")
    theirs = module.EvalAIAnswerProcessor()
    contractions = [*theirs.CONTRACTIONS, *theirs.CONTRACTIONS.values()]
    marks = [
        text.format(m) for m in theirs.PUNCTUATIONS for text in ("a{0}b", "a{0} b", "{0}b c{0}d")
    ]
    texts = [*contractions, *theirs.NUMBER_MAP, *theirs.ARTICLES, *marks, *BROKEN]
    for text in texts:
        assert vqa_normalised(text) == theirs(text), text
    assert len(texts) > 400


def test_letters_are_chosen_as_by_lmms_eval() -> None:
    """Of several that are written in different ways, in sentences of its own phrases."""
    module = importlib.import_module("lmms_eval.tasks._task_utils.mcq_extract")
    forms = ("{0}", "({0})", "{0}.", "{0}:", "{0})", " {0} ", "x{0}", "{0}x", "{1}", '"{0}"')
    filler = (" ", ", ", ". ", " is wrong ", " and ", "\n", "!", " İ ", "")
    rng = random.Random(20260301)
    found = []
    for i in range(3000):
        parts = []
        for _ in range(rng.randint(1, 4)):
            letter = rng.choice("ABCDEF")
            phrase = rng.choice((*module._ANSWER_PHRASES, *("",) * 20))
            parts.append(phrase if i % 2 else phrase.capitalize())
            parts.append(rng.choice(filler))
            parts.append(rng.choice(forms).format(letter, letter.lower()))
            parts.append(rng.choice(filler))
        text = "".join(parts)
        expected = module.extract_mcq_answer(text, choices=["A", "B", "C", "D"])
        assert chosen_letter(text, "ABCD") == expected, text
        found.append(expected)
    assert set(found) == {"", *"ABCD"}
    for phrase in module._ANSWER_PHRASES:
        text = f"(A), but {phrase} Bx"  # a letter that only this phrase gives a rank
        assert chosen_letter(text, "ABCD") == module.extract_mcq_answer(text, list("ABCD"))


def test_a_letter_that_numpy_cuts_short_is_not_taken_for_another() -> None:
    """The one known difference: in lmms-eval's exact match the small form of the Turkish capital
    I with a dot, which is two characters, is cut to the width of one and is then an i.
    """
    theirs = lmms_metrics.exact_match_fn(
        predictions=["İ"], references=["i"], ignore_case=True, ignore_punctuation=True
    )
    assert theirs["exact_match"] == 1.0
    assert exact_match_without_punctuation(["i"], "İ") == 0.0
