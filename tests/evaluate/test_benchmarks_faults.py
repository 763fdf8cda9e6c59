"""`evaluate --benchmarks` where something is in the way: disks, other commands, odd data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.evaluate.__main__ import main
from casa_train.evaluate.benchmarks import command
from casa_train.evaluate.benchmarks.answering import Asker
from casa_train.evaluate.benchmarks.kept import KeptAnswers, weights_digests
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.reading import read_benchmark
from casa_train.evaluate.benchmarks.request import default_out, export_of
from casa_train.evaluate.benchmarks.results import (
    alone,
    join,
    read_results,
    write_lines,
    write_results,
)
from casa_train.io.files import EXPORT_MARKER
from tests.helpers.benchmark_copies import file_of, rows_of, write_benchmark
from tests.helpers.commands import ROOT
from tests.helpers.small_disk import Filler, remount, small_disk

COUNT = 5
CASA = PROTOCOLS["casa"].tasks


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    for name in ("ai2d", "chartqa"):
        write_benchmark(folder, name, COUNT)
    return folder


def words(export: Path | str, copies: Path, *more: str | Path, names: str = "ai2d") -> list[str]:
    base = (export, "--benchmarks", names, "--source", copies, "--batch-size", "3")
    return [str(word) for word in (*base, *more)]


# Answers that are not there.


def test_an_answer_that_is_not_found_is_no_picture_that_cannot_be_read(tmp_path: Path) -> None:
    rows = rows_of("chartqa", COUNT)
    rows[4]["image"] = file_of(b"no picture")
    write_benchmark(tmp_path, "chartqa", rows=rows)
    benchmark = read_benchmark("chartqa", tmp_path)
    kept: dict[int, dict[str, Any]] = {i: {"answer": "red"} for i in range(4)}
    _, entry = join(benchmark, CASA["chartqa"], kept)
    assert entry["unreadable"] == 1 and entry["score"] == 50
    del kept[1], kept[2]  # another machine kept them on a disk of its own
    with pytest.raises(UserError, match=r"no answer to 2 of 5 questions.*--out .* share"):
        join(benchmark, CASA["chartqa"], kept)


# Where answers are written.


@pytest.mark.parametrize(("inside", "named"), [("tiny", "."), ("tiny/deep", ".."), (".", "link/")])
def test_the_folder_beside_an_export_however_it_is_named(
    inside: str, named: str, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny/deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to("tiny")
    shutil.copy(export / EXPORT_MARKER, tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / inside)
    out = default_out(export_of(Path(named)), "casa")
    assert out.resolve() == tmp_path / "tiny_benchmarks"


def test_answers_are_no_files_of_the_export(
    export: Path, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to(export)
    before = sorted(os.listdir(export))
    assert main(words(export, copies, "--out", tmp_path / "link")) == 2
    assert "is the export itself, which would be another one" in capsys.readouterr().err
    assert sorted(os.listdir(export)) == before


def test_a_folder_that_takes_nothing_is_said_before_the_model_is_loaded(
    export: Path,
    copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("the model is loaded"))
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert main(words(export, copies, "--out", out)) == 2
        assert f"--out {out}: nothing can be written there" in capsys.readouterr().err
    with small_disk(tmp_path / "disk", "1m") as disk:
        remount(disk, "ro")
        assert main(words(export, copies, "--out", disk / "out")) == 2
        assert "Read-only file system. Expected a folder" in capsys.readouterr().err


def test_a_disk_that_fills_up_keeps_what_was_answered(
    export: Path, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "whole"
    assert main(words(export, copies, "--out", whole)) == 0
    with small_disk(tmp_path / "disk", "1m") as disk:
        out, filler = disk / "out", Filler(disk)
        shutil.copytree(whole / "kept", out / "kept")
        filler.fill()
        assert main(words(export, copies, "--out", out)) == 2
        assert "No space left on device. The answers are kept in" in capsys.readouterr().err
        filler.empty()
        assert main(words(export, copies, "--out", out)) == 0
        assert (out / "ai2d.jsonl").read_bytes() == (whole / "ai2d.jsonl").read_bytes()


# Results that others write, too.


def head_of(weights: str) -> dict[str, Any]:
    same = {"protocol": "casa", "max_pixels": 784, "dtype": "auto", "backbone": "helium"}
    return {**same, "weights_sha256": {"model.safetensors": weights}}


def entry_of(score: float) -> dict[str, Any]:
    return {"score": score, "questions": 1, "unreadable": 0}


def test_commands_that_share_a_folder_lose_no_results(tmp_path: Path) -> None:
    def write(name: str) -> None:
        with alone(tmp_path):
            write_results(tmp_path, head_of("a"), name, entry_of(1.5))

    with ThreadPoolExecutor(len(BENCHMARKS)) as pool:  # locks are of opened files, not of processes
        list(pool.map(write, BENCHMARKS * 3))
    assert list(read_results(tmp_path)["benchmarks"]) == list(BENCHMARKS)


def test_lines_of_another_model_go_with_its_scores(tmp_path: Path) -> None:
    for name in ("chartqa", "gqa"):
        write_lines(tmp_path, name, [{"answer": "red"}])
        write_results(tmp_path, head_of("a"), name, entry_of(1.5))
    write_lines(tmp_path, "mme", [{"of": "somebody"}])
    write_lines(tmp_path, "gqa", [{"answer": "blue"}])
    write_results(tmp_path, head_of("b"), "gqa", entry_of(2.5))
    assert not (tmp_path / "chartqa.jsonl").exists()  # its answers stay in kept
    assert "blue" in (tmp_path / "gqa.jsonl").read_text() and (tmp_path / "mme.jsonl").exists()


@pytest.mark.parametrize("content", ["[]", '{"benchmarks": [1]}', '{"benchmarks": {"gqa": 3}}'])
def test_results_that_are_none_are_replaced(content: str, tmp_path: Path) -> None:
    (tmp_path / "benchmarks.json").write_text(content)
    assert read_results(tmp_path) == {}
    found = write_results(tmp_path, head_of("a"), "mme", entry_of(7.5))
    assert read_results(tmp_path) == found and list(found["benchmarks"]) == ["mme"]


def test_lines_that_are_no_answers_are_not_taken_for_some(tmp_path: Path) -> None:
    kept = KeptAnswers(tmp_path, "gqa", {"weights": "a"})
    kept.add([{"index": 3, "answer": "red"}])
    file = kept.folder / "rank7.jsonl"
    file.write_bytes(b'{"answer": "blue"}\n{"index": "4", "answer": ""}\n{"index": 5}\n\xff\n[]\n')
    assert kept.read() == {3: {"index": 3, "answer": "red"}}


def test_files_of_any_tokenizer_make_another_export(export: Path, tmp_path: Path) -> None:
    other = tmp_path / "tiny"
    shutil.copytree(export, other)
    before = weights_digests(other)
    for name in ("merges.txt", "tokenizer.model"):
        (other / name).write_text("x")
    assert set(weights_digests(other)) - set(before) == {"merges.txt", "tokenizer.model"}


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_that_fails_among_others_says_so_at_once(
    world: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def answer(self, *_: object) -> None:
            raise UserError("the disk is full.")

    asking = object.__new__(command.BenchmarkRun)
    asking.ranks = Ranks(rank=world - 1, world=world)
    with pytest.raises(UserError, match="full"):
        asking._answer(cast(Asker, Full()))
    said = "warning: rank 1: the disk is full. The others finish their share first.\n"
    assert capsys.readouterr().err == (said if world == 2 else "")


# Data.


def test_more_options_than_letters(tmp_path: Path) -> None:
    rows = rows_of("ai2d", 3)
    rows[0] |= {"options": [f"part {i}" for i in range(26)], "answer": "25"}
    rows[1] |= {"options": [f"part {i}" for i in range(27)], "answer": "26"}
    write_benchmark(tmp_path, "ai2d", rows=rows)
    benchmark = read_benchmark("ai2d", tmp_path)
    assert benchmark.unusable == {1: "there are 27 options; expected one a letter, A to Z"}
    assert "\nZ. part 25\n" in CASA["ai2d"].prompt(benchmark.questions[0])


def test_one_split_that_was_saved_is_a_copy_and_another_split_is_none(
    copies: Path, tmp_path: Path
) -> None:
    import datasets

    file = str(copies / "ai2d/data/test-00000-of-00001.parquet")
    for split in ("test", "train"):
        table = datasets.load_dataset("parquet", data_files={split: file})
        table[split].save_to_disk(tmp_path / f"one_{split}/ai2d")
        table.save_to_disk(tmp_path / f"all_{split}/ai2d")
    plain = read_benchmark("ai2d", copies).revision
    for place in (tmp_path / "one_test", tmp_path / "one_test/ai2d", tmp_path / "all_test"):
        assert read_benchmark("ai2d", place).revision == plain
    for place in (tmp_path / "one_train", tmp_path / "all_train"):
        with pytest.raises(UserError, match=r"\(split test\) .*ai2d holds the split train alone"):
            read_benchmark("ai2d", place)


# An export that a run writes anew.


def test_an_export_that_changes_while_it_is_loaded_is_not_asked(
    export: Path,
    copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own, out, load = tmp_path / "tiny", tmp_path / "out", command.load_model
    shutil.copytree(export, own)

    def written_anew(directory: Path, dtype: Any) -> Any:
        weights = load_file(own / "model.safetensors")
        weights["visual.blocks.0.norm1.weight"] *= -1
        save_file(weights, own / "model.safetensors", {"format": "pt"})
        return load(directory, dtype)

    monkeypatch.setattr(command, "load_model", written_anew)
    assert main(words(own, copies, "--out", out)) == 2
    error = capsys.readouterr().err
    assert f"error: {own}: model.safetensors changed while it was loaded" in error
    assert not list(out.glob("kept/*/*"))  # none that would be taken for the old export's
    monkeypatch.undo()
    assert main(words(own, copies, "--out", out)) == 0


def test_files_of_an_export_that_cannot_be_read(export: Path, tmp_path: Path) -> None:
    own = tmp_path / "tiny"
    shutil.copytree(export, own)
    (own / "model-00002.safetensors").symlink_to("gone")
    with pytest.raises(UserError, match=r"tiny cannot be read: .*model-00002.* whole"):
        weights_digests(own)


def test_a_console_that_is_full_is_no_failure(export: Path, copies: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command_line = words(export, copies, "--out", out, "--samples", "2")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "casa_train.evaluate", *command_line],
            cwd=ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0 and "Error" not in done.stderr
    assert (out / "benchmarks.json").is_file()


def test_a_model_that_memory_does_not_hold_is_no_broken_export(
    export: Path,
    copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.\nSee")

    monkeypatch.setattr(command, "load_model", too_large)
    assert main(words(export, copies, "--out", tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert f"{export} does not fit in memory: CUDA out of memory. Tried to" in error
    assert "write it again" not in error and "See" not in error
