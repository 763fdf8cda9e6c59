"""The real command on 2 ranks, then 1, then 4: the same samples, and the run of one that stayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from casa_train.checkpoint.slices import read_weights
from casa_train.export.from_run import export
from casa_train.metrics.sinks.jsonl import read_metrics
from tests.helpers.commands import TINY, on_data, run, train_command

pytestmark = pytest.mark.slow


def test_a_frozen_backbone_under_zero_1_in_bf16_on_2_1_and_4_ranks(
    data_dir: Path, tmp_path: Path
) -> None:
    def start(name: str, steps: int, ranks: int) -> str:
        overrides = [
            "+experiment=demo",
            *TINY,
            *on_data(data_dir),
            f"run_dir={tmp_path / name}",
            f"trainer.steps={steps}",
            "checkpoint.resume_allow=[trainer.steps]",
            "checkpoint.every=2",
            "optim.warmup_steps=2",
            "optim.decay_steps=0",
            "data.packs_per_step=4",
            "model.backbone.trainable=false",
            "parallel.zero_stage=1",
            "parallel.precision=bf16",
        ]
        return run(train_command(overrides, processes=ranks)).stdout

    start("stayed", 6, 1)
    start("moved", 2, 2)
    two_to_one, one_to_four = start("moved", 4, 1), start("moved", 6, 4)
    assert "step_2 was saved with world size 2, this start has 1" in two_to_one
    assert "step_4 was saved with world size 1, this start has 4" in one_to_four
    assert "resuming from" in one_to_four and "at step 4" in one_to_four
    stayed, moved = (read_metrics(tmp_path / n / "metrics.jsonl") for n in ("stayed", "moved"))
    assert [record["step"] for record in moved] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(stayed, moved, strict=True):
        for name in ("samples_digest", "rates", "answer_tokens", "text_tokens", "image_tokens"):
            assert other[name] == one[name], name
        assert other["loss"] == pytest.approx(one["loss"], abs=0.02)
        assert other["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0.05)
    export(tmp_path / "moved", tmp_path / "export")
    exported = load_file(tmp_path / "export" / "model.safetensors")
    saved = {n: read_weights(tmp_path / n / "checkpoints" / "step_6") for n in ("stayed", "moved")}
    for name, weight in exported.items():
        assert torch.equal(weight, saved["moved"][name].bfloat16()), name
    frozen = [name for name in exported if "layers" in name and "fusion" not in name]
    assert len(frozen) == 2 * 9  # two layers
    for name in frozen:
        assert torch.equal(saved["moved"][name], saved["stayed"][name]), name

    # The newest one is damaged: two ranks fall back to what one rank saved, and repeat two steps.
    slices = max((tmp_path / "moved/checkpoints/step_6").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(slices.read_bytes())
    content[len(content) // 2] ^= 1
    slices.write_bytes(content)
    back = start("moved", 6, 2)
    assert "step_4 was saved with world size 1, this start has 2" in back
    again = read_metrics(tmp_path / "moved" / "metrics.jsonl")
    assert [record["step"] for record in again] == [1, 2, 3, 4, 5, 6]
    assert again[:4] == moved[:4]
    for one, other in zip(moved[4:], again[4:], strict=True):
        assert other["samples_digest"] == one["samples_digest"]
        assert other["loss"] == pytest.approx(one["loss"], abs=0.02)
