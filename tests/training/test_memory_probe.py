"""The worst-case pack before the first step: it changes nothing, and a lack of memory is named."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from casa_train.training.memory_probe import is_out_of_memory, wanted
from tests.helpers.commands import TINY, on_data, run, train_command
from tests.helpers.full_pack_steps import CASES, composed
from tests.helpers.runs import exact


@pytest.mark.slow
def test_training_is_the_same_bit_for_bit_and_a_lack_of_memory_is_named() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run(
        [*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.full_pack_steps"], check=False
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    trained = [line for line in found if "same" in line]
    assert [line["case"] for line in trained] == list(CASES), done.stderr[-3000:]
    assert all(line["same"] for line in trained), trained
    assert all(min(line["without"]["norms"]) > 0 for line in trained)
    assert "160 text and 63 image tokens" in trained[0]["said"][0]

    # Rank 1 has no memory in its forward pass: both ranks leave with the same message.
    both = [line for line in found if line["case"] == "too large, forward"]
    assert {line["rank"] for line in both} == {0, 1}
    assert {line["error"] for line in both} == {"UserError"}
    assert both[0]["message"] == both[1]["message"]
    for words in ("data.image_tokens=1024", "on rank 1", "GiB", "activation_checkpointing=all"):
        assert words in both[0]["message"]
    # In its backward pass rank 0 waits for its gradients: rank 1 alone says it, and soon.
    alone = [line for line in found if line["case"] == "too large, backward"]
    assert [(line["rank"], line["error"]) for line in alone] == [(1, "RankError")]


@pytest.mark.slow
def test_a_run_with_it_has_the_metrics_of_one_without(data_dir: Path, tmp_path: Path) -> None:
    for name, asked in (("with", "true"), ("without", "false")):
        overrides = [
            "+experiment=demo",
            *TINY,
            *on_data(data_dir),
            f"run_dir={tmp_path / name}",
            "trainer.steps=4",
            f"trainer.worst_case={asked}",
        ]
        done = run(train_command(overrides))
        assert ("worst case: a pack of 160 text and 63 image" in done.stdout) == (name == "with")
    assert exact(tmp_path / "with") == exact(tmp_path / "without")


def test_it_runs_by_default_where_there_is_a_gpu() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert wanted(composed(), gpu) and not wanted(composed(), cpu)
    assert wanted(composed("trainer.worst_case=true"), cpu)
    assert not wanted(composed("trainer.worst_case=false"), gpu)


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 50)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
