"""A run with adapters from end to end: two ranks, a kill, a resume, both exports, a later stage."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from casa_train.errors import UserError
from casa_train.evaluate.benchmarks.kept import weights_digests
from casa_train.export.from_run import export
from casa_train.export.loading import load_model
from tests.helpers.commands import ROOT, environment, run, train_command
from tests.helpers.once import once
from tests.helpers.runs import exact, short_run, wait_for_step

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow

ADAPTERS = [
    "model.backbone.trainable=lora",
    "model.backbone.lora.rank=3",
    "model.backbone.lora.alpha=7",
    "model.backbone.lora.dropout=0.2",
    "optim.groups.lora.lr=0.02",
    "parallel.activation_checkpointing=all",
    "trainer.worst_case=true",  # takes no random numbers from the dropout of later steps
]


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps on two ranks that nothing happens to."""
    return once(
        tmp_path_factory,
        "adapted",
        lambda run_dir: run(train_command(short_run(data_dir, run_dir, *ADAPTERS), processes=2)),
    )


@pytest.fixture(scope="module")
def exports(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both exports of it, `merged` and `kept`, and what was said of the first."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "said").write_text(export(trained, folder / "merged"))
        export(trained, folder / "kept", lora="keep")

    return once(tmp_path_factory, "adapted_exports", make)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(3, 40)[None]).logits
    return out


def test_a_killed_run_with_dropout_resumes_bit_for_bit(
    data_dir: Path, trained: Path, tmp_path: Path
) -> None:
    command = train_command(short_run(data_dir, tmp_path / "killed", *ADAPTERS), processes=2)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_for_step(tmp_path / "killed", 6, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = run(command)
    assert "resuming from" in done.stdout
    assert exact(tmp_path / "killed") == exact(trained)


def test_the_merged_export_is_pefts_own_merge(exports: Path) -> None:
    said = (exports / "said").read_text()
    assert re.search(r"adapters: merged, logits equal to \d\.\de-0[5-9] before rounding", said)
    base = AutoModel.from_pretrained(exports / "kept", trust_remote_code=True).eval()
    adapted = peft.PeftModel.from_pretrained(
        base, str(exports / "kept"), subfolder="adapter"
    ).eval()
    before = logits_of(adapted)
    merged = adapted.merge_and_unload()
    ours = load_file(exports / "merged" / "model.safetensors")
    theirs = {name: value for name, value in merged.state_dict().items() if name in ours}
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7)
    plain = AutoModel.from_pretrained(exports / "merged", trust_remote_code=True).eval()
    torch.testing.assert_close(logits_of(plain), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits_of(load_model(exports / "kept", "auto")), before)
    # Adapters did something, and lie apart from weights under their plain names.
    weights = load_file(exports / "kept" / "model.safetensors")
    assert weights.keys() == ours.keys()
    differ = {name for name in ours if not torch.equal(weights[name], ours[name])}
    assert len(differ) == 14 and not any(".fusion." in name for name in differ)
    assert "adapter/adapter_model.safetensors" in weights_digests(exports / "kept")


def test_weights_without_their_adapters_do_not_answer(exports: Path) -> None:
    base = AutoModel.from_pretrained(exports / "kept", trust_remote_code=True).eval()
    with pytest.raises(ValueError, match="keeps in adapter/ and which are not loaded"):
        logits_of(base)
    base.config.kept_adapter = None
    assert logits_of(base).isfinite().all()


def test_a_kept_export_wants_peft(exports: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="kept/adapter: adapters .* need the package peft"):
        load_model(exports / "kept", "auto")


def test_a_later_stage_from_either_export_begins_alike(
    data_dir: Path, exports: Path, tmp_path: Path
) -> None:
    found = []
    for name in ("kept", "merged"):
        more = [f"model.init_from={exports / name}", "model.backbone.trainable=false"]
        more += ["trainer.steps=1", "optim.warmup_steps=0", "optim.decay_steps=0"]
        done = run(train_command(short_run(data_dir, tmp_path / name, *more)))
        assert ("its adapters merged into the weights" in done.stdout) == (name == "kept")
        found.append(exact(tmp_path / name)[0]["loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_adapters_that_are_not_there_cannot_be_kept(tmp_path: Path, trained: Path) -> None:
    config = trained / "config.yaml"
    text = config.read_text()
    plain = tmp_path / "plain"
    plain.mkdir()
    changed = text.replace("trainable: lora", "trainable: true")
    changed = re.sub(r"rank: 3", "rank: 16", re.sub(r"alpha: 7\.0", "alpha: 32.0", changed))
    changed = re.sub(r"dropout: 0\.2", "dropout: 0.0", changed)
    (plain / "config.yaml").write_text(changed)
    with pytest.raises(UserError, match="--lora keep: the run .* has no adapters"):
        export(plain, tmp_path / "out", lora="keep")
