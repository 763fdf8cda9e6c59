"""The comparison of mechanisms from its data to its page, by the commands that users give."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

from casa_train.report.__main__ import main as report
from data_recipes.__main__ import main as recipes
from tests.helpers.commands import TINY, run

OWN = ("evaluation.every", "data.text_tokens", "data.image_tokens")
SIZES = [override for override in TINY if override.split("=")[0] not in OWN]
BUDGETS = ["data.text_tokens=300", "data.image_tokens=300"]


@pytest.mark.slow
def test_from_data_to_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tiny and two steps long; sizes apart, every command is that of conf/README.md."""
    data, runs = tmp_path / "data", tmp_path / "runs"
    for name, held_out, *tasks in (
        ("recited", "10", "recite", "--described"),
        ("words", "28", "abilities", "--described"),
        ("pictures", "14", "newest,compare,counting,spelling,relation,bars"),
        ("conversations", "32", "abilities"),
    ):
        sizes = ["--samples", "120", "--validation", held_out, "--seed", "3", "--workers", "1"]
        out = ["--out", str(data / name)]
        assert recipes(["synthetic", *out, *sizes, "--tasks", *tasks]) == 0

    def on(name: str) -> list[str]:
        return [
            f"model.tokenizer={data}/{name}/tokenizer",
            f"data.sources.abilities.path={data}/{name}/train",
            f"data.validation.abilities.path={data}/{name}/validation",
            *SIZES,
            *BUDGETS,
        ]

    python = [sys.executable, "-m"]
    for name, part, before in (
        ("recited", "recited", None),
        ("words", "text", "recited"),
        ("pictures", "tower", "text"),
    ):
        first = runs / f"abilities_{part}"
        short = [f"run_dir={first}", "trainer.steps=2", "evaluation.every=2", *on(name)]
        if before:
            short.append(f"model.backbone.pretrained={runs}/abilities_{before}/export")
        run([*python, "casa_train", f"+experiment=abilities_{part}", *short])
        run([*python, "casa_train.export", str(first), "--out", str(first / "export")])
    sweep = [
        f"hydra.sweep.dir={runs}",
        f"model.backbone.pretrained={runs}/abilities_text/export",
        f"model.vision.pretrained={runs}/abilities_tower/export",
        "fusion=casa,insertion",
        "seed=0,1",
        "trainer.steps=4",
        "evaluation.every=2",
        "evaluation.attention_while_training=1",
        *on("conversations"),
    ]
    run([*python, "casa_train", "-m", "+sweep=abilities", *sweep])
    only = ["--sweep", str(runs), "--only", "abilities,*"]
    streamed = ["--turns", "4", "--image-size", "28", "--new-tokens", "2", "--marks", "1,4"]
    run([*python, "casa_train.evaluate", *only, "evaluation.max_samples=32"])
    run([*python, "casa_train.bench", "streaming", *only, *streamed])
    for match in ("tokens", "flops", "seconds", "params"):
        capsys.readouterr()
        assert report([*only, "--match", match]) == 0
        said = capsys.readouterr().out
        assert "insertion" in said and str(runs / "comparison.html") in said
    page = (runs / "comparison.html").read_text()
    for word in ("earlier 8", "stream 256", "time to first token"):
        assert word in page.replace("_", " ").lower(), word
    rows = list(csv.DictReader((runs / "comparison.csv").read_text().splitlines()))
    assert len({row["ability"] for row in rows}) == 16
    assert {row["seed"] for row in rows} == {"0", "1"}
    evaluation = json.loads(next(runs.glob("abilities,*/evaluation.json")).read_text())
    assert evaluation["questions"] == 32
