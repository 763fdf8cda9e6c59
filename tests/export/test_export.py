"""An export in the hands of someone who has transformers and not this project."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from casa_train.data.prepared.shards import Split
from casa_train.data.processor import build_processor
from casa_train.errors import UserError
from casa_train.evaluate.evaluation import evaluate_run
from casa_train.export.from_run import gate_conversations
from casa_train.export.gate import check_export
from casa_train.io.files import EXPORT_MARKER
from casa_train.report.run_report import report
from casa_train.run.configuration import load_model_config, load_run_config
from casa_train.setup.model import build_model
from casa_train.setup.parts import part_sizes
from tests.helpers import stranger
from tests.helpers.commands import TINY, environment, on_data, run, train_command
from tests.helpers.once import once
from tests.helpers.tiny import tiny_model

pytestmark = pytest.mark.slow

# Everything a stranger's machine has: these distributions and what they need.
INSTALLED = ("torch", "transformers", "einops", "pillow", "numpy")

STRANGER = """
import runpy, sys

sys.path.insert(0, "site")
for module in ("casa_train", "deepspeed", "hydra", "webdataset", "peft", "accelerate"):
    try:
        __import__(module)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{module} can be imported: the test proves nothing")
runpy.run_path("stranger.py", run_name="__main__")
"""


def strangers_packages(site: Path) -> None:
    """Links the allowed distributions into a folder of their own."""
    site.mkdir()
    pending, seen = list(INSTALLED), set()
    while pending:
        name = re.sub(r"[-_.]+", "-", pending.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # needed on another platform only
        needs = [n for n in distribution.requires or [] if "extra ==" not in n]
        pending += [re.split(r"[^A-Za-z0-9_.-]", n)[0] for n in needs]
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)


MECHANISMS = ("casa", "cross_attention", "insertion")


@pytest.fixture(scope="module")
def export_of(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run of a few steps with a mechanism, exported by the real command; made once each."""

    def make(mechanism: str, run_dir: Path) -> None:
        where = [f"run_dir={run_dir}", f"fusion={mechanism}", "trainer.steps=3"]
        where += ["data.min_pixels=2000"]
        run(train_command(["+experiment=demo", *TINY, *on_data(data_dir), *where]))
        command = [sys.executable, "-m", "casa_train.export", str(run_dir)]
        done = run([*command, "--out", str(run_dir / "export")])
        assert "export gate: 3 conversations, logits equal" in done.stdout

    return lambda mechanism: once(
        tmp_path_factory, f"export_{mechanism}", functools.partial(make, mechanism)
    )


@pytest.fixture(scope="module")
def casa_run(export_of: Callable[[str], Path]) -> Path:
    return export_of("casa")


def test_a_stranger_can_use_it(casa_run: Path, tmp_path: Path) -> None:
    """With no other packages; `test_interface.py` has the same for other mechanisms."""
    shutil.copytree(casa_run / "export", tmp_path / "downloaded")
    (tmp_path / "script.py").write_text(STRANGER)
    shutil.copy(stranger.__file__, tmp_path / "stranger.py")
    strangers_packages(tmp_path / "site")
    # -I and -S: nothing but the standard library is found, except in the folder above.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "script.py", "downloaded", "saved"],
        cwd=tmp_path,
        env={**environment(), "HF_HOME": str(tmp_path / "hf")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "STRANGER DONE" in done.stdout


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_the_export_is_complete_and_described(
    export_of: Callable[[str], Path], mechanism: str
) -> None:
    run_dir = export_of(mechanism)
    export = run_dir / "export"
    card = (export / "README.md").read_text()
    for words in ("2512.19535", mechanism, "MIT", "synthetic", "hidden_size: 32", "Licences"):
        assert words.lower() in card.lower()
    assert "at most 7,056\npixels and at least 2,000" in card
    reader = json.loads((export / "processor_config.json").read_text())
    assert (reader["max_pixels"], reader["min_pixels"]) == (7056, 2000)
    provenance = json.loads((export / EXPORT_MARKER).read_text())
    assert provenance["step"] == 3
    config = json.loads((export / "config.json").read_text())
    assert config["text_config"]["rope_theta"] == 10000.0
    assert config["text_config"]["rope_parameters"]["rope_theta"] == 10000.0
    assert "AutoModelForImageTextToText" in config["auto_map"]
    tokenizer = json.loads((export / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not list(run_dir.glob("*_unfinished"))


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_evaluation_and_report(export_of: Callable[[str], Path], mechanism: str) -> None:
    run_dir = export_of(mechanism)
    result = evaluate_run(run_dir, run_dir / "export")
    assert result["questions"] == len(result["answers"]) == 24
    assert sum(f["questions"] for f in result["families"].values()) == 24
    page, evaluation = report(run_dir)
    assert evaluation is not None and evaluation["exact_match"] == result["exact_match"]
    html = page.read_text()
    assert "<svg" in html and "data:image" in html


def test_sizes_count_every_parameter_once_and_in_its_part() -> None:
    model = tiny_model("qformer_insertion", vision_width=48)
    sizes = part_sizes(model)
    assert sum(sizes.values()) == sum(p.numel() for p in model.parameters())
    added = [*model.resampler.parameters(), *model.adapter.parameters()]
    assert sizes["fusion"] == sum(p.numel() for p in added) > 0
    plain = [*model.model.parameters(), *model.lm_head.parameters()]
    assert sizes["text backbone"] == sum(p.numel() for p in plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere", "--out", "x"], "is not a run directory"),
        (["{run}", "--out", "{run}/with.dot"], "must not contain a dot"),
        (["{run}", "--out", "{run}/checkpoints"], "is not an export of this program"),
        (["{run}", "--step", "99", "--out", "{run}/other"], "no checkpoint of step 99"),
    ],
)
def test_bad_export_commands(
    casa_run: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from casa_train.export.__main__ import main

    assert main([a.format(run=casa_run) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_the_gate_stops_numbers_that_are_none(casa_run: Path, tmp_path: Path) -> None:
    config = load_run_config(casa_run)
    trained = build_model(config, build_processor(config), load_model_config(casa_run)).eval()
    shutil.copytree(casa_run / "export", tmp_path / "copy")
    weights = load_file(tmp_path / "copy" / "model.safetensors")
    trained.load_state_dict(weights, strict=False, assign=True)
    trained.tie_weights()
    assert "logits equal" in check_export(
        tmp_path / "copy", trained, gate_conversations(config.data.max_pixels)
    )
    with torch.no_grad():
        trained.model.norm.weight.fill_(float("nan"))
    weights["model.norm.weight"] = trained.model.norm.weight.detach()
    save_file(weights, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="export gate: reloaded logits differ"):
        check_export(tmp_path / "copy", trained, gate_conversations(config.data.max_pixels))


def test_a_corrupt_validation_image_is_counted(
    casa_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(casa_run, tmp_path / "run")
    shutil.copytree(data_dir, tmp_path / "data")
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace(str(data_dir), f"{tmp_path}/data"))
    split = Split(tmp_path / "data" / "validation")
    row = next(r for r in split.index.to_pylist() if r["image_offsets"])
    with (split.directory / split.meta["shards"][row["shard"]]["name"]).open("r+b") as file:
        file.seek(row["image_offsets"][0] + 30)
        file.write(b"\0" * (row["image_sizes"][0] - 30))
    result = evaluate_run(tmp_path / "run", tmp_path / "run" / "export")
    assert result["skipped"] == {"unreadable_image": 1}
    assert result["questions"] == 23
    report(tmp_path / "run")
