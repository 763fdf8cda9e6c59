"""Benchmarks at the validations of a run: what is asked, on how many ranks, and what is refused."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from casa_train.config.bounds import Choice, leaves
from casa_train.config.compose import compose_config
from casa_train.config.schema import BENCHMARKS as NAMES
from casa_train.config.schema import Config
from casa_train.data.processor import build_processor
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.command import run_benchmarks
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.request import Request
from casa_train.evaluate.benchmarks.while_training import AskedBenchmark, open_benchmarks
from casa_train.evaluate.measured import Measured, open_measured
from casa_train.evaluate.validation import Best, Validator, line
from casa_train.metrics.fields import scalars
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.training.state import Progress
from tests.helpers.benchmark_copies import file_of, picture, rows_of, write_benchmark
from tests.helpers.commands import TINY, on_data, run, train_command
from tests.helpers.tiny_run import Lines


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    write_benchmark(folder, "chartqa", 12)
    write_benchmark(folder, "mme", 12)
    return folder


def config_of(data: Path, benchmarks: str, *more: str) -> Config:
    settings = ["data.validation=null", "evaluation.every=4", "evaluation.max_new_tokens=24"]
    benchmarks = f"evaluation.benchmarks={{{benchmarks}}}"
    return compose_config(["+experiment=demo", *TINY, *on_data(data), *settings, benchmarks, *more])


def asked_of(data: Path, benchmarks: str, *more: str) -> AskedBenchmark:
    config = config_of(data, benchmarks, *more)
    (asked,) = open_benchmarks(config, build_processor(config), Ranks())
    return asked


class Scripted:
    """A model that says what a script has for the question, then its end; it counts its passes.

    :param script: words of a question -> the answer.
    """

    def __init__(self, processor: CasaProcessor, script: Mapping[str, str]) -> None:
        self.processor, self.script = processor, script
        self.calls = 0
        self.pictures: list[tuple[int, ...]] = []
        self._said: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        tokenizer = self.processor.tokenizer
        if "pixel_values" in inputs:
            assert len(inputs["pixel_values"]) == len(input_ids)
            self.pictures += [tuple(pixels.shape[1:]) for pixels in inputs["pixel_values"]]
            self._said, self._at = [self._answer(ids) for ids in input_ids.tolist()], 0
        self.calls += 1
        logits = torch.zeros(len(input_ids), 1, len(tokenizer))
        for row, said in enumerate(self._said):
            logits[row, 0, said[min(self._at, len(said) - 1)]] = 1
        self._at += 1
        return SimpleNamespace(logits=logits)

    def _answer(self, ids: list[int]) -> list[int]:
        text = self.processor.decode(ids, skip_special_tokens=True)
        said = next(answer for words, answer in self.script.items() if words in text)
        end = self.processor.answer_end_token
        assert end is not None
        return [*self.processor.tokenizer.encode(said, add_special_tokens=False), end]


class Exchange(Ranks):
    """Ranks that are threads."""

    def __init__(self, rank: int, world: int, meeting: threading.Barrier, table: list[Any]) -> None:
        super().__init__(rank, world)
        object.__setattr__(self, "meeting", meeting)
        object.__setattr__(self, "table", table)

    def gather(self, value: Any) -> list[Any]:
        meeting, table = self.meeting, self.table  # type: ignore[attr-defined]
        table[self.rank] = value
        meeting.wait(20)
        found = list(table)
        meeting.wait(20)
        return found


def on_ranks(world: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What each of the ranks returns."""
    meeting, table = threading.Barrier(world), [None] * world
    results: list[Any] = [None] * world

    def one(rank: int) -> None:
        try:
            results[rank] = work(Exchange(rank, world, meeting, table))
        except BaseException:
            meeting.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def colours(count: int = 12) -> dict[str, str]:
    """Right answers, but that every fourth is wrong and of another length."""
    rows = rows_of("chartqa", count)
    return {
        row["question"]: "no colour at all" if i % 4 == 3 else row["answer"]
        for i, row in enumerate(rows)
    }


def test_the_configuration_knows_all_benchmarks_and_protocols() -> None:
    assert NAMES == BENCHMARKS
    (kind,) = [leaf.kind for leaf in leaves(Config) if leaf.name.endswith("benchmarks.*.protocol")]
    assert isinstance(kind, Choice) and kind.words == tuple(PROTOCOLS)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_questions_and_make_the_same_passes(
    data_dir: Path, copies: Path, world: int
) -> None:
    asked = f"chartqa: {{source: {copies}, samples: 10}}"
    more = ["evaluation.questions=3", "data.text_tokens=200"]
    alike = [asked_of(data_dir, asked, *more) for _ in range(world)]

    def work(ranks: Ranks) -> Any:
        benchmark = alike[ranks.rank]
        model = Scripted(benchmark.decoder.processor, colours())
        beats: list[int] = []
        record = benchmark.measure(model, ranks, lambda: beats.append(1))
        return record, model.calls, len(beats), benchmark

    found = on_ranks(world, work)
    record, calls, beats, benchmark = found[0]
    assert len(benchmark.batches) % 3 and len(benchmark.batches) % 2  # some rank has one less
    assert {one[1] for one in found} == {calls} and beats == -(-len(benchmark.batches) // world)
    assert calls < beats * 24  # they leave off when all answers have ended
    indices = benchmark.benchmark.rows
    right = sum(index % 4 != 3 for index in indices)
    assert 0 < right < 10 and record["score"] == 100 * right / 10
    assert record["questions"] == 10 and record["unreadable"] == record["over_budget"] == 0
    assert record["max_new_tokens"] == 24 and record["protocol"] == "casa"
    assert record["revision"] == benchmark.benchmark.revision
    answers = record["answers"]
    assert [a["index"] for a in answers] == [indices[0], indices[3], indices[6]]
    for answer in answers:
        assert answer["answer"] == colours()[answer["question"]]
        assert answer["id"] == f"chartqa/{answer['index']}"
        assert answer["score"] == float(answer["index"] % 4 != 3)
    alone = work(Ranks())[0]
    assert {k: v for k, v in record.items() if k != "seconds"} == {
        k: v for k, v in alone.items() if k != "seconds"
    }


def test_pictures_are_as_large_as_the_protocol_has_them(data_dir: Path, tmp_path: Path) -> None:
    rows = rows_of("chartqa", 3)
    rows[0]["image"] = file_of(picture("red", 28 * 40, 28 * 40))  # 1,600 tokens; 1,024 at 896
    write_benchmark(tmp_path, "chartqa", rows=rows)
    more = ["data.max_pixels=3136", "data.image_tokens=2000"]
    for protocol, largest in (("casa", (896, 896)), ("lmms-eval", (56, 56))):
        asked = f"chartqa: {{source: {tmp_path}, protocol: {protocol}}}"
        benchmark = asked_of(data_dir, asked, *more)
        model = Scripted(benchmark.decoder.processor, colours())
        benchmark.measure(model, Ranks())
        assert max(model.pictures) == largest, protocol
    # A pack that does not hold it leaves the question out, and says so.
    benchmark = asked_of(data_dir, f"chartqa: {{source: {tmp_path}}}", "data.image_tokens=1000")
    assert "left out: 1 more than a pack holds" in benchmark.describe()[-1]
    record = benchmark.measure(Scripted(benchmark.decoder.processor, colours()), Ranks())
    assert (record["questions"], record["over_budget"], record["unreadable"]) == (2, 1, 0)
    assert record["score"] == 100


def test_pictures_that_cannot_be_read_are_counted(data_dir: Path, tmp_path: Path) -> None:
    rows = rows_of("chartqa", 5)
    whole = rows[1]["image"]["bytes"]
    rows[1]["image"] = file_of(whole[: len(whole) - 40])  # its header is whole
    rows[2]["image"] = file_of(b"no picture")
    write_benchmark(tmp_path, "chartqa", rows=rows)
    benchmark = asked_of(data_dir, f"chartqa: {{source: {tmp_path}}}")
    assert "left out: 1 picture unreadable" in benchmark.describe()[-1]
    record = benchmark.measure(Scripted(benchmark.decoder.processor, colours()), Ranks())
    assert (record["questions"], record["unreadable"]) == (3, 2)
    assert record["score"] == pytest.approx(100 * 2 / 3)
    text = line({"step": 3, "benchmarks": {"chartqa": record}, "seconds": 1.0})
    assert text == (
        "validation of step 3: chartqa 66.7 of 3 questions (2 pictures could not be read); 1.0 s"
    )
    # Gone after the start: no reason to end a run.
    benchmark.benchmark = replace(benchmark.benchmark, pictures=[{"image": None}] * 5)
    record = benchmark.measure(Scripted(benchmark.decoder.processor, colours()), Ranks())
    assert record["score"] is None and (record["questions"], record["unreadable"]) == (0, 5)
    text = line({"step": 3, "benchmarks": {"chartqa": record}, "seconds": 1.0})
    assert "chartqa not scored of 0 questions" in text


def test_the_smaller_limit_on_an_answer_holds(data_dir: Path, copies: Path) -> None:
    for protocol, limit, ruled in (
        ("casa", 24, "24 new tokens each (evaluation.max_new_tokens; the protocol allows 128)"),
        (
            "lmms-eval",
            16,
            "16 new tokens each (the protocol's; evaluation.max_new_tokens allows 24",
        ),
    ):
        asked = f"mme: {{source: {copies}, samples: 4, protocol: {protocol}}}"
        benchmark = asked_of(data_dir, asked)
        assert benchmark.decoder.max_new_tokens == limit
        warning, said = benchmark.describe()
        assert "12 rows; 2,374 are published" in warning
        assert ruled in said and f"protocol {protocol}: 4 questions in " in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.benchmarks={chart: {}}", "evaluation.benchmarks.chart is no benchmark; .*mme"),
        (
            "evaluation.benchmarks={mme: {samples: 0}}",
            "evaluation.benchmarks.mme.samples is 0; expected at least 1",
        ),
        (
            "+evaluation.benchmarks.mme.protocol=kyutai",
            "evaluation.benchmarks.mme.protocol is 'kyutai'; expected casa or lmms-eval",
        ),
        ("evaluation.benchmarks={mme: {sample: 3}}", "evaluation.benchmarks.mme.sample"),
        (
            "evaluation.benchmarks={mme: {source: 's3://b/c'}}",
            "evaluation.benchmarks.mme.source is 's3://b/c', a URL",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(data_dir: Path, override: str, message: str) -> None:
    overrides = ["+experiment=demo", *TINY, *on_data(data_dir), "evaluation.every=5"]
    with pytest.raises(UserError, match=message):
        compose_config([*overrides, override])


def test_benchmarks_need_validations_and_have_no_best(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"evaluation.benchmarks is \['mme'\].*evaluation.every=0"):
        config_of(data_dir, "mme: {}", "evaluation.every=0")
    with pytest.raises(UserError, match=r"export.best is True; .*benchmarks alone have none"):
        config_of(data_dir, "mme: {}", "export.best=true")
    config = config_of(data_dir, "mme: {}")
    config.evaluation.benchmarks = {}
    assert open_measured(config, build_processor(config), Ranks()) is None


def test_a_source_that_cannot_be_used_ends_the_start_by_name(
    data_dir: Path, copies: Path, tmp_path: Path
) -> None:
    field = r"evaluation\.benchmarks\.docvqa"
    with pytest.raises(UserError, match=rf"^{field}: source=/.* holds no copy of lmms-lab/DocVQA"):
        asked_of(data_dir, f"docvqa: {{source: {copies}}}")
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in rows_of("chartqa")]
    write_benchmark(tmp_path, "chartqa", rows=rows)
    with pytest.raises(UserError) as refused:
        asked_of(data_dir, f"chartqa: {{source: {tmp_path}}}")
    assert str(refused.value).startswith("evaluation.benchmarks.chartqa: chartqa: ")
    assert str(refused.value).endswith("name the right copy with source=DIR.")
    with pytest.raises(UserError, match=r"^evaluation\.benchmarks\.chartqa: nothing can be scored"):
        asked_of(data_dir, f"chartqa: {{source: {copies}}}", "data.text_tokens=30")


class Engine:
    """A model that is not trained, and whether it was in eval mode."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward, self.on = forward, False

    def forward(self, **inputs: Any) -> Any:
        assert self.on
        torch.rand(1)  # as a model with dropout
        return self._forward(**inputs)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        self.on = True
        yield
        self.on = False


def validator(
    config: Config, path: Path, lines: list[str], records: list[Any] | None = None
) -> tuple[Validator, Scripted]:
    processor = build_processor(config)
    measured = open_measured(config, processor, Ranks())
    assert measured is not None
    model = Scripted(processor, colours() | {"Is it": "yes"})
    told: list[Any] = [] if records is None else records
    sinks = Lines(lines)
    sinks.validated = told.append  # type: ignore[method-assign]
    best = Best()
    return Validator(config, Ranks(), Engine(model.__call__), measured, path, sinks, best), model


def test_a_run_that_goes_on_compares_only_what_is_the_same(
    data_dir: Path, copies: Path, tmp_path: Path
) -> None:
    path, lines, records = tmp_path / "validation.jsonl", [], []
    two = f"chartqa: {{source: {copies}}}, mme: {{source: {copies}, samples: 6}}"
    before = torch.get_rng_state()
    first, _ = validator(config_of(data_dir, two), path, lines, records)
    first.begin(Progress(step=0))
    assert lines[0].startswith("validation every 4 steps: benchmarks alone, so no step is the best")
    torch.manual_seed(7)
    drawn = torch.get_rng_state()
    assert [first.after_step({"step": step}) for step in (3, 4)] == [False, False]
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.set_rng_state(before)
    first.close(None)
    (record,) = read_metrics(path)
    assert record == json.loads(json.dumps(records[0]))
    assert list(record["benchmarks"]) == ["chartqa", "mme"]
    assert "loss" not in record and (record["best_step"], record["best_loss"]) == (0, None)
    assert record["benchmarks"]["mme"]["score"] > 0
    assert re.search(
        r"^validation of step 4: chartqa 75.0 of 12 questions, mme \S+ of 6 questions; \S+ s$",
        lines[-1],
    )
    named = scalars({"validation": record})
    assert named["validation/benchmarks/chartqa/score"] == 75
    assert named["validation/benchmarks/mme/sub_scores/perception"] > 0
    # The same again: nothing is owed.
    again, model = validator(config_of(data_dir, two), path, lines)
    again.begin(Progress(step=4))
    assert model.calls == 0 and not any("otherwise" in text for text in lines)
    again.close(None)
    # Another picture is another revision: said, and measured again.
    rows = rows_of("chartqa", 12)
    rows[5]["image"] = file_of(picture("green", 112, 56, mark=9))
    write_benchmark(tmp_path, "chartqa", rows=rows)
    write_benchmark(tmp_path, "mme", 12)
    moved = f"chartqa: {{source: {tmp_path}}}, mme: {{source: {tmp_path}, samples: 6}}"
    lines.clear()
    other, model = validator(config_of(data_dir, moved), path, lines)
    other.begin(Progress(step=4))
    other.close(None)
    assert any("chartqa was measured otherwise before" in text for text in lines)
    assert model.calls > 0
    (newest,) = read_metrics(path)
    assert newest["benchmarks"]["mme"]["digest"] == record["benchmarks"]["mme"]["digest"]
    for key in ("digest", "revision"):
        assert newest["benchmarks"]["chartqa"][key] != record["benchmarks"]["chartqa"][key]


def test_records_without_benchmarks_are_not_whole(data_dir: Path, copies: Path) -> None:
    asked = asked_of(data_dir, f"chartqa: {{source: {copies}}}")
    measured = Measured(None, [asked])
    assert measured.loss_compares({"samples_digest": None})
    assert not measured.whole({"samples_digest": None})
    assert not measured.whole({"samples_digest": "x", "benchmarks": {"chartqa": vars(asked)}})
    assert measured.whole({"samples_digest": None, "benchmarks": {"chartqa": vars(asked)}})
    shorter = asked_of(data_dir, f"chartqa: {{source: {copies}}}", "evaluation.max_new_tokens=9")
    assert measured.others({"benchmarks": {"chartqa": vars(shorter), "mme": {}}}) == ["chartqa"]


@pytest.mark.slow
def test_the_export_of_a_step_gives_the_answers_of_its_validation(
    data_dir: Path, copies: Path, tmp_path: Path
) -> None:
    where = tmp_path / "run"
    names = ("chartqa", "mme")
    asked = ", ".join(f"{name}: {{source: {copies}, samples: 8}}" for name in names)
    overrides = [
        *("+experiment=demo", *TINY, *on_data(data_dir), "data.validation=null"),
        *("data.text_tokens=640", "trainer.steps=80", "evaluation.every=80"),
        *("evaluation.max_new_tokens=200", "evaluation.questions=99", "metrics.tensorboard=false"),
        *("optim.groups.backbone.lr=0.003", "optim.groups.fusion.lr=0.003"),
        *("optim.warmup_steps=4", f"evaluation.benchmarks={{{asked}}}", f"run_dir={where}"),
    ]
    said = run(train_command(overrides)).stdout
    assert "chartqa, protocol casa: 8 questions in" in said and "the best so far" not in said
    run([*train_command([])[:2], "casa_train.export", str(where), "--out", str(tmp_path / "out")])
    (record,) = read_metrics(where / "validation.jsonl")
    out = tmp_path / "answers"
    request = Request(tmp_path / "out", names, "casa", copies, out, samples=8, batch_size=3)
    result = run_benchmarks(request, Ranks())
    for name in names:
        ours, theirs = record["benchmarks"][name], result["benchmarks"][name]
        assert ours["score"] == theirs["score"] and ours["revision"] == theirs["revision"]
        lines = [json.loads(text) for text in (out / f"{name}.jsonl").read_text().splitlines()]
        expected = {one["index"]: one["answer"] for one in lines}
        assert {one["index"]: one["answer"] for one in ours["answers"]} == expected
        assert len(expected) == 8
        assert any(expected.values())  # not a model that only ends its answers
