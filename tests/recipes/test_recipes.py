"""The recipes of published image datasets on local copies: what is written, restart, bad data."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from omegaconf import OmegaConf

from casa_train.config.data_schema import SourceConfig
from casa_train.data.budget import Budget
from casa_train.data.build import open_splits
from casa_train.data.materialize import Materializer
from casa_train.data.overlap import IN_FINEVISION, LACKING_IN_FINEVISION, refuse_double_counting
from casa_train.data.prepared.plan import Pack
from casa_train.data.prepared.shard_index import (
    INDEX_FILE,
    INDEX_SCHEMA,
    open_index,
    write_index,
)
from casa_train.data.prepared.shard_writer import Shard
from casa_train.data.prepared.shards import Split
from casa_train.data.sample import RATINGS, ImageSlot
from casa_train.data.tokens import load_tokenizer, tokenizer_fingerprint
from casa_train.errors import UserError
from casa_train.io.files import sha256
from casa_train.modeling.processing_casa import CasaProcessor
from data_recipes import finevision, llava_onevision
from data_recipes.__main__ import main
from data_recipes.mixture import published_mixture
from data_recipes.pipeline import Progress, slug
from data_recipes.synthetic import build_tokenizer
from tests.helpers import published
from tests.helpers.commands import ROOT, TEMPLATE, environment
from tests.helpers.counting import sample_lengths, texts_by, write_talks

FOUR_FILES = [[published.fine_row(10 * file + i) for i in range(10)] for file in range(4)]


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> str:
    return str(data_dir / "tokenizer")


def recipe(name: str, source: Path, out: Path, tokenizer: str, *options: str) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--tokenizer", tokenizer]
    return main([name, *arguments, "--template", "auto", "--workers", "1", *options])


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def summary(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "summary.json").read_text())
    assert found["finished"]
    return dict(found["train"])


# ------------------------------------------------------------------------------- what is written


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, tokenizer: str) -> Path:
    root = tmp_path_factory.mktemp("finevision")
    published.finevision(root / "source", FOUR_FILES)
    assert recipe("finevision", root / "source", root / "out", tokenizer) == 0
    return root


def test_rows_come_in_order_with_original_bytes(prepared: Path) -> None:
    split = Split(prepared / "out" / "chartqa" / "train")
    assert len(split) == 40
    for i, sample in enumerate(split):
        assert sample.key == f"chartqa-{i // 10:05d}-{i % 10:07d}"
        assert sample.images == (published.picture(40 + i % 7),)
        assert sample.turns[0].user == (ImageSlot(0), f"question {i}")
        assert sample.turns[1].ratings == (2, 2, 2, 2)
    assert split.origin == {"dataset": "finevision", "subset": "chartqa"}
    assert split.turn_ratings("relevance")[0].tolist() == [5, 2] * 40


def test_the_summary_counts_what_was_written(prepared: Path) -> None:
    split = Split(prepared / "out" / "chartqa" / "train")
    tokens = sum(int(split.list_column(n)[0].sum()) for n in ("user_tokens", "assistant_tokens"))
    assert summary(prepared / "out" / "chartqa") == {
        "samples": 40,
        "images": 40,
        "text_tokens": tokens,
        "skipped": {},
        "mended": {},
    }


@pytest.mark.slow
def test_the_number_of_processes_changes_no_byte(
    prepared: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe("finevision", prepared / "source", tmp_path, tokenizer, "--workers", "2") == 0
    assert files(tmp_path) == files(prepared / "out")
    out = capsys.readouterr().out
    assert "chartqa: 4/4 files, 40 samples" in out and "finished: " in out


def test_a_finished_subset_is_left_alone_and_another_one_refused(
    prepared: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.stat().st_mtime_ns for p in (prepared / "out").rglob("*")}
    assert recipe("finevision", prepared / "source", prepared / "out", tokenizer) == 0
    assert "nothing to do" in capsys.readouterr().out
    again = recipe("finevision", prepared / "source", prepared / "out", tokenizer, "--limit", "3")
    assert again == 2
    assert "limit is None there and 3 here" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in (prepared / "out").rglob("*")}


def test_a_limit_takes_the_first_rows(prepared: Path, tokenizer: str, tmp_path: Path) -> None:
    options = ("--limit", "13", "--workers", "2")
    assert recipe("finevision", prepared / "source", tmp_path, tokenizer, *options) == 0
    keys = [sample.key for sample in Split(tmp_path / "chartqa" / "train")]
    assert keys == [f"chartqa-{i // 10:05d}-{i % 10:07d}" for i in range(13)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--subset", "chartqa", "docvqa"], "has no subset 'docvqa'; it has chartqa"),
        (["--workers", "0"], "--workers is 0"),
        (["--limit", "0"], "--limit is 0"),
        (["--tokenizer", "./nowhere"], "neither a directory nor a hub id"),
        (["--source", "./nowhere"], "is no directory"),
        (["--template", "nothing"], "--template is 'nothing', which cannot be read"),
        (["--template", "{user_strat: x}"], "expected fields out of bos, system, system_start"),
        (["--template", "{user_start: 3}"], "field 'user_start' is 3; expected text"),
        (["--template", "helium"], "uses the special token '<s>', which the tokenizer"),
    ],
)
def test_bad_input_is_one_message(
    prepared: Path,
    tokenizer: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert recipe("finevision", prepared / "source", tmp_path / "out", tokenizer, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def test_a_copy_without_its_card_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published.finevision(tmp_path / "source", FOUR_FILES[:1])
    (source / "README.md").unlink()
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 2
    assert "has no README.md, which names the subsets" in capsys.readouterr().err


def test_a_partial_copy_gives_what_it_holds(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("aokvqa", "chartqa")  # the first one of the card is not there
    rows = {name: FOUR_FILES[:1] for name in names}
    source = published.parquet_dataset(
        tmp_path / "source", rows, dict.fromkeys(names, published.FINEVISION)
    )
    shutil.rmtree(source / "aokvqa")
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 0
    assert "holds no files of aokvqa: left out" in capsys.readouterr().out
    assert len(Split(tmp_path / "out" / "chartqa" / "train")) == 10
    asked = recipe("finevision", source, tmp_path / "two", tokenizer, "--subset", *names)
    assert asked == 2 and "has no subset 'aokvqa'; it has chartqa" in capsys.readouterr().err


def test_one_onevision_subset_of_each_form(tmp_path: Path, tokenizer: str) -> None:
    image = published.stored(published.picture(kind="JPEG"))
    subsets: dict[str, list[list[dict[str, Any]]]] = {
        "gqa": [
            [
                {
                    "id": "0",
                    "image": image,
                    "conversations": [
                        {"role": "user", "content": "<image>\nWhat?"},
                        {"role": "assistant", "content": "That."},
                    ],
                    "data_source": "gqa",
                }
            ]
        ],
        "sherlock": [
            [
                {
                    "id": "0",
                    "image": image,
                    "conversations": [
                        {"content": None, "from": "human", "role": None, "value": "Who?"},
                        {"content": None, "from": "gpt", "role": None, "value": "He."},
                    ],
                    "data_source": None,
                }
            ]
        ],
        "amc_aime": [
            [
                {
                    "id": "0",
                    "image": None,
                    "conversations": [
                        {"from": "human", "value": "1 + 1?"},
                        {"from": "gpt", "value": "2"},
                    ],
                    "data_source": "amc_aime",
                }
            ]
        ],
    }
    features = {
        "gqa": published.onevision_features(published.ROLE_CONTENT),
        "sherlock": published.onevision_features(published.NULL_FILLED),
        "amc_aime": published.onevision_features(published.FROM_VALUE, image=False),
    }
    source = published.parquet_dataset(tmp_path / "source", subsets, features)
    assert recipe("llava_onevision", source, tmp_path / "out", tokenizer, "--subset", *subsets) == 0
    found = {name: next(iter(Split(tmp_path / "out" / name / "train"))) for name in subsets}
    assert found["gqa"].turns[0].user == (ImageSlot(0), "What?")
    assert found["sherlock"].turns[0].user == (ImageSlot(0), "Who?")
    assert found["sherlock"].source == "sherlock"
    assert found["amc_aime"].images == () and found["amc_aime"].turns[0].assistant == "2"


# ------------------------------------------------------------------------------- restart


def start(command: list[str], out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*command, "--out", str(out)],
        env=environment(),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def kill_after(process: subprocess.Popen[bytes], train: Path, shards: int) -> None:
    """SIGKILL for the recipe alone, as soon as so many shards are finished."""
    deadline = time.monotonic() + 120
    while len(list(train.glob("shard-*.arrow"))) < shards and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "kills"),
    [("finevision", 1, (2, 7)), ("finevision", 2, (3,)), ("llava_video", 1, (2,))],
)
def test_a_killed_recipe_goes_on_at_the_last_finished_shard(
    tmp_path: Path, tokenizer: str, name: str, workers: int, kills: tuple[int, ...]
) -> None:
    if name == "finevision":
        rows = [[published.fine_row(100 * f + i) for i in range(40)] for f in range(20)]
        source, subset = published.finevision(tmp_path / "source", rows), "chartqa"
    else:  # four questions a video, whose frames they share
        paths = [f"v/{i}.mp4" for i in range(80)]
        videos = [published.video(1 + i / 4, fps=4) for i in range(3)]
        about = [published.video_row(i, path) for i, path in enumerate(paths * 4)]
        members = {path: videos[i % 3] for i, path in enumerate(paths)}
        source = published.llava_video(tmp_path / "source", about, [members])
        subset = "0_30_s_academic_v0_1"
    command = [sys.executable, "-m", "data_recipes", name, "--source", str(source)]
    command += ["--tokenizer", tokenizer, "--template", "auto", "--workers", str(workers)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert recipe(name, source, whole, tokenizer) == 0
    train = killed / subset / "train"
    finished: dict[Path, int] = {}
    for shards in kills:
        process = start(command, killed)
        kill_after(process, train, shards)
        assert not (train / "meta.json").exists(), "killed too late to show anything"
        deadline = time.monotonic() + 60
        while _group_runs(process.pid):  # no process of it may write beside its successor
            assert time.monotonic() < deadline, "processes of the killed recipe still run"
            time.sleep(0.05)
        now = {p: p.stat().st_mtime_ns for p in train.glob("shard-*.arrow")}
        assert finished.items() <= now.items()
        finished = now
    tars = {p.with_suffix(".tar"): p.with_suffix(".tar").stat().st_mtime_ns for p in finished}
    (train / "shard-000019.tar.tmp").write_bytes(b"half a shard")
    assert start(command, killed).wait() == 0
    assert all(path.stat().st_mtime_ns == then for path, then in tars.items())
    assert files(killed / subset) == files(whole / subset)


def _group_runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_source_that_changed_is_refused(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[published.fine_row(i) for i in range(5)] for _ in range(3)]
    source = published.finevision(tmp_path / "source", rows)
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 0
    out = tmp_path / "out" / "chartqa"
    found = json.loads((out / "summary.json").read_text())
    (out / "summary.json").write_text(json.dumps({**found, "finished": False}))
    shard = Shard(out / "train", 0, "finevision", texts_by(len))
    shard.finish({"unit": "chartqa file 0: train-00000-of-00099.parquet", "rows": 5})
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 2
    assert "it changed since" in capsys.readouterr().err


# ------------------------------------------------------------------------------- bad data


def test_the_corruption_corpus_is_counted_and_moves_nothing(tmp_path: Path, tokenizer: str) -> None:
    """Every oddity that was seen in the wild, among rows that have to come out as ever."""
    good = [published.fine_row(i) for i in range(40)]
    image = published.stored(published.picture())
    odd: dict[int, dict[str, Any]] = {
        1: dict.fromkeys(good[1]),  # None in every column
        2: {**good[2], "images": None},  # text only: a sample
        3: {**good[3], "images": [image, None]},
        4: {**good[4], "images": [published.stored(published.picture()[:20])]},
        5: {**good[5], "images": [published.stored(b"")]},
        6: {**good[6], "images": [{"bytes": None, "path": "../../../etc/passwd"}]},
        7: {**good[7], "texts": [{"user": "", "assistant": ""}]},
        8: {**good[8], "texts": [{"user": None, "assistant": "a"}]},
        9: {**good[9], "texts": []},
        10: {**good[10], "texts": None},
        11: {**good[11], "source": None},
        12: {**good[12], "texts": [{"user": "<image> and <image>?", "assistant": "<image>b"}]},
        13: {**good[13], "relevance_ratings": [5]},
        14: {**good[14], "relevance_ratings": None},
        15: {**good[15], "relevance_ratings": [None, None]},
    }
    rows = [odd.get(i, row) for i, row in enumerate(good)]
    # File 0 holds rows 0 to 24 in groups of 5, of which 20 to 24 are damaged; file 1 the rest.
    source = published.finevision(tmp_path / "source", [rows[:25], rows[25:]])
    published.damage_row_group(source / "chartqa" / "train-00000-of-00002.parquet", 4)
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 0

    found = summary(tmp_path / "out" / "chartqa")
    assert found["skipped"] == {
        "no_source": 2,
        "missing_image": 2,
        "unreadable_image": 2,
        "no_turns": 3,
        "no_texts": 1,
        "damaged_row_group": 5,
    }
    assert found["mended"] == {
        "placeholder_removed": 1,
        "ratings_ignored": 2,  # one row whose texts also became one
    }
    lost = {1, 3, 4, 5, 6, 7, 8, 9, 10, 11, *range(20, 25)}
    split = Split(tmp_path / "out" / "chartqa" / "train")
    expected = [
        f"chartqa-{0 if i < 25 else 1:05d}-{i if i < 25 else i - 25:07d}"
        for i in range(40)
        if i not in lost
    ]
    assert [split.key(i) for i in range(len(split))] == expected
    samples = {sample.key: sample for sample in split}
    assert samples["chartqa-00000-0000002"].images == ()
    assert samples["chartqa-00000-0000012"].turns[0].user == (ImageSlot(0), "and ?")
    assert samples["chartqa-00000-0000012"].turns[0].assistant == "b"
    assert samples["chartqa-00000-0000013"].turns[0].ratings == (0, 5, 5, 5)
    assert samples["chartqa-00001-0000000"].turns[0].assistant == "answer 25"


def test_a_cut_file_costs_only_itself(tmp_path: Path, tokenizer: str) -> None:
    source = published.finevision(tmp_path / "source", FOUR_FILES)
    cut = source / "chartqa" / "train-00001-of-00004.parquet"
    cut.write_bytes(cut.read_bytes()[:-500])
    first = source / "chartqa" / "train-00000-of-00004.parquet"
    first.write_bytes(b"")
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 0
    assert summary(tmp_path / "out" / "chartqa")["skipped"] == {"damaged_file": 2}
    keys = [sample.key for sample in Split(tmp_path / "out" / "chartqa" / "train")]
    assert keys == [f"chartqa-{file:05d}-{i:07d}" for file in (2, 3) for i in range(10)]


@pytest.mark.slow
def test_too_many_bad_rows_end_the_recipe_and_keep_its_shards(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [published.fine_row(i, source=None if i % 5 == 0 else "s") for i in range(1000)]
    source = published.finevision(tmp_path / "source", [rows])
    assert recipe("finevision", source, tmp_path / "out", tokenizer) == 2
    error = capsys.readouterr().err
    assert "200 of 1000 rows hold no usable sample (no_source 200)" in error
    assert "--max-bad-share" in error
    before = (tmp_path / "out" / "chartqa" / "train" / "shard-000000.tar").stat().st_mtime_ns
    share = ("--max-bad-share", "0.3")
    assert recipe("finevision", source, tmp_path / "out", tokenizer, *share) == 0
    train = tmp_path / "out" / "chartqa" / "train"
    assert len(Split(train)) == 800
    assert (train / "shard-000000.tar").stat().st_mtime_ns == before


# ------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("llava_onevision", "Docmatix"), ("llava_onevision", "Docmatix-part-03-of-10")),
        (("llava_onevision", "plotqa-part-00-of-10"), ("llava_onevision", "plotqa")),
        (("llava_onevision", "sharegpt4v"), ("llava_onevision", "sharegpt4v-part-09-of-10")),
        (("llava_onevision", "svit"), ("llava_onevision", "svit-part-00-of-10")),
        (("llava_onevision", "wit"), ("llava_onevision", "wit-part-05-of-10")),
        (
            ("llava_onevision", "sharegpt4v-part-00-of-10"),
            ("llava_onevision", "sharegpt4v-part00-of-10"),
        ),
        (("finevision", "chartqa"), ("llava_onevision", "chartqa")),
        (("llava_onevision", "plotqa-part-00-of-10"), ("finevision", "plotqa")),
        (("llava_onevision", "CLEVR"), ("finevision", "clevr")),
        (("llava_onevision", "IconQA"), ("finevision", "iconqa(mathv360k)")),
        (("llava_onevision", "screen_qa"), ("finevision", "screenqa")),
        (("llava_onevision", "sharegpt4v"), ("finevision", "sharegpt4v(sam)")),
        (("llava_onevision", "Docmatix"), ("finevision", "DoclingMatix")),
        (("finevision", "chartqa"), ("finevision", "chartqa")),
    ],
)
def test_double_counting_is_refused_by_name(one: tuple[str, str], other: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="would count twice") as caught:
        refuse_double_counting({"first": one, "second": other, "third": ("finevision", "tqa")})
    assert "first" in str(caught.value) and "second" in str(caught.value)
    assert one[1] in str(caught.value) and "third" not in str(caught.value)


def test_parts_and_named_subsets_may_stand_beside_each_other() -> None:
    parts = {str(i): ("llava_onevision", f"svit-part-{i:02d}-of-10") for i in range(10)}
    refuse_double_counting(parts)
    named = {name: ("llava_onevision", name) for name in LACKING_IN_FINEVISION}
    refuse_double_counting({**{n: ("finevision", n) for n in finevision.SUBSETS}, **named})


def test_a_recipe_refuses_a_subset_and_its_part(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("svit", "svit-part-00-of-10")
    features = published.onevision_features(published.FROM_VALUE)
    source = published.parquet_dataset(
        tmp_path, dict.fromkeys(names, [[]]), dict.fromkeys(names, features)
    )
    out = tmp_path / "out"
    assert recipe("llava_onevision", source, out, tokenizer, "--subset", *names) == 2
    error = capsys.readouterr().err
    assert "--subset svit " in error and "--subset svit-part-00-of-10" in error


def test_the_published_mixture_is_the_file_in_conf() -> None:
    path = ROOT / "conf" / "data" / "finevision_llava.yaml"
    assert path.read_text() == published_mixture()
    sources = OmegaConf.to_container(OmegaConf.load(path), resolve=True)["sources"]
    assert len(sources) == 184 + 1 + 26
    assert sources["ov_Docmatix"] == {"path": "data/llava_onevision/Docmatix/train", "repeats": 6}
    assert [name for name, s in sources.items() if "repeats" in s] == ["ov_Docmatix"]
    assert "DoclingMatix" not in sources
    assert sources["geo170k_qa"] == {"path": "data/finevision/geo170k_qa/train"}
    assert len(finevision.SUBSETS) == len(set(map(slug, finevision.SUBSETS))) == 185
    assert len(LACKING_IN_FINEVISION) == 26
    assert {name for names in IN_FINEVISION.values() for name in names} <= set(finevision.SUBSETS)
    assert set(LACKING_IN_FINEVISION) < set(llava_onevision.DEFAULT)


def test_a_mixture_of_what_is_prepared(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "finevision").symlink_to(prepared / "out")
    out = tmp_path / "mine.yaml"
    assert main(["mixture", "--data", str(data), "--out", str(out)]) == 0
    sources = OmegaConf.load(out).sources
    assert sources == {"chartqa": {"path": str(data / "finevision" / "chartqa" / "train")}}
    assert len(Split(Path(sources.chartqa.path))) == 40
    assert main(["mixture", "--data", str(tmp_path / "empty"), "--out", str(out)]) == 2
    assert "holds no finished dataset" in capsys.readouterr().err


def test_a_mixture_refuses_a_subset_that_lies_in_two_folders(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it does when the data were counted a second time beside the first."""
    data, out = tmp_path / "data", tmp_path / "mine.yaml"
    data.mkdir()
    for name in ("finevision", "finevision_qwen"):
        (data / name).symlink_to(prepared / "out")
    assert main(["mixture", "--data", str(data), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    for name in ("finevision", "finevision_qwen"):
        assert f"{data / name / 'chartqa'} " in said, said
    assert "--data" in said
    assert not out.exists()
    assert main(["mixture", "--data", str(data / "finevision_qwen"), "--out", str(out)]) == 0
    assert "finevision_qwen/chartqa/train" in out.read_text()


def test_a_second_index_for_another_tokenizer(
    prepared: Path, tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_tokenizer()
    other.add_tokens(["question", "answer"])
    other.save_pretrained(tmp_path / "other")
    command = ["retokenize", "--data", str(prepared / "out"), "--workers", "1", "--out"]
    options = ["--tokenizer", str(tmp_path / "other")]
    assert main([*command, str(tmp_path / "out"), *options]) == 0
    old, new = Split(prepared / "out" / "chartqa" / "train"), Split(tmp_path / "out/chartqa/train")
    for i, sample in enumerate(new):
        assert sample == old.read(i)
    tokens, _ = new.list_column("assistant_tokens")
    expected = [
        len(other.encode(turn.assistant, add_special_tokens=False)) + 1  # <|end|>
        for sample in old
        for turn in sample.turns
    ]
    assert tokens.tolist() == expected != old.list_column("assistant_tokens")[0].tolist()
    assert new.tokenizer_fingerprint == tokenizer_fingerprint(other) != old.tokenizer_fingerprint
    assert new.origin == old.origin and new.fingerprint != old.fingerprint
    assert main([*command, str(tmp_path / "out"), "--tokenizer", tokenizer]) == 2
    assert "another tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("written", ["name", "file", "fields"])
def test_a_template_is_a_name_a_file_or_fields(
    prepared: Path, tmp_path: Path, tokenizer: str, written: str
) -> None:
    """All of them what `auto` finds in this tokenizer."""
    path = ROOT / "conf" / "model" / "template" / "demo.yaml"
    (tmp_path / "mine.yaml").write_text(path.read_text())
    chosen = {"name": "demo", "file": f"{tmp_path}/mine.yaml", "fields": json.dumps(TEMPLATE)}
    out = tmp_path / "out"
    template = ("--template", chosen[written])
    assert recipe("finevision", prepared / "source", out, tokenizer, *template) == 0
    assert files(out) == files(prepared / "out")


def test_another_template_does_not_go_into_the_same_directory(
    prepared: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(prepared / "out")
    template = ("--template", '{user_end: "<|end|>\\n"}')
    assert recipe("finevision", prepared / "source", prepared / "out", tokenizer, *template) == 2
    assert re.search(r"template is '?\w+'? there and '?\w+'? here", capsys.readouterr().err)
    command = ["retokenize", "--data", str(prepared / "out"), "--out", str(prepared / "out")]
    assert main([*command, "--tokenizer", tokenizer, *template, "--workers", "1"]) == 2
    assert "another tokenizer or chat template" in capsys.readouterr().err
    assert files(prepared / "out") == before


# ------------------------------------------------------------------------------- counted anew


def as_version_2(directory: Path) -> None:
    """Rewrites a split as the version before this one did: joined turns, other counts of tokens."""
    table = open_index(directory / INDEX_FILE).combine_chunks()
    for name in ("user_tokens", "assistant_tokens", "image_turns", *RATINGS):
        field = INDEX_SCHEMA.field(name)
        column = pa.array([[0]] * len(table), field.type)
        table = table.set_column(INDEX_SCHEMA.get_field_index(name), field, column)
    write_index(directory, table)
    meta = json.loads((directory / "meta.json").read_text())
    del meta["turns_fingerprint"], meta["template"]
    meta |= {"format": 2, "text_tokens": 0, "index_sha256": sha256(directory / INDEX_FILE)}
    (directory / "meta.json").write_text(json.dumps(meta))


def follow(error: UserError, processor: CasaProcessor, out: Path) -> None:
    """Runs the command that a message prints, word by word, with its blanks filled in."""
    (command,) = re.findall("python -m data_recipes retokenize .* --out NEW", str(error))
    given = {"NAME": processor.tokenizer.name_or_path, "NEW": str(out)}
    given["TEMPLATE"] = json.dumps(processor.template)
    words = [given.get(word, word) for word in shlex.split(command)]
    assert words[:3] == ["python", "-m", "data_recipes"]
    assert main(words[3:]) == 0


def check_lengths(path: Path, processor: CasaProcessor) -> None:
    """A split that opens, and whose planned lengths are those that materialising finds."""
    split = open_splits({"a": SourceConfig(str(path))}, processor)["a"]
    text, images = sample_lengths(split, processor)
    for row in range(len(split)):
        pack = Pack(0, (("a", row, int(text[row]), int(images[row])),), 0, 0)
        batch = Materializer({"a": split}, processor, Budget(10_000, 10_000))[pack]
        assert not batch.failures and batch.sample_ids == [f"{split.source(row)}/{split.key(row)}"]
        assert (batch.text_tokens, batch.image_tokens) == (text[row], images[row])


# Literals that YAML, JSON and a shell each read in their own way, and an empty field that is none
# in the tokenizer's own template.
ODD = {
    "system": 'It\'s \\n "quoted" \u6771 | $HOME\t',
    "system_start": "# ",
    "system_end": "\n",
    "user_start": "'Q': \\",
    "user_end": "",
    "assistant_start": "\tA:",
    "answer_start": " ",
    "assistant_end": "<|end|>\n",
    "image_start": "<|user|>[",
    "image_end": "]",
}


@pytest.mark.parametrize("template", [TEMPLATE, ODD], ids=["own", "odd"])
def test_data_of_an_earlier_version_is_counted_anew_as_the_message_says(
    tmp_path: Path, tokenizer: str, template: dict[str, str]
) -> None:
    processor = CasaProcessor(load_tokenizer(tokenizer), 7056, template)
    old = write_talks(tmp_path / "old data" / "train", processor)
    samples = list(Split(old))
    as_version_2(old)
    assert list(Split(old, uncounted=True)) == samples
    refusals: list[Callable[[], Any]] = [
        lambda: Split(old),
        lambda: open_splits({"a": SourceConfig(str(old))}, processor),
    ]
    for number, refused in enumerate(refusals):
        with pytest.raises(UserError, match="before lengths had the chat template in") as caught:
            refused()
        new = tmp_path / f"new {number}"
        follow(caught.value, processor, new)
        check_lengths(new, processor)
        assert list(Split(new)) == samples


def test_data_of_another_template_is_counted_anew_as_the_message_says(
    tmp_path: Path, tokenizer: str
) -> None:
    own = CasaProcessor(load_tokenizer(tokenizer), 7056, TEMPLATE)
    odd = CasaProcessor(load_tokenizer(tokenizer), 7056, ODD)
    data = write_talks(tmp_path / "old data" / "train", own)
    check_lengths(data, own)
    for number, processor in enumerate((odd, own, odd)):
        with pytest.raises(UserError, match="counted with another chat template") as caught:
            open_splits({"a": SourceConfig(str(data))}, processor, "data.validation")
        assert "data.validation.a.path=NEW" in str(caught.value)
        data = tmp_path / str(number)
        follow(caught.value, processor, data)
        check_lengths(data, processor)


@pytest.mark.parametrize(
    "changed",
    [{"bos": ""}, {"bos": "<|bos|>\n"}, {"system": "You are brief."}],
    ids=["no bos", "a line break behind it", "default system turn"],
)
def test_another_opening_is_counted_or_refused(
    tmp_path: Path, tokenizer: str, changed: dict[str, str]
) -> None:
    """Some of the conversations bring a system turn of their own, in place of the default."""
    own = CasaProcessor(load_tokenizer(tokenizer), 7056, TEMPLATE)
    other = CasaProcessor(load_tokenizer(tokenizer), 7056, {**TEMPLATE, **changed})
    data = write_talks(tmp_path / "data", own)
    first = [sample.messages()[0]["role"] for sample in Split(data)]
    assert set(first) == {"system", "user"}
    try:
        open_splits({"a": SourceConfig(str(data))}, other)
    except UserError as error:
        follow(error, other, tmp_path / "new")
        data = tmp_path / "new"
    check_lengths(data, other)


def test_training_refuses_the_same_samples_twice(prepared: Path, tokenizer: str) -> None:
    processor = CasaProcessor(load_tokenizer(tokenizer), 7056, TEMPLATE)
    path = str(prepared / "out" / "chartqa" / "train")
    assert len(open_splits({"a": SourceConfig(path)}, processor)["a"]) == 40
    with pytest.raises(UserError, match=r"data.sources.a .* and data.sources.b .*same subset"):
        open_splits({"a": SourceConfig(path), "b": SourceConfig(path)}, processor)


def test_two_recipes_do_not_write_one_directory(
    prepared: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "chartqa").mkdir()
    with (tmp_path / "chartqa" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert recipe("finevision", prepared / "source", tmp_path, tokenizer) == 2
    assert "another recipe is writing to" in capsys.readouterr().err
    assert recipe("finevision", prepared / "source", tmp_path, tokenizer) == 0


def test_progress_says_when_it_will_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr("data_recipes.pipeline.time.monotonic", lambda: clock[0])
    progress = Progress("chartqa", 10, "files")
    progress.update(5, {"samples": 500}, new=False)  # an earlier run's say nothing of the speed
    for clock[0] in (5.0, 12.0, 15.0, 24.0):
        progress.update(1, {"samples": 100})
    progress.close()
    assert capsys.readouterr().out.splitlines() == [
        "chartqa: 7/10 files, 700 samples, 17 a second, about 18 s left",
        "chartqa: 9/10 files, 900 samples, 17 a second, about 6 s left",
        "chartqa: 9/10 files, 900 samples, 17 a second, about 6 s left",
    ]


def test_a_source_without_rows_is_finished_and_says_so(tmp_path: Path, tokenizer: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "live_whisperx_526k_with_seeks.jsonl").write_text("[0]\n")
    assert recipe("live_whisperx", source, tmp_path / "out", tokenizer) == 0
    assert summary(tmp_path / "out")["samples"] == 0
