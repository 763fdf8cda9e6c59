"""What a start, a report and wandb say and do in the cases that come up on an ordinary day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from casa_train import __version__
from casa_train.checkpoint.resume import check_resume
from casa_train.checkpoint.saved import SavedCheckpoint
from casa_train.config.compose import compose_config
from casa_train.config.schema import Config, MetricsConfig
from casa_train.cost.dry_run import dry_run
from casa_train.engine.engine import init_processes
from casa_train.errors import RankError, UserError
from casa_train.io.log import read_json_lines
from casa_train.metrics.sinks.guarded import Guarded
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.metrics.sinks.opening import open_sinks
from casa_train.metrics.sinks.wandb import LONGEST_NAME, run_name
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.modeling.mechanisms import build_mechanism
from casa_train.report.run_report import _quarantine
from casa_train.run.directory import prepare_run_directory
from casa_train.run.starts import read_starts
from casa_train.setup.pretrained import Account
from casa_train.setup.weights import NO_BACKBONE
from tests.helpers.commands import ROOT

# ------------------------------------------------------------------------------ lines of JSON


@pytest.mark.parametrize(
    "cut", [b'{"source": "a", "ke', '{"key": "café'.encode()[:-1], b"7", b"null", b"\xff\xfe"]
)
def test_lines_cut_by_a_kill_are_left_out(tmp_path: Path, cut: bytes) -> None:
    """The last one, and one that the next start ended and went on behind."""
    whole = [{"source": "a", "key": str(i), "step": i, "start": i, "time": 1.5} for i in (1, 2)]
    lines = [json.dumps(line).encode() for line in whole]
    for name in ("quarantine_0.jsonl", "metrics.jsonl", "starts.jsonl"):
        (tmp_path / name).write_bytes(lines[0] + b"\n" + cut + b"\n" + lines[1] + b"\n" + cut)
    assert read_json_lines(tmp_path / "metrics.jsonl") == whole
    assert _quarantine(tmp_path) == whole
    assert read_metrics(tmp_path / "metrics.jsonl") == whole
    assert [start["step"] for start in read_starts(tmp_path / "starts.jsonl")] == [1, 2]


def test_a_sample_that_two_ranks_quarantined_counts_once(tmp_path: Path) -> None:
    line = json.dumps({"source": "a", "key": "1", "reason": "r"}) + "\n"
    for rank, lines in enumerate((line, line + line)):
        (tmp_path / f"quarantine_{rank}.jsonl").write_text(lines)
    assert len(_quarantine(tmp_path)) == 1


# ------------------------------------------------------------------------------ what is said


def test_other_data_is_named_by_what_differs() -> None:
    there = {f"source_{i}": f"digest{i}" for i in range(210)}
    now = {**there, "source_7": "else", "new": "x"}
    del now["source_3"]
    stored = {"config": "c", "data": json.dumps(there)}
    found = SavedCheckpoint(5, Path("run/checkpoints/step_5"), {}, {"fingerprints": stored}, None)
    with pytest.raises(UserError) as caught:
        check_resume(
            found, {"config": "c", "data": json.dumps(now), "plan": "{}"}, compose_config([]), "c"
        )
    message = str(caught.value)
    for words in (
        "of 210 sources there and 210 now",
        "1 not named now (source_3)",
        "1 new (new)",
        "1 of other content (source_7)",
    ):
        assert words in message, message
    assert "digest" not in message and len(message) < 400
    with pytest.raises(UserError, match=r"210 of other content \(source_0, .*source_7, \.\.\.\)"):
        changed = json.dumps({name: "x" for name in there})
        check_resume(found, {"config": "c", "data": changed, "plan": "{}"}, compose_config([]), "c")


def test_a_dry_run_without_a_backbone_names_the_field() -> None:
    with pytest.raises(UserError) as caught:
        dry_run(compose_config(["model=pretrained", "dry_run=true"]))
    assert str(caught.value) == NO_BACKBONE


def test_a_dry_run_needs_no_template_token(tmp_path: Path) -> None:
    """Nor a tokenizer that has it."""
    overrides = ["model=pretrained", "model.backbone.pretrained=kyutai/helium-1-2b"]
    overrides += ['model.template.bos="<|nothing|>"', "model.tokenizer=/nowhere", "dry_run=true"]
    assert any("Parameters" in line for line in dry_run(compose_config(overrides)))


def test_fields_of_a_template_need_no_plus_with_a_pretrained_model() -> None:
    config = compose_config(
        ["model=pretrained", "model.template.system=x", "model.template.system_always=true"]
    )
    assert (config.model.template.system, config.model.template.system_always) == ("x", True)


@pytest.mark.fresh
def test_the_version_is_ours() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "casa_train", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"casa_train {__version__}")


def test_left_over_variables_of_slurm_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_PROCID", "1")
    # Whichever task the shell takes itself for, it is this one that says it.
    with pytest.raises(RankError, match="SLURM_NTASKS is 8 .*unset SLURM_NTASKS SLURM_PROCID"):
        init_processes()
    assert "RANK" not in os.environ


@pytest.mark.parametrize(
    ("fusion", "copied"),
    [
        ({"mechanism": "casa"}, {"norm", "q_proj", "k_proj", "v_proj", "o_proj"}),
        ({"mechanism": "casa", "init": "zero_output"}, {"norm", "q_proj", "k_proj", "v_proj"}),
        ({"mechanism": "casa", "init": "random"}, set()),
        ({"mechanism": "hyper_attention"}, {"k_proj", "v_proj"}),
        ({"mechanism": "gated_cross_attention"}, set()),
    ],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_copied_tensors_are_those_that_equal_their_block_s(
    fusion: dict[str, Any], copied: set[str]
) -> None:
    from casa_train.modeling.modeling_casa import CasaForConditionalGeneration

    text = {"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "vocab_size": 64}
    text |= {"intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "fullatt_block_indexes": [0]}
    config = CasaConfig(text_config=text, vision_config=vision, fusion=fusion)
    model = CasaForConditionalGeneration(config)
    (layer,) = model.model.layers
    for parameter in layer.parameters():
        parameter.data.uniform_(0.5, 1.0)
    model.mechanism.initialise(layer)
    own = dict(layer.named_parameters())
    norm = own["input_layernorm.weight"]
    equal = set()
    for name, value in own.items():
        if name.startswith("fusion."):
            part = name.split(".")[1]
            origin = own.get(name.replace("fusion.", "self_attn."), norm)
            same = value.shape == origin.shape and bool((value == origin).all())
            claimed = model.mechanism.copied(f"model.layers.0.{name}")
            assert claimed == same, name
            equal |= {part} if same else set()
    assert equal == copied
    assert build_mechanism(fusion, config.text_config).copied("lm_head.weight") is False


def test_copied_tensors_are_counted_apart() -> None:
    account = Account("backbone", "here", loaded=["a"], copied=["b", "c"], new=["d"])
    words = "1 tensors loaded from here, 2 copied from the blocks they stand in, 1 newly init"
    assert words in account.line()


# ------------------------------------------------------------------------------ wandb


def test_wandb_that_is_disabled_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    config = Config(name="unit", metrics=MetricsConfig(tensorboard=False, wandb=True))
    for sink in open_sinks(config, tmp_path / "metrics.jsonl", 0):
        sink.close()
    output = capsys.readouterr().out
    assert "WANDB_MODE=disabled" in output and "offline" not in output
    assert not (tmp_path / "wandb").exists() and not (tmp_path / "wandb_id").exists()


def test_jobs_of_a_sweep_have_names_of_their_own() -> None:
    assert run_name("demo", Path("runs/demo,fusion=casa")) == "demo,fusion=casa"
    assert run_name("demo", Path("/scratch/of_mine")) == "demo"
    long = [run_name("demo", Path("runs/demo," + 150 * "x" + f",seed={i}")) for i in (1, 2)]
    assert len({*long}) == 2 and {len(name) for name in long} == {LONGEST_NAME}


@pytest.mark.parametrize("tag", ["", "x" * 65])
def test_tags_that_wandb_refuses_are_named_at_the_start(tag: str) -> None:
    with pytest.raises(UserError, match="metrics.wandb_tags is .*1 to 64 characters"):
        compose_config([f"metrics.wandb_tags=[a,'{tag}']"])
    compose_config([f"metrics.wandb_tags=[{'x' * 64}]"])


@pytest.mark.parametrize("project", ["", "a/b", "a:b", "x" * 129])
def test_projects_that_wandb_refuses_are_named_at_the_start(project: str) -> None:
    with pytest.raises(UserError, match="metrics.wandb_project is .*1 to 128 characters"):
        compose_config([f"metrics.wandb_project='{project}'"])


def test_a_page_of_text_becomes_one_line() -> None:
    said: list[str] = []

    def fail() -> Any:
        raise ValueError("\n".join(f"line {i}" for i in range(500)))

    Guarded("metrics.wandb", fail, said.append)
    assert len(said) == 1 and "\n" not in said[0] and len(said[0]) < 450


# ------------------------------------------------------------------------------ starting over


def test_a_linked_directory_stays_linked_when_a_run_starts_over(tmp_path: Path) -> None:
    config = compose_config(["checkpoint.resume=never"])
    run, disk = tmp_path / "run", tmp_path / "disk"
    run.mkdir()
    disk.mkdir()
    (run / "checkpoints").symlink_to("../disk")
    for attempt in (1, 2):
        (disk / f"step_{attempt}").mkdir()
        prepare_run_directory(run, config)
        assert (run / "checkpoints").resolve() == disk
        assert [p.name for p in disk.iterdir() if p.name.startswith("step")] == []
        assert (run / f"previous_{attempt}" / "checkpoints" / f"step_{attempt}").is_dir()
        assert (disk / f"previous_{attempt}" / f"step_{attempt}").is_dir()


# ------------------------------------------------------------------------------ make


def test_make_leaves_pip_its_errors_alone() -> None:
    lines = [line for line in (ROOT / "Makefile").read_text().splitlines() if "pip install" in line]
    assert len(lines) == 9 and all(" -qq " in line for line in lines)
