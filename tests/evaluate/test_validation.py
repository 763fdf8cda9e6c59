"""Validation during training: what is measured, by which numbers, and that training is the same."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from casa_train.config.compose import compose_config
from casa_train.config.data_schema import SourceConfig
from casa_train.config.schema import Config
from casa_train.data.processor import build_processor
from casa_train.data.sample import Sample
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate import validation
from casa_train.evaluate.held_out import HeldOut, answer_spans, open_held_out, score
from casa_train.evaluate.measured import Measured
from casa_train.evaluate.questions import Questions
from casa_train.evaluate.shares import source_labels, spread
from casa_train.evaluate.validation import Best, Validator
from casa_train.modeling.modeling_casa import CasaForConditionalGeneration
from casa_train.modeling.processing_casa import CasaProcessor
from casa_train.setup.model import build_model, build_model_config
from casa_train.setup.weights import find_weights, open_sources, start_weights
from casa_train.training.state import Progress
from data_recipes.__main__ import main as recipes
from tests.helpers.benchmark_copies import write_benchmark
from tests.helpers.commands import TEMPLATE, TINY, on_data, run
from tests.helpers.tiny import randomise
from tests.helpers.told_ranks import Told
from tests.helpers.validation_steps import CASES

CPU = torch.device("cpu")


def tiny_config(data: Path, *more: str) -> Config:
    settings = ["evaluation.every=4", "evaluation.loss_samples=20"]
    return compose_config(["+experiment=demo", *TINY, *on_data(data), *settings, *more])


def held_out(config: Config, world: int = 1) -> tuple[CasaProcessor, HeldOut]:
    processor = build_processor(config)
    found = open_held_out(config, processor, world)
    assert found is not None
    return processor, found


def build(config: Config, processor: CasaProcessor) -> CasaForConditionalGeneration:
    """The configuration's model with random weights."""
    sources = open_sources(config)
    model = build_model(config, processor, build_model_config(config, processor, sources))
    start = find_weights(model, sources)
    start_weights(model, start, 0, CPU, torch.float32, lambda block: None)
    randomise(model, torch.Generator().manual_seed(0))
    return model


def overfit(model: CasaForConditionalGeneration, found: HeldOut, steps: int) -> None:
    """Trains on the held-out samples themselves, until some of the answers are right."""
    batches = [found.materializer[pack] for pack in found.packs if pack.items]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(steps):
        for batch in batches:
            loss = torch.nn.functional.cross_entropy(
                model(packed=batch.inputs).logits, batch.targets
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval()


def generated_exactly(
    model: CasaForConditionalGeneration, processor: CasaProcessor, sample: Sample, turn: int
) -> bool:
    """Whether greedy generation after the true history writes the turn's answer and ends it."""
    messages = sample.messages(list(sample.images))[: 2 * turn + 1]
    batch = processor.tokenize_messages([messages])
    wanted = processor.tokenizer.encode(sample.turns[turn].assistant, add_special_tokens=False)
    wanted.append(processor.asst_end_tokens[0])
    out = model.generate_from_image(**batch, max_new_tokens=len(wanted), do_sample=False)
    return bool(out[0, batch["input_ids"].shape[1] :].tolist() == wanted)


# What follows the end token is never generated, so it must not count.
@pytest.mark.parametrize("end", ["<|end|>", "<|end|>\n"])
def test_exact_match_is_what_generation_would_write(
    data_dir: Path, tmp_path: Path, end: str
) -> None:
    fields = json.dumps({**TEMPLATE, "assistant_end": end})
    command = ["retokenize", "--data", str(data_dir), "--out", str(tmp_path), "--workers", "1"]
    assert recipes([*command, "--tokenizer", f"{data_dir}/tokenizer", "--template", fields]) == 0
    config = tiny_config(tmp_path, "evaluation.loss_samples=12")
    config.model.template.assistant_end = end
    processor, found = held_out(config)
    model = build(config, processor)
    overfit(model, found, steps=9)
    expected = answered_exactly(found, model, processor)
    every = [right for samples in expected.values() for turns in samples for right in turns]
    assert max(len(turns) for samples in expected.values() for turns in samples) > 1
    assert 0 < sum(every) < len(every)
    compare(score(found, model, Ranks()), expected)
    # The last answers alone, of the same samples.
    config.evaluation.ask = "last"
    _, last = held_out(config)
    assert last.digest != found.digest and not last.left_out
    assert [pack.items for pack in last.packs] == [pack.items for pack in found.packs]
    expected = {source: [turns[-1:] for turns in own] for source, own in expected.items()}
    compare(score(last, model, Ranks()), expected)


def answered_exactly(
    found: HeldOut, model: CasaForConditionalGeneration, processor: CasaProcessor
) -> dict[str, list[list[bool]]]:
    """By source, in the order of its rows, which turns of each sample generation gets right."""
    by_source: dict[str, list[list[bool]]] = {}
    items = sorted((name, row) for pack in found.packs for name, row, _, _ in pack.items)
    for name, row in items:  # later turns are asked after the true history
        sample = found.splits[name].read(row)
        turns = range(len(sample.turns))
        exact = [generated_exactly(model, processor, sample, turn) for turn in turns]
        by_source.setdefault(sample.source, []).append(exact)
    return by_source


def compare(scores: dict[str, Any], expected: dict[str, list[list[bool]]]) -> None:
    """Exact matches, counts and hits."""
    assert scores["sources"].keys() == scores["hits"].keys() == expected.keys()
    whole = [right for samples in expected.values() for turns in samples for right in turns]
    assert scores["answers"] == len(whole)
    assert scores["exact_match"] == sum(whole) / len(whole)
    for source, samples in expected.items():
        own = [right for turns in samples for right in turns]
        assert scores["sources"][source]["answers"] == len(own)
        assert scores["sources"][source]["exact_match"] == sum(own) / len(own)
        assert scores["hits"][source] == "".join("01"[right] for right in own)


def test_loss_is_the_mean_over_answer_tokens_of_samples_alone(data_dir: Path) -> None:
    processor, found = held_out(tiny_config(data_dir))
    model = build(tiny_config(data_dir), processor).eval()
    _, last = held_out(tiny_config(data_dir, "evaluation.ask=last"))
    for one in (found, last):
        sums: dict[str, list[float]] = {}
        for pack in one.packs:
            for item in pack.items:
                batch = one.materializer[type(pack)(0, (item,), item[2], item[3])]
                with torch.no_grad():
                    logits = model(packed=batch.inputs).logits
                tokens = len(batch.targets)
                if one is last:  # its own words, and the token that ends them
                    answer = one.splits[item[0]].read(item[1]).turns[-1].assistant
                    tokens = len(processor.tokenizer.encode(answer, add_special_tokens=False)) + 1
                loss = torch.nn.functional.cross_entropy(
                    logits[-tokens:], batch.targets[-tokens:], reduction="sum"
                )
                sums.setdefault(batch.sources[0], []).append(float(loss))
                sums.setdefault(f"{batch.sources[0]} tokens", []).append(tokens)
        scores = score(one, model, Ranks())
        assert len(scores["sources"]) == 7
        for source, measured in scores["sources"].items():
            total = sum(sums[f"{source} tokens"])
            assert measured["answer_tokens"] == total
            assert measured["loss"] == pytest.approx(sum(sums[source]) / total, rel=1e-5)
    assert scores["answer_tokens"] < score(found, model, Ranks())["answer_tokens"]
    scores = score(found, model, Ranks())
    total = sum(s["loss"] * s["answer_tokens"] for s in scores["sources"].values())
    assert scores["loss"] == pytest.approx(total / scores["answer_tokens"], rel=1e-9)
    # Ranks that share the packs out, one of them an empty one, get the same numbers.
    _, shared = held_out(tiny_config(data_dir), world=4)
    assert len(shared.packs) % 4 == 0 and not shared.packs[-1].items
    parts: list[Any] = []
    for rank in range(4):
        score(shared, model, Told(rank, 4, parts))
    assert score(shared, model, Told(0, 4, [], parts)) == scores


def test_numbers_that_are_not_finite_are_none(data_dir: Path) -> None:
    processor, found = held_out(tiny_config(data_dir))
    model = build(tiny_config(data_dir), processor).eval()
    model.lm_head.weight.data[:] = math.nan
    scores = score(found, model, Ranks())
    assert scores["loss"] is None and scores["exact_match"] == 0
    best = Best()
    assert not best.takes(4, scores["loss"])
    assert best.takes(8, 2.0) and not best.takes(12, 2.0) and best.takes(16, 1.0)
    assert (best.step, best.loss) == (16, 1.0)


@pytest.mark.parametrize("ask", ["every", "last"])
def test_bad_samples_are_counted(data_dir: Path, ask: str) -> None:
    _, found = held_out(tiny_config(data_dir, f"evaluation.ask={ask}"))
    model = build(tiny_config(data_dir), build_processor(tiny_config(data_dir))).eval()
    whole = score(found, model, Ranks())["hits"]
    # A conversation of several turns behind another one of its source.
    rows = sorted(item[1] for pack in found.packs for item in pack.items)
    split = found.splits["synthetic"]
    read = split.read
    samples = {row: read(row) for row in rows}
    sources = [samples[row].source for row in rows]
    place = next(
        i for i, row in enumerate(rows) if len(samples[row].turns) > 1 and sources[i] in sources[:i]
    )
    broken, source = rows[place], sources[place]

    def sometimes(row: int, with_images: bool = True) -> Sample:
        sample = read(row, with_images)
        if row == broken:
            object.__setattr__(sample, "images", tuple(b"no image" for _ in sample.images))
        return sample

    split.read = sometimes  # type: ignore[method-assign]
    scores = score(found, model, Ranks())
    assert scores["bad_samples"] == 1 and scores["loss"] is not None
    turns = [1 if ask == "last" else len(samples[row].turns) for row in rows]
    start = sum(n for n, s in zip(turns[:place], sources, strict=False) if s == source)
    end = start + turns[place]
    marks = whole[source]
    expected = {**whole, source: marks[:start] + "-" * turns[place] + marks[end:]}
    assert start > 0 and scores["hits"] == expected


def test_a_conversation_without_its_last_turn_is_not_measured_by_it(data_dir: Path) -> None:
    """With little room, trailing turns are cut off: what is last then is another question."""
    config = tiny_config(data_dir, "evaluation.loss_samples=200")
    _, roomy = held_out(config)
    split = roomy.splits["synthetic"]
    lengths = {item[1]: item[2] for pack in roomy.packs for item in pack.items}
    config.data.text_tokens = sorted(lengths.values())[len(lengths) // 2]
    whole = {row for row, text in lengths.items() if text < config.data.text_tokens}
    measured = {}
    for ask in ("every", "last"):
        config.evaluation.ask = ask
        _, narrow = held_out(config)
        measured[ask] = {item[1] for pack in narrow.packs for item in pack.items}
    cut = measured["every"] - whole
    assert cut and all(len(split.read(row).turns) > 1 for row in cut)
    assert measured["last"] == whole and narrow.left_out == len(cut)


@pytest.mark.parametrize(
    ("mechanism", "ask"),
    [("casa", "every"), ("casa", "last"), ("insertion", "last"), ("qformer_insertion", "every")],
)
def test_questions_are_answered_as_generate_answers_them(
    data_dir: Path, mechanism: str, ask: str
) -> None:
    settings = ["evaluation.max_new_tokens=6", f"evaluation.ask={ask}"]
    config = tiny_config(data_dir, f"fusion={mechanism}", *settings)
    processor, found = held_out(config)
    model = build(config, processor).eval()
    questions = Questions(found, processor, config)
    records = questions.answer(model, CPU)
    assert len(records) == 8 and not questions.skipped
    assert len({r["source"] for r in records}) == 7  # of every source at least one
    assert len({r["answer"] for r in records}) > 1
    for record in records:
        sample = found.splits[record["split"]].read(record["row"])
        assert record["id"] == f"synthetic/{sample.key}"
        messages = sample.messages(list(sample.images))
        asked = messages[: 1 if ask == "every" else -1]
        assert record["history"] == len(asked) // 2
        assert record["reference"] == sample.turns[len(asked) // 2].assistant
        batch = processor.tokenize_messages([asked])
        out = model.generate_from_image(**batch, max_new_tokens=6, do_sample=False)
        new = out[0, batch["input_ids"].shape[1] :]
        assert processor.decode(new, skip_special_tokens=True).strip() == record["answer"]
    assert any(record["history"] for record in records) == (ask == "last")
    assert processor.tokenizer.padding_side == "right"  # as training wants it


def test_a_run_that_goes_on_with_other_answers_says_so(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "validation.jsonl"
    logged: dict[str, str] = {}
    for ask in ("every", "last"):
        config = tiny_config(data_dir, f"evaluation.ask={ask}", "evaluation.questions=0")
        _, found = held_out(config)
        if ask == "every":
            record = {"step": 2, "loss": 1.5, "samples_digest": found.digest}
            path.write_text(json.dumps(record) + "\n")
        lines: list[str] = []
        sinks: Any = SimpleNamespace(log=lines.append)
        engine: Any = None  # step 3 owes no validation
        best = Best()
        validator = Validator(config, Ranks(), engine, Measured(found), path, sinks, best)
        validator.begin(Progress(step=3))
        validator.close(None)
        logged[ask] = "\n".join(lines)
        assert best.step == (2 if ask == "every" else 0)
    assert "other held-out answers were measured before" in logged["last"]
    assert "of each the last answer" in logged["last"] and "before" not in logged["every"]


def test_held_out_samples_that_one_rank_cannot_read_end_every_rank(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(data_dir, "evaluation.attention_while_training=2")
    _, found = held_out(config)
    given: list[Any] = []
    missing = "validation/shard-3.parquet cannot be read"

    def begin(rank: int) -> None:
        ranks = Told(rank, 2, given, [None, missing])
        sinks: Any = SimpleNamespace(log=lambda line: None)
        engine: Any = None
        path = tmp_path / "validation.jsonl"
        Validator(config, ranks, engine, Measured(found), path, sinks, Best()).begin(Progress())

    with pytest.raises(UserError, match=f"rank 1: {missing}"):
        begin(0)
    assert given == [None]

    def unreadable(*_: Any) -> None:
        raise UserError(missing)

    monkeypatch.setattr(validation, "WatchedSamples", unreadable)
    with pytest.raises(UserError, match=missing):
        begin(1)
    assert given == [None, missing]


def test_questions_over_a_pack_are_left_out(data_dir: Path) -> None:
    config = tiny_config(data_dir)
    processor, found = held_out(config)
    config.data.image_tokens = 9  # what two pictures together exceed
    questions = Questions(found, processor, config)
    assert questions.skipped["over_budget"] >= 1
    assert all(len(batch) == 1 for batch in questions._batches())


def test_answers_end_where_generation_ends() -> None:
    # Two answers, which end with the token 9, and one that no opening parts from the one before.
    places = [4, 5, 6, 20, 21, 22, 23]
    targets = [1, 2, 9, 5, 9, 3, 9]
    assert answer_spans(places, targets, 9) == [range(0, 3), range(3, 5), range(5, 7)]
    assert answer_spans(places, targets, None) == [range(0, 3), range(3, 7)]
    assert answer_spans([], [], 9) == []


def test_samples_are_spread_over_sources_and_over_each_source() -> None:
    groups = {"large": list(range(100)), "small": [7], "middle": list(range(50, 60))}
    chosen = spread(groups, 13)
    assert chosen == {
        "large": [0, 16, 33, 50, 66, 83],
        "small": [7],
        "middle": [50, 51, 53, 55, 56, 58],
    }
    assert sum(map(len, spread(groups, 1000).values())) == 111
    assert sum(map(len, spread(groups, 2).values())) == 2
    assert spread(groups, 0) == {"large": [], "small": [], "middle": []}


def test_sources_have_their_own_names() -> None:
    found = [
        ("demo", "colour"),
        ("demo", "shape"),
        ("chartqa", "charts"),
        ("b", "shape"),
        ("b", "x"),
    ]
    assert list(source_labels(found).values()) == [
        "colour",
        "demo/shape",
        "chartqa",
        "b/shape",
        "x",
    ]


def test_nothing_is_measured_unless_asked(data_dir: Path) -> None:
    config = tiny_config(data_dir, "evaluation.every=0")
    assert open_held_out(config, build_processor(config), 1) is None
    config = tiny_config(data_dir)
    config.data.validation = {}
    assert open_held_out(config, build_processor(config), 1) is None


def test_splits_that_cannot_be_used_are_named(data_dir: Path, tmp_path: Path) -> None:
    config = tiny_config(data_dir)
    config.data.validation = {"gone": SourceConfig(str(tmp_path / "gone"))}
    with pytest.raises(UserError, match=r"^data\.validation\.gone\.path: .* does not exist"):
        open_held_out(config, build_processor(config), 1)
    config = tiny_config(data_dir, "data.text_tokens=3")
    with pytest.raises(UserError, match="data.validation.*fits a pack of 3 text"):
        open_held_out(config, build_processor(config), 1)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.every=-1", "evaluation.every is -1"),
        ("evaluation.loss_samples=0", "evaluation.loss_samples is 0"),
        ("evaluation.ask=first", "evaluation.ask is 'first'; expected every or last"),
        ("export.every=3", "export.every is 3; expected 0 or a multiple of checkpoint.every = 500"),
        ("evaluation.every=0", "export.best is True; expected false where nothing is validated"),
    ],
)
def test_values_that_make_no_sense_are_refused(data_dir: Path, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(data_dir, "export.best=true", override)


def flat(tree: Any, name: str = "") -> dict[str, Any]:
    """The leaves of nested dicts and lists by their paths."""
    if isinstance(tree, dict | list):
        inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {n: leaf for key, t in inner for n, leaf in flat(t, f"{name}/{key}").items()}
    return {name: tree}


@pytest.mark.slow
def test_validation_on_two_ranks_disturbs_nothing(data_dir: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for name in ("chartqa", "mme"):
        write_benchmark(tmp_path / "copies", name, 12)
    arguments = [str(data_dir), str(tmp_path / "copies"), str(tmp_path / "runs")]
    done = run(
        [*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.validation_steps", *arguments]
    )
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [r["case"] for r in results] == list(CASES)
    for result in results:
        name = result["case"]
        for rank in result["same"]:
            assert all(rank.values()), (name, rank)
        assert [r["step"] for r in result["validated"]] == [2, 4], name
        assert result["packs"][0] % 2 == 1 and result["packs"][1] % 2 == 0  # one is empty
        found, expected = result["validated"][-1], result["expected"]
        # Sharded or not: bf16 weights of an engine are not rounded fp32 ones, so they differ more.
        tolerance = 2e-2 if "bf16" in name else 1e-6
        for one, other in [
            (found, expected),
            *((found["sources"][s], expected["sources"][s]) for s in expected["sources"]),
        ]:
            assert one["loss"] == pytest.approx(other["loss"], rel=tolerance), name
            assert one["answers"] == other["answers"]
            if "bf16" not in name:
                assert one["exact_match"] == other["exact_match"]
        if "bf16" not in name:
            assert found["questions"] == result["answers"], name
            assert found["hits"] == expected["hits"], name
            assert found["attention"] and result["attention"]
            assert flat(found["attention"]) == pytest.approx(flat(result["attention"]), abs=1e-6)
        assert any(batches % 2 for batches in result["batches"])  # a rank has one less
        for benchmark, other in result["benchmarks"].items():
            mine = found["benchmarks"][benchmark]
            assert mine["seconds"] > 0 and len(mine["answers"]) >= 4
            if "bf16" not in name:
                assert {**mine, "seconds": 0} == {**other, "seconds": 0}, name
