"""`evaluate --benchmarks`: reading, answers that are kept, scores, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from casa_train.errors import UserError
from casa_train.evaluate.__main__ import main
from casa_train.evaluate.benchmarks.protocols import PROTOCOLS
from casa_train.evaluate.benchmarks.question import BENCHMARKS
from casa_train.evaluate.benchmarks.reading import read_benchmark, remarks
from casa_train.evaluate.benchmarks.results import join
from casa_train.evaluate.benchmarks.scorers import until
from casa_train.evaluate.benchmarks.sources import SOURCES
from casa_train.io.files import EXPORT_MARKER
from tests.helpers.benchmark_copies import (
    FOLDERS,
    file_of,
    gqa_rows,
    rows_of,
    write_benchmark,
    write_rows,
)
from tests.helpers.commands import ROOT
from tests.helpers.fake_hub import serving
from tests.helpers.report_pages import Page

COUNT = 11


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copies")
    for name in BENCHMARKS:
        write_benchmark(folder, name, COUNT + (name == "mme"))
    return folder


def lines(out: Path, name: str) -> list[dict[str, Any]]:
    text = (out / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "benchmarks.json").read_text())
    return found


def arguments(export: Path, copies: Path, out: Path, names: str, *more: str) -> list[str]:
    base = [str(export), "--benchmarks", names, "--source", str(copies), "--out", str(out)]
    return [*base, "--batch-size", "4", *more]


# What is read.


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_read_as_published(name: str, copies: Path) -> None:
    benchmark = read_benchmark(name, copies)
    count = COUNT + (name == "mme")
    assert len(benchmark.questions) == count and benchmark.rows == list(range(count))
    rows = gqa_rows(COUNT)[0] if name == "gqa" else rows_of(name, count)
    answer = "answers" if "answers" in rows[0] else "answer"
    for question, row in zip(benchmark.questions, rows, strict=True):
        expected = row[answer] if isinstance(row[answer], list) else [row[answer]]
        assert question.text == row["question"] and list(question.references) == expected
    assert len({question.id for question in benchmark.questions}) == count
    if name == "gqa":
        images = {image["id"]: image["image"]["bytes"] for image in gqa_rows(COUNT)[1]}
        pictures = [images[row["imageId"]] for row in rows]
    else:
        pictures = [row["image"]["bytes"] for row in rows]
    assert [benchmark.picture(i) for i in range(count)] == pictures
    (line,) = remarks(benchmark)  # of the rows that are missing
    assert f"has {count} rows; {SOURCES[name].rows:,} are published" in line


def test_a_card_of_the_hub_and_save_to_disk_make_the_same_benchmark(
    copies: Path, tmp_path: Path
) -> None:
    import datasets

    plain = read_benchmark("infovqa", copies)
    folder, split = FOLDERS["infovqa"]
    table = datasets.load_dataset(
        "parquet", data_files={split: f"{copies / folder}/{split}-*.parquet"}
    )
    table.save_to_disk(tmp_path / "DocVQA/InfographicVQA")
    saved = read_benchmark("infovqa", tmp_path)
    assert saved.revision == plain.revision and saved.place != plain.place
    # The copy itself may be named, and the folder of its owner.
    shutil.copytree(copies / "DocVQA", tmp_path / "owner/lmms-lab/DocVQA")
    for place in (copies / "DocVQA", tmp_path / "owner"):
        assert read_benchmark("infovqa", place).revision == plain.revision


def test_the_revision_follows_every_text_and_picture(tmp_path: Path) -> None:
    rows = rows_of("chartqa", 3)
    write_benchmark(tmp_path / "a", "chartqa", rows=rows)
    found = {read_benchmark("chartqa", tmp_path / "a").revision}
    for i, change in enumerate(
        ({"question": "Else?"}, {"answer": "else"}, {"image": file_of(rows[0]["image"]["bytes"])})
    ):
        write_benchmark(tmp_path / str(i), "chartqa", rows=[*rows[:2], {**rows[2], **change}])
        found.add(read_benchmark("chartqa", tmp_path / str(i)).revision)
    assert len(found) == 4


def test_a_subset_is_spread_and_keeps_pairs_whole(copies: Path) -> None:
    few = read_benchmark("chartqa", copies).subset(3)
    assert few.rows == [0, 3, 7] and few.picture(1) == rows_of("chartqa")[3]["image"]["bytes"]
    mme = read_benchmark("mme", copies).subset(5)
    pairs = [question.pair for question in mme.questions]
    assert len(pairs) == 6 and all(pairs.count(pair) == 2 for pair in pairs)
    assert mme.rows == [0, 1, 4, 5, 8, 9]
    assert len(read_benchmark("chartqa", copies).subset(500).questions) == COUNT


BAD_ROWS = {
    "ocrbench": ({"answer": []}, "answer is []; expected at least one answer"),
    "docvqa": ({"question": " "}, "question is ' '; expected a text"),
    "chartqa": ({"type": "train"}, "type is 'train'; expected one of human_test"),
    "ai2d": ({"answer": "7"}, "answer is '7'; expected the number of one of 3 options"),
    "mme": ({"answer": "perhaps"}, "answer is 'perhaps'; expected Yes or No"),
    "gqa": ({"imageId": "n99"}, "imageId is 'n99', which is no id of testdev_balanced_images"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_cannot_be_asked_is_named_and_left_out(name: str, tmp_path: Path) -> None:
    change, message = BAD_ROWS[name]
    rows = gqa_rows(6)[0] if name == "gqa" else rows_of(name, 6)
    rows[4] = {**rows[4], **change}
    write_benchmark(tmp_path, name, rows=rows)
    benchmark = read_benchmark(name, tmp_path)
    assert benchmark.rows == [0, 1, 2, 3, 5]
    assert message in benchmark.unusable[4]
    assert f"warning: {name}: 1 of 6 rows of" in remarks(benchmark)[-1]
    assert f"row 4: {message}" in remarks(benchmark)[-1]
    write_benchmark(tmp_path / "none", name, rows=[rows[4]])
    with pytest.raises(UserError, match="none of the 1 rows"):
        read_benchmark(name, tmp_path / "none")


def test_copies_that_are_not_what_they_should_be(copies: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no copy of lmms-lab/ChartQA.*hf download"):
        read_benchmark("chartqa", tmp_path)
    shutil.copytree(copies / "textvqa", tmp_path / "ChartQA")
    with pytest.raises(UserError, match=r"no test-\*\.parquet"):
        read_benchmark("chartqa", tmp_path)
    write_rows(tmp_path / "ChartQA/data", "test", rows_of("realworldqa"))
    with pytest.raises(UserError, match=r"has the columns .*image_path.*\(type missing\)"):
        read_benchmark("chartqa", tmp_path)
    file = tmp_path / "ChartQA/data/test-00000-of-00001.parquet"
    part = file.rename(file.with_name("test-00000-of-00003.parquet"))
    with pytest.raises(UserError, match=r"holds 1 files .* expected 3\. Download"):
        read_benchmark("chartqa", tmp_path)
    part.unlink()
    file.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="chartqa: .* cannot be read"):
        read_benchmark("chartqa", tmp_path)
    table = [{**row, "image": "picture.png"} for row in rows_of("realworldqa")]
    write_plain(tmp_path / "RealWorldQA/data", "test", table)
    with pytest.raises(UserError, match=r"column image of .* expected pictures"):
        read_benchmark("realworldqa", tmp_path)


def write_plain(folder: Path, split: str, rows: Sequence[dict[str, Any]]) -> None:
    import datasets

    folder.mkdir(parents=True)
    table = datasets.Dataset.from_list(list(rows))
    table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))


def test_without_a_hub_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match=r"lmms-lab/MME .* name a folder of local copies with --so"):
        read_benchmark("mme")


# What is scored.


def test_scores_of_answers_that_are_known(copies: Path) -> None:
    benchmark = read_benchmark("chartqa", copies)
    task = PROTOCOLS["casa"].tasks["chartqa"]
    kept: dict[int, dict[str, Any]] = {
        i: {"answer": f"{q.references[0]}."} for i, q in enumerate(benchmark.questions)
    }
    kept[1], kept[2], kept[3] = {"answer": "grey"}, {"answer": ""}, {"error": "no picture"}
    records, entry = join(benchmark, task, kept)
    assert [r.get("score") for r in records] == [1, 0, 0, None] + [1] * 7
    assert records[3]["error"] == "no picture" and "answer" not in records[3]
    assert records[0]["prompt"].startswith("What colour is picture 0?\nAnswer the question")
    assert entry["score"] == pytest.approx(80) and entry["unreadable"] == 1
    assert entry["questions"] == 11 and entry["split"] == "test"
    assert entry["sub_scores"] == pytest.approx({"human": 500 / 6, "augmented": 75})
    with pytest.raises(UserError, match="nothing can be scored.*11 pictures cannot be read.*gone"):
        join(benchmark, task, {i: {"error": "gone"} for i in range(11)})


def test_right_options_are_shown_with_their_letters(copies: Path) -> None:
    benchmark = read_benchmark("ai2d", copies)
    task = PROTOCOLS["casa"].tasks["ai2d"]
    kept = {i: {"answer": "B. green"} for i in range(11)}
    records, entry = join(benchmark, task, kept)
    assert records[1]["reference"] == ["B. green"] and records[1]["score"] == 1
    assert records[1]["options"] == ["red", "green", "blue"]
    assert entry["score"] == pytest.approx(400 / 11)


def test_an_answer_ends_before_what_stops_it() -> None:
    assert until("four\n\nASSISTANT: five", ("ASSISTANT:", "\n\n")) == "four"
    assert until("four", ("ASSISTANT:",)) == "four"


# What is asked.


@pytest.fixture(scope="module")
def answered(export: Path, copies: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two benchmarks answered by one process without a stop."""
    out = tmp_path_factory.mktemp("answered") / "out"
    assert main(arguments(export, copies, out, "gqa,chartqa")) == 0
    return out


def test_answers_are_those_of_plain_transformers(
    answered: Path, export: Path, copies: Path
) -> None:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(export, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(export, trust_remote_code=True, image_size=896)
    for name in ("chartqa", "gqa"):
        benchmark = read_benchmark(name, copies)
        for i, record in enumerate(lines(answered, name)):
            content = [
                {"type": "image", "image": benchmark.picture(i)},
                {"type": "text", "text": record["prompt"]},
            ]
            inputs = processor.apply_chat_template(
                [{"role": "user", "content": content}],
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
            )
            out = model.generate(**inputs, max_new_tokens=128, do_sample=False)
            new = out[0, inputs["input_ids"].shape[1] :]
            assert record["answer"] == processor.decode(new, skip_special_tokens=True).strip()


def test_what_a_command_writes(
    answered: Path, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(answered)
    assert list(found["benchmarks"]) == ["chartqa", "gqa"]
    assert found["protocol"] == "casa" and found["max_pixels"] == 896 * 896
    assert found["export"] == str(export) and "model.safetensors" in found["weights_sha256"]
    names = [row["model"] for row in found["table"]]
    assert "CASA-Helium1-VL-2B, 2026" in names and names[-1] == "this export"
    assert "CASA-Qwen2_5-VL-3B, 2026" not in names  # of another backbone
    records = lines(answered, "gqa")
    assert [record["index"] for record in records] == list(range(COUNT))
    assert {"question", "reference", "answer", "prompt", "score"} <= set(records[0])


def test_the_same_command_asks_nothing_twice(
    answered: Path,
    export: Path,
    copies: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from casa_train.evaluate.benchmarks import command

    loaded: list[Path] = []
    load = command.load_model

    def counting(directory: Path, dtype: Any) -> Any:
        loaded.append(directory)
        return load(directory, dtype)

    monkeypatch.setattr(command, "load_model", counting)
    out = tmp_path / "out"
    shutil.copytree(answered, out)
    before = {name: (out / f"{name}.jsonl").read_bytes() for name in ("gqa", "chartqa")}
    assert main(arguments(export, copies, out, "gqa,chartqa")) == 0
    assert not loaded  # nothing to ask
    assert "ChartQA" in capsys.readouterr().out
    # A batch of which one answer is missing is asked again, and comes out the same.
    (kept,) = (out / "kept").glob("gqa-*/rank0.jsonl")
    text = kept.read_text().splitlines()
    kept.write_text("\n".join(text[:-1]) + "\n" + text[-1][:9])  # as a kill leaves it
    assert main(arguments(export, copies, out, "gqa,chartqa")) == 0
    assert loaded.pop() == export and not loaded
    assert {name: (out / f"{name}.jsonl").read_bytes() for name in before} == before
    # Whatever changes answers leaves the kept ones alone.
    for more in (["--image-size", "56"], ["--protocol", "lmms-eval"], ["--samples", "7"]):
        assert main(arguments(export, copies, out, "gqa", *more)) == 0
        assert loaded.pop() == export
    assert main(arguments(export, copies, out, "gqa", "--dtype", "bf16")) == 0
    assert loaded.pop() == export
    said = capsys.readouterr().out
    assert "benchmarks.json: gqa were of another dtype and are replaced" in said
    # The place of an export says nothing, its content does: one written anew is another.
    changed = tmp_path / "tiny"
    shutil.copytree(export, changed)
    (changed / EXPORT_MARKER).write_text('{"run": "elsewhere"}')
    assert main(arguments(changed, copies, out, "gqa")) == 0
    assert not loaded
    weights = load_file(changed / "model.safetensors")
    weights["visual.blocks.0.norm1.weight"] *= -1
    save_file(weights, changed / "model.safetensors", {"format": "pt"})
    assert main(arguments(changed, copies, out, "gqa")) == 0
    assert loaded == [changed]
    assert "gqa were of another weights_sha256 and are replaced" in capsys.readouterr().out
    assert (out / "gqa.jsonl").read_bytes() != before["gqa"]


def tiny_command(*words: str) -> list[str]:
    return [sys.executable, "-m", "casa_train.evaluate", *words]


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_answers(
    answered: Path, export: Path, copies: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = tiny_command(*arguments(export, copies, out, "gqa,chartqa"))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    until_kept = time.monotonic() + 120
    while not list(out.glob("kept/*/rank0.jsonl")):
        assert process.poll() is None and time.monotonic() < until_kept
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "gqa.jsonl").exists()  # it was in the middle
    kept = sum(len(f.read_text().splitlines()) for f in out.glob("kept/*/rank0.jsonl"))
    assert 0 < kept < 2 * COUNT
    assert main(arguments(export, copies, out, "gqa,chartqa")) == 0
    for name in ("gqa", "chartqa"):
        assert (out / f"{name}.jsonl").read_bytes() == (answered / f"{name}.jsonl").read_bytes()


def ranks_of(command: Sequence[str], world: int = 2) -> list[subprocess.Popen[str]]:
    """The processes that torchrun would start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.mark.slow
def test_two_ranks_answer_as_one_and_survive_the_death_of_one(
    answered: Path, export: Path, copies: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = tiny_command(*arguments(export, copies, out, "gqa,chartqa"))
    first, second = ranks_of(command)
    try:
        late = time.monotonic() + 120
        while not list(out.glob("kept/*/rank1.jsonl")):
            assert second.poll() is None and time.monotonic() < late
            time.sleep(0.002)
        second.kill()
        _, errors = first.communicate(timeout=120)
        assert first.returncode == 2
        assert "rank 0: another rank is gone" in errors and "same command" in errors
        assert "Traceback" not in errors
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert list(out.glob("kept/*/rank1.jsonl"))
    both = ranks_of(command)
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "this export" in said[0][0] and not said[1][0]  # one rank speaks
    for name in ("gqa", "chartqa"):
        assert (out / f"{name}.jsonl").read_bytes() == (answered / f"{name}.jsonl").read_bytes()


def test_pictures_that_cannot_be_read_are_said_and_do_not_count(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = rows_of("realworldqa", 6)
    cut = rows[1]["image"]["bytes"][:150]  # its header is whole
    rows[1]["image"], rows[2]["image"] = file_of(cut), file_of(b"no picture")
    rows[4]["image"] = None
    write_benchmark(tmp_path, "realworldqa", rows=rows)
    out = tmp_path / "out"
    assert main(arguments(export, tmp_path, out, "realworldqa")) == 0
    records = lines(out, "realworldqa")
    assert ["error" in record for record in records] == [False, True, True, False, True, False]
    assert "no picture" in records[4]["error"]
    assert results(out)["benchmarks"]["realworldqa"]["unreadable"] == 3
    said = capsys.readouterr().out
    assert "over 6 questions, 3 of which have no picture that can be read" in said
    assert "3/765" in said


REFUSED = [
    (["--benchmarks", "chartqa,docvaq"], "docvaq is no benchmark; expected some of chartqa,"),
    (["--benchmarks", ","], "nothing is no benchmark"),
    (["--benchmarks", "mme", "--source", "nowhere"], "--source nowhere: there is no such folder"),
    (["--benchmarks", "mme", "evaluation.batch_size=3"], "evaluation.batch_size=3 says nothing"),
    (["--benchmarks", "mme", "--only", "a*"], "--only says nothing beside --benchmarks"),
    (["--samples", "5", "--protocol", "casa"], "--protocol, --samples say nothing without"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda v: " ".join(v)[:40])
def test_what_cannot_be_asked_is_refused(
    words: list[str], message: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(export), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--samples", "0"], ["--image-size", "20"], ["--dtype", "x"]])
def test_values_that_cannot_be_are_refused(words: list[str], export: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(export), "--benchmarks", "mme", *words])
    assert left.value.code == 2


def test_what_is_no_whole_export_is_refused(
    export: Path, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(arguments(copies, copies, out, "mme")) == 2
    assert "is no export and holds none" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(export, broken)
    config = json.loads((broken / "config.json").read_text())
    config["fusion"] = {"mechanism": "of_tomorrow"}
    (broken / "config.json").write_text(json.dumps(config))
    assert main(arguments(broken, copies, out, "mme")) == 2
    error = capsys.readouterr().err
    assert f"{broken} cannot be loaded with transformers" in error and "Traceback" not in error
    (broken / "config.json").write_text("{}")
    assert main(arguments(broken, copies, out, "mme")) == 2
    assert f"{broken} cannot be loaded" in capsys.readouterr().err


def test_a_run_stands_for_its_export(
    export: Path, copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(export, tmp_path / "run/export")
    words = [str(tmp_path / "run"), "--benchmarks", "ai2d", "--source", str(copies)]
    assert main([*words, "--samples", "2", "--protocol", "lmms-eval"]) == 0
    out = tmp_path / "run/export_benchmarks_lmms-eval"
    assert [record["index"] for record in lines(out, "ai2d")] == [0, 5]
    assert lines(out, "ai2d")[0]["prompt"].endswith("from the given choices directly.")
    assert results(out)["max_pixels"] == 84 * 84  # the export's own


READ = """
import sys
from pathlib import Path
from casa_train.evaluate.benchmarks.reading import read_benchmark
for name in ("docvqa", "infovqa"):
    print(name, read_benchmark(name).revision)
"""
CARD = """---
configs:
- config_name: DocVQA
  data_files:
  - split: validation
    path: DocVQA/validation-*
- config_name: InfographicVQA
  data_files:
  - split: validation
    path: InfographicVQA/validation-*
---
"""


def test_the_hub_gives_what_a_copy_gives(copies: Path, tmp_path: Path) -> None:
    shutil.copytree(copies / "DocVQA", tmp_path / "hub")
    (tmp_path / "hub/README.md").write_text(CARD)
    with serving(tmp_path / "hub", "lmms-lab/DocVQA") as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-c", READ],
            cwd=ROOT,
            env={**os.environ, **place, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stderr
    expected = {name: read_benchmark(name, copies).revision for name in ("docvqa", "infovqa")}
    assert done.stdout.split() == [word for pair in expected.items() for word in pair]


def test_the_page_shows_what_every_command_found(
    answered: Path,
    export: Path,
    copies: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Pictures of an earlier command's benchmarks are read again; another release is noticed."""
    out, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(answered, out)
    for name in ("ChartQA", "ai2d"):
        shutil.copytree(copies / name, source / name)
    rows = gqa_rows(COUNT)[0]
    rows[3]["question"] = "What colour is the floor?"
    write_benchmark(source, "gqa", COUNT, rows)
    assert main(arguments(export, source, out, "ai2d", "--samples", "2")) == 0
    page = Page((out / "benchmarks.html").read_text())
    assert len(page.all("img")) == 2 + COUNT + 6  # two questions of GQA share a picture
    assert "holds another question there" in page.text
    assert list(results(out)["benchmarks"]) == ["chartqa", "ai2d", "gqa"]
    (out / "gqa.jsonl").unlink()
    assert main(arguments(export, source, out, "ai2d", "--samples", "2")) == 2
    error = capsys.readouterr().err
    assert "gqa.jsonl cannot be read" in error and "--benchmarks gqa again" in error
