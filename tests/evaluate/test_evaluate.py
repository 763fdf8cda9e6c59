"""`evaluate`: which questions it asks, what its guess without images reads, its overrides."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from casa_train.config.compose import compose_config
from casa_train.data.prepared.shards import Split
from casa_train.evaluate import evaluation
from casa_train.evaluate.__main__ import main
from casa_train.evaluate.exact_match import (
    Question,
    best_guesses,
    held_out_questions,
    swapped_images,
    training_texts,
)
from casa_train.export.loading import load_model, load_processor
from casa_train.report.run_report import _pictures
from casa_train.run.configuration import load_run_config
from tests.helpers.commands import TINY, on_data
from tests.helpers.counting import FINGERPRINTS, texts_by
from tests.helpers.published import picture
from tests.helpers.tiny_export import write_tiny_export


def write(directory: Path, families: dict[str, int], answer: str = "yes") -> Split:
    """So many samples of each family, one after another, a text-only sample after each."""
    from tests.helpers.counting import ShardWriter

    writer = ShardWriter(directory, "finevision", texts_by(len), FINGERPRINTS, 7)
    for family, count in families.items():
        for i in range(count):
            for images in ([picture(30 + i)], []):
                key = f"{family}-{i}-{len(images)}"
                turn = {"user": f"{family} {i}?", "assistant": f"{answer} {i}"}
                assert writer.write(key, {"texts": [turn], "source": family}, images)
    writer.close()
    return Split(directory)


def ask(splits: dict[str, Split], limit: int, **limits: int) -> list[Question]:
    return held_out_questions(splits, {n: limits.get(n) for n in splits}, limit, Counter())


def test_questions_are_in_even_shares_of_all_sources(tmp_path: Path) -> None:
    splits = {
        "charts": write(tmp_path / "a", {"charts": 40}),
        "mixed": write(tmp_path / "b", {"charts": 5, "shapes": 30}),
    }
    asked = ask(splits, 25)
    shares = Counter((q.id.partition("/")[0], q.source) for q in asked)
    assert shares == {("charts", "charts"): 10, ("mixed", "shapes"): 10, ("mixed", "charts"): 5}
    places = [int(q.id.split("-")[1]) for q in asked if q.id.startswith("charts/")]
    assert places == list(range(0, 40, 4))  # from all over, not the first ones
    assert all(len(q.images) == 1 for q in asked)  # text-only samples are not asked
    assert len(ask(splits, 1000)) == 75
    # A split's limit holds here as it does in validations: the first 12 rows are 6 questions.
    assert len([q for q in ask(splits, 25, charts=12) if q.id.startswith("charts/")]) == 6


def write_talks(directory: Path, count: int) -> Split:
    """So many conversations: two pictures come one after the other, in the first turn a question
    about it; the last one asks about what was there, and every third sample shows nothing at all.
    """
    from tests.helpers.counting import ShardWriter

    writer = ShardWriter(directory, "finevision", texts_by(len), FINGERPRINTS, 7)
    for i in range(count):
        asked = ["<image>what is it?", "<image>and now?", f"what was before {i}?"]
        if i % 3 == 2:
            asked = [text.replace("<image>", "") for text in asked]
        said = ["red", "blue", f"word {i % 2}"]
        texts = [{"user": u, "assistant": a} for u, a in zip(asked, said, strict=True)]
        images = [picture(30 + 2 * i), picture(31 + 2 * i)] if i % 3 < 2 else []
        assert writer.write(f"talk-{i}", {"texts": texts, "source": "talk"}, images)
    writer.close()
    return Split(directory)


def test_the_last_turn_is_asked_after_the_true_ones_before_it(tmp_path: Path) -> None:
    split = write_talks(tmp_path / "a", 9)
    asked = held_out_questions({"a": split}, {"a": None}, 100, Counter(), last=True)
    shown = [sample for sample in split if sample.images]
    assert [q.id for q in asked] == [f"a/{sample.key}" for sample in shown] and len(asked) == 6
    for question, sample in zip(asked, shown, strict=True):
        assert question.images == sample.images and len(sample.images) == 2
        assert question.text.startswith("what was before") and question.reference[:5] == "word "
        whole = sample.messages(list(sample.images))
        assert question.messages(question.images) == whole[:-1] and len(whole) == 6
    for question, images in zip(asked, swapped_images(asked), strict=True):
        others = [q.images for q in asked if q is not question]
        assert images in others  # all of one other sample
    # What training answered last, not first.
    guesses, samples = best_guesses(list(split), asked, last=True)
    assert samples == 9 and guesses == [q.reference for q in asked]
    assert set(best_guesses(list(split), asked)[0]) == {"red"}
    assert held_out_questions({"a": split}, {"a": None}, 1, Counter())[0].reference == "red"


def test_a_question_that_cannot_be_read_is_counted(tmp_path: Path) -> None:
    split = write(tmp_path / "a", {"charts": 6})
    row = split.index.slice(2, 1).to_pylist()[0]
    with (split.directory / "shard-000000.tar").open("r+b") as file:
        file.seek(row["json_offset"])
        file.write(b"[1] ")
    skipped: Counter[str] = Counter()
    asked = held_out_questions({"a": Split(split.directory)}, {"a": None}, 100, skipped)
    assert len(asked) == 5 and skipped == {"unreadable_json": 1}


def test_the_guess_reads_texts_alone_and_a_sample_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {
        "large": write(tmp_path / "a", {"charts": 50, "maps": 50}),
        "small": write(tmp_path / "b", {"shapes": 4}),
    }
    questions = ask({"v": write(tmp_path / "v", {"charts": 3, "shapes": 3}, "no")}, 100)
    reads: list[int] = []
    read = Split._pread

    def counting(self: Split, shard: int, offset: int, size: int) -> bytes:
        reads.append(size)
        return read(self, shard, offset, size)

    monkeypatch.setattr(Split, "_pread", counting)
    limits = dict.fromkeys(trained)
    texts = list(training_texts(trained, limits, questions, limit=28))
    families = Counter(sample.source for sample in texts)
    assert families == {"charts": 20, "shapes": 8}  # what is asked comes first
    assert len(reads) == 28 and all(not image for s in texts for image in s.images)
    charts = [int(s.key.split("-")[1]) for s in texts if s.source == "charts"]
    assert charts[0] == 0 and charts[-1] == 47  # from all over

    more = list(training_texts(trained, limits, questions, limit=120))
    assert Counter(s.source for s in more) == {"charts": 100, "shapes": 8, "maps": 12}
    few = training_texts(trained, {"large": 10, "small": None}, questions, limit=1000)
    assert Counter(s.source for s in few) == {"charts": 10, "shapes": 8}
    guesses, samples = best_guesses(texts, questions)
    assert samples == 28
    assert guesses == ["yes 0", "yes 0", "yes 2", "yes 0", "yes 1", "yes 2"]


def make_run(directory: Path, data: Path, *more: str) -> Path:
    """A run directory as far as an evaluation looks at it, with an untrained export."""
    overrides = ["+experiment=demo", *TINY, *on_data(data), "evaluation.max_samples=6", *more]
    config = compose_config([*overrides, "evaluation.attention_samples=2"])
    write_tiny_export(directory / "export")
    (directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
    return directory


@pytest.fixture(scope="module")
def run_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("evaluate") / "a=run", data_dir)


def stored(run: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return result


def test_overrides_of_an_evaluation(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir)]) == 0
    plain = stored(run_dir)
    assert plain["questions"] == 6 and plain["overrides"] == []
    assert plain["guess"] is not None and plain["guess_samples"] == 240
    own = write(tmp_path / "own", {"charts": 9})
    changes = [
        "data.validation.synthetic=null",
        f"+data.validation.own.path={own.directory}",
        "evaluation.max_samples=5",
        "evaluation.attention_samples=0",
        "parallel.threads=2",
    ]
    assert main([str(run_dir), *changes]) == 0
    result = stored(run_dir)
    assert result["questions"] == 5 and result["attention"] is None
    assert {a["id"].partition("/")[0] for a in result["answers"]} == {"own"}
    assert result["overrides"] == changes
    assert result["validation"] == {"own": str(own.directory)}
    assert result["ask"] == "every" and {a["history"] for a in result["answers"]} == {0}
    talks = write_talks(tmp_path / "talks", 9)
    changes = ["data.validation.synthetic=null", f"+data.validation.own.path={talks.directory}"]
    assert main([str(run_dir), *changes, "evaluation.ask=last"]) == 0
    result = stored(run_dir)
    assert result["ask"] == "last" and result["questions"] == 6
    found = _pictures(load_run_config(run_dir), result)
    assert found == {f"own/{s.key}": list(s.images) for s in talks if s.images}
    # The export's own answer to the sample's messages up to the last one.
    model, processor = (
        load_model(run_dir / "export", "auto").eval(),
        load_processor(run_dir / "export"),
    )
    for record, sample in zip(result["answers"], (s for s in talks if s.images), strict=True):
        assert record["history"] == 2 and record["reference"] == sample.turns[2].assistant
        batch = processor.tokenize_messages([sample.messages(list(sample.images))[:-1]])
        out = model.generate_from_image(**batch, max_new_tokens=16, do_sample=False)
        new = out[0, batch["input_ids"].shape[1] :]
        assert record["answer"] == processor.decode(new, skip_special_tokens=True).strip()
    capsys.readouterr()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.steps=3", "'trainer.steps=3' says nothing to an evaluation"),
        ("evaluation.every=3", "'evaluation.every=3' says nothing to an evaluation"),
        ("data.validation", "expected NAME=VALUE"),
        ("data.validation.synthetic=null", "data.validation names no held-out split"),
        ("evaluation.max_samples=0", "evaluation.max_samples is 0; expected at least 1"),
        ("evaluation.max_samples=few", "evaluation.max_samples"),
        ("evaluation.ask=first", "evaluation.ask is 'first'; expected every or last"),
        ("data.validation.synthetic.paht=x", "paht"),
        ("data.validation.synthetic.path=/nowhere", "data.validation.synthetic.path: data direct"),
    ],
)
def test_other_overrides_are_refused_by_name(
    run_dir: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir), override]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("error: ") and "Traceback" not in error


def test_a_folder_of_ones_own_holds_groups_of_an_evaluation(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write(tmp_path / "own", {"charts": 9})
    folder = tmp_path / "conf" / "held_out"
    folder.mkdir(parents=True)
    validation = {"synthetic": None, "own": {"path": str(own.directory)}}
    fields: dict[str, Any] = {"data": {"validation": validation}, "evaluation": {"batch_size": 3}}
    head = "# @package _global_\n"
    (folder / "charts.yaml").write_text(head + OmegaConf.to_yaml(OmegaConf.create(fields)))
    fields["data"]["image_tokens"] = 33
    (folder / "more.yaml").write_text(head + OmegaConf.to_yaml(OmegaConf.create(fields)))
    where = ["--config-dir", str(tmp_path / "conf")]
    assert main([str(run_dir), "held_out=charts", "evaluation.max_samples=4", *where]) == 0
    result = stored(run_dir)
    assert result["questions"] == 4 and result["validation"] == {"own": str(own.directory)}
    assert result["overrides"] == ["held_out=charts", "evaluation.max_samples=4"]
    for arguments, words in (
        (["held_out=more", *where], "sets data.image_tokens to 33"),
        (["held_out=none", *where], "held_out/none"),
        (["held_out=charts"], "'held_out=charts' says nothing to an evaluation"),
        (["--config-dir", str(tmp_path / "absent")], "absent is not a directory"),
    ):
        capsys.readouterr()
        assert main([str(run_dir), *arguments]) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and "Traceback" not in error


def test_a_job_that_was_asked_otherwise_is_asked_anew(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "a=job"
    settings = ["+experiment=demo", *TINY, *on_data(data_dir)]
    asked: list[str] = []

    def evaluated(run: Path, *_: Any) -> dict[str, Any]:
        asked.append(load_run_config(run).evaluation.ask)
        result = {"step": 3, "overrides": [], "ask": asked[-1]}
        (run / "evaluation.json").write_text(json.dumps(result))
        return {**result, "exact_match": 0.5, "blind": 0.25}

    monkeypatch.setattr(evaluation, "find_checkpoint", lambda *_: SimpleNamespace(step=3))
    monkeypatch.setattr(evaluation, "exported_step", lambda *_: 3)
    monkeypatch.setattr(evaluation, "evaluate_run", evaluated)
    job.mkdir()
    (job / "evaluation.json").write_text('{"step": 3, "overrides": []}')  # of an earlier version
    for ask in ("every", "last", "last", "every"):
        config = compose_config([*settings, f"evaluation.ask={ask}"])
        (job / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(asdict(config))))
        assert evaluation.evaluate_sweep(tmp_path) == 0
    assert asked == ["last", "every"]


def test_without_training_data_there_is_no_guess(
    run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir), f"data.sources.synthetic.path={tmp_path / 'gone'}"]) == 0
    printed = capsys.readouterr().out
    assert "knows nothing of data.sources.synthetic" in printed and "no image-free guess" in printed
    result = stored(run_dir)
    assert result["guess"] is None and result["guess_samples"] == 0
    assert {f["guess"] for f in result["families"].values()} == {None}
    last = next(line for line in printed.splitlines() if line.startswith("overall"))
    assert last.split()[3] == "-"
