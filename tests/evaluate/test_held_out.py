"""Samples that recipes hold out: the same on every run, and no image on both sides."""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

from casa_train.data.prepared.shards import Split
from data_recipes import held_out
from data_recipes.__main__ import main
from data_recipes.held_out import DIGESTS, HoldOut, choose, digests_of
from data_recipes.pipeline import Pool
from tests.helpers import published


@pytest.fixture(scope="module")
def tokenizer(data_dir: Path) -> str:
    return str(data_dir / "tokenizer")


def recipe(name: str, source: Path, out: Path, tokenizer: str, *options: str) -> int:
    arguments = ["--source", str(source), "--out", str(out), "--tokenizer", tokenizer]
    return main([name, *arguments, "--template", "auto", "--workers", "1", *options])


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def rows(count: int, first: int = 0) -> list[dict[str, object]]:
    """Rows of 0 to 3 images; pictures return in other rows, also as the second one."""
    draw = random.Random(first)
    made = []
    for i in range(first, first + count):
        images = [
            published.picture(20 + draw.randrange(60)) for _ in range(draw.choice([0, 1, 1, 2]))
        ]
        if i % 2:  # most are alone with theirs
            images = [published.picture(100 + i, 40)]
        made.append(published.fine_row(i, images=[published.stored(image) for image in images]))
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held_out") / "source"
    return published.finevision(root, [rows(60, 100 * file) for file in range(4)])


@pytest.fixture(scope="module")
def prepared(source: Path, tokenizer: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "finevision"
    assert recipe("finevision", source, out, tokenizer, "--validation", "37") == 0
    return out


def test_no_sample_and_no_image_is_in_both_parts(
    prepared: Path, source: Path, tokenizer: str, tmp_path: Path
) -> None:
    train, validation = (Split(prepared / "chartqa" / n) for n in ("train", "validation"))
    assert len(validation) == 37 and len(train) == 240 - 37
    seen, held = ({i for s in split for i in s.images} for split in (train, validation))
    assert held and not seen & held
    assert recipe("finevision", source, tmp_path, tokenizer) == 0
    whole = {sample.key: sample for sample in Split(tmp_path / "chartqa" / "train")}
    assert {s.key: s for split in (train, validation) for s in split} == whole
    files_of = {sample.key.split("-")[1] for sample in validation}
    assert len(files_of) == 4  # from all over
    assert any(not sample.images for sample in validation)

    summary = json.loads((prepared / "chartqa" / "summary.json").read_text())
    assert summary["arguments"]["validation"] == 37
    assert {n: summary[n]["samples"] for n in ("train", "validation")} == {
        "train": 203,
        "validation": 37,
    }
    plain = json.loads((tmp_path / "chartqa" / "summary.json").read_text())["train"]
    for field in ("samples", "images", "text_tokens"):
        assert summary["train"][field] + summary["validation"][field] == plain[field]
    assert train.origin == validation.origin == {"dataset": "finevision", "subset": "chartqa"}
    assert sorted(p.name for p in (prepared / "chartqa").iterdir() if p.name[0] != ".") == [
        "summary.json",
        "train",
        "validation",
    ]


@pytest.mark.slow
def test_the_choice_depends_on_neither_processes_nor_interruptions(
    prepared: Path,
    source: Path,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--validation", "37"]
    two = recipe("finevision", source, tmp_path / "two", tokenizer, *options, "--workers", "2")
    assert two == 0 and files(tmp_path / "two") == files(prepared)

    submit, divide = Pool.submit, held_out.divide
    calls = 0

    def interrupted(self: Pool, task: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return submit(self, task)  # type: ignore[arg-type]

    out = tmp_path / "ended"
    monkeypatch.setattr(Pool, "submit", interrupted)
    assert recipe("finevision", source, out, tokenizer, *options) == 130
    (out / "chartqa" / held_out.ASIDE / "shard-000001.arrow").unlink()  # not written yet

    def ended(*arguments: object) -> tuple[int, int]:
        divide(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr("data_recipes.pipeline.divide", ended)
    assert recipe("finevision", source, out, tokenizer, *options) == 130
    assert not (out / "chartqa" / "train" / "meta.json").exists()
    monkeypatch.undo()
    assert recipe("finevision", source, out, tokenizer, *options) == 0
    assert files(out) == files(prepared)
    capsys.readouterr()
    assert recipe("finevision", source, out, tokenizer, *options) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert recipe("finevision", source, out, tokenizer, "--validation", "38") == 2
    assert "validation is 37 there and 38 here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--validation", "0"], "--validation is 0; expected a whole number of at least 1"),
        (["--validation", "240"], "--validation is 240, but there are 240 rows; expected fewer"),
        (["--validation", "20", "--limit", "20"], "there are 20 rows"),
    ],
)
def test_numbers_that_leave_nothing_are_refused(
    source: Path,
    tokenizer: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert recipe("finevision", source, tmp_path / "out", tokenizer, *options) == 2
    assert message in capsys.readouterr().err


def test_an_image_that_all_share_cannot_be_held_out(
    tmp_path: Path, tokenizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = published.finevision(
        tmp_path / "source", [[published.fine_row(7 * i) for i in range(9)]]
    )
    assert recipe("finevision", source, tmp_path / "out", tokenizer, "--validation", "3") == 2
    assert "no sample can be held out" in capsys.readouterr().err


def test_groups_are_whole_and_the_smallest_come_first() -> None:
    candidates = {"a": [5], "b": [9, 5], "c": [7], "d": [11, 13], "e": [2], "f": [13], "g": [3]}
    trained = np.array([11, 99], np.uint64)
    # d and f share 13, and training shows 11; a and b are one group.
    assert choose(candidates, trained, 9) == {"e", "g", "a", "b", "c"}
    assert choose(candidates, trained, 4) == {"e", "g", "a", "b"}
    assert choose(candidates, trained, 3) == {"e", "g", "c"}  # the pair does not fit
    assert choose(candidates, trained, 1) == {"e"}
    assert choose({}, trained, 1) == set()


def test_frames_stand_for_their_video_and_texts_for_themselves() -> None:
    assert digests_of({}, [b"x", b"y"], "a/b.mp4") == digests_of({"q": 1}, [b"z"], "a/b.mp4")
    assert len(digests_of({}, [b"x", b"y"], None)) == 2
    assert digests_of({"q": 1}, [], None) != digests_of({"q": 2}, [], None)
    assert all(0 <= d < DIGESTS for d in digests_of({}, [b"x"], None))
    assert HoldOut.of(10, 11).bound == DIGESTS
    assert HoldOut.of(1000, 1_000_000).bound == 2200 * DIGESTS // 1_000_000


def test_questions_about_one_video_stay_together(tmp_path: Path, tokenizer: str) -> None:
    videos = {f"v/{i}.mp4": published.video(1 + i / 8) for i in range(6)}
    about = [published.video_row(i, f"v/{i % 6}.mp4") for i in range(18)]
    source = published.llava_video(tmp_path / "llava", about, [videos])
    subset = "0_30_s_academic_v0_1"
    options = ("--subset", subset, "--validation", "7")
    assert recipe("llava_video", source, tmp_path / "out", tokenizer, *options) == 0
    splits = [Split(tmp_path / "out" / subset / name) for name in ("train", "validation")]
    assert [len(split) for split in splits] == [12, 6]  # two videos of three questions each

    words = [[0.2, 0.5, "so"], [0.6, 0.9, "grey"]]
    lines = [published.live_line(f"v/{i % 6}.mp4", 0, 1, words, f"{i}?") for i in range(12)]
    source = published.live_whisperx(tmp_path / "live", lines, videos)
    out = tmp_path / "live_out"
    assert recipe("live_whisperx", source, out, tokenizer, "--validation", "4") == 0
    assert [len(Split(out / name)) for name in ("train", "validation")] == [8, 4]


def test_a_mixture_keeps_out_what_is_held_out(
    prepared: Path, source: Path, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = prepared.parent
    other = tmp_path / "other"
    published.finevision(other, [rows(6)], name="docvqa")
    assert recipe("finevision", other, data / "more", tokenizer) == 0
    out = tmp_path / "mine.yaml"

    def mixture(*options: str) -> int:
        capsys.readouterr()
        return main(["mixture", "--data", str(data), "--out", str(out), *options])

    assert mixture() == 0
    whole = OmegaConf.load(out)
    assert set(whole.sources) == {"chartqa", "docvqa"}
    assert whole.validation == {
        "chartqa": {"path": str(data / "finevision" / "chartqa" / "validation")}
    }
    assert "2 sources, 1 held-out splits" in capsys.readouterr().out
    for pattern, left in (("docvqa", "chartqa"), ("chart*", "docvqa"), ("*/docvqa", "chartqa")):
        assert mixture("--exclude", pattern) == 0
        found = OmegaConf.load(out)
        assert list(found.sources) == [left]
        assert list(found.get("validation", {})) == (["chartqa"] if left == "chartqa" else [])
        command = shlex.split(out.read_text().splitlines()[0].removeprefix("# "))
        assert command[command.index("--exclude") + 1] == pattern  # as a shell would read it
    before = out.read_bytes()
    assert mixture("--exclude", "docvqq") == 2
    assert "--exclude docvqq names none of the subsets, which are chartqa, docvqa" in (
        capsys.readouterr().err
    )
    assert mixture("--exclude", "*") == 2
    assert "leaves every subset out" in capsys.readouterr().err
    assert out.read_bytes() == before


def test_the_published_mixture_can_lack_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine.yaml"
    names = ["geo170k(qa)", "ov_wit", "llava_onevision/Docmatix"]
    assert main(["mixture", "--out", str(out), "--exclude", *names]) == 0
    sources = OmegaConf.load(out).sources
    assert "geo170k_qa" not in sources and "ov_wit" not in sources and "ov_Docmatix" not in sources
    # What only stood back for an excluded subset comes in, and is said to have its samples.
    assert "DoclingMatix" in sources
    assert "DoclingMatix, which stays, has samples of ov_Docmatix" in capsys.readouterr().out
