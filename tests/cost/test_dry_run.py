"""Dry runs: every experiment and every sweep at its real size, and what the report says."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hydra import compose, initialize_config_dir

from casa_train.config.compose import to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.explain import explain
from casa_train.config.schema import Config
from casa_train.cost.dry_run import dry_run
from casa_train.cost.memory import logits_bytes, state_bytes
from casa_train.cost.sizes import RECORDED
from casa_train.data.tokens import save_tokenizer
from casa_train.errors import UserError
from casa_train.setup.weights import open_sources
from data_recipes.synthetic import build_tokenizer
from tests.helpers.commands import environment, run


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def names(folder: str) -> list[str]:
    return sorted(path.stem for path in (CONF_DIR / folder).glob("*.yaml"))


def raw(*overrides: str, hydra: bool = False) -> Any:
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return compose("train", overrides=list(overrides), return_hydra_config=hydra)


@functools.cache  # half a second each, most of it for the names of the sources
def composed(*overrides: str) -> Config:
    return to_config(raw(*overrides, "dry_run=true"))


REPORTS: dict[str, list[str]] = {}  # behind the first line, which names the run


# What a make target makes first, where there are no sizes before.
MADE_FIRST = {
    "demo_smollm": "demo_smollm_data/SmolLM2-135M-Instruct",
    "abilities_text": "runs/abilities_recited/export",
    "abilities_tower": "runs/abilities_text/export",
    "abilities": "runs/abilities_text/export",
}
FROM_NOTHING = ["model.backbone.pretrained=null", "model.vision.pretrained=null"]


def report(*overrides: str) -> str:
    """Experiments and jobs of sweeps are often one and the same model."""
    config = composed(*overrides)
    same = repr(replace(config, name="", run_dir=""))
    if same not in REPORTS:
        first, *REPORTS[same] = dry_run(config)
        assert first.startswith(f"casa_train dry run: {config.name}, "), first
    return "\n".join(REPORTS[same])


def number(text: str, row: str, column: int) -> float:
    """A number of a table: its row begins with `row`, columns are counted from 0."""
    lines = [line.strip().split("  ", 1) for line in text.partition("Parameters")[2].splitlines()]
    numbers = next(line[1] for line in lines if line[0] == row and len(line) > 1).split()
    return float(numbers[column].replace(",", ""))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("experiment"))
def test_every_experiment_dry_runs(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert composed(f"+experiment={name}").name == name
    if name in MADE_FIRST:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=f"'{MADE_FIRST[name]}' cannot be"):
            report(f"+experiment={name}")
        return
    text = report(f"+experiment={name}")
    assert all(len(line) <= 100 for line in text.splitlines())
    assert ("RECORDED" in text) == (not name.startswith(("demo", "abilities")))


@pytest.mark.slow
@pytest.mark.parametrize("name", names("sweep"))
def test_every_job_of_a_sweep_dry_runs(name: str) -> None:
    params = raw(f"+sweep={name}", hydra=True).hydra.sweeper.params
    choices = [[f"{key}={v}" for v in str(values).split(",")] for key, values in params.items()]
    jobs = list(itertools.product(*choices))
    first = FROM_NOTHING if name.startswith("abilities") else []
    reports = {report(f"+sweep={name}", *first, *job) for job in jobs}
    assert len(jobs) > 2
    # Positions and first values cost nothing; every other switch shows.
    if name in ("fusion", "switches", "every", "efficiency", "abilities_fast"):
        assert len(reports) == len(jobs)


def test_a_sweep_takes_another_experiment() -> None:
    assert composed("+sweep=switches", "experiment=demo").name == "demo"
    with pytest.raises(Exception, match="Multiple values") as caught:
        raw("+sweep=switches", "+experiment=demo")
    assert "write experiment=NAME" in explain(caught.value)


def test_numbers_of_the_casa_recipe() -> None:
    text = report("+experiment=helium_casa")
    layers, width, keys, ffn, vocabulary = 28, 2048, 1024, 8192, 64_000
    attention = 2 * width * (width + keys)
    assert number(text, "fusion", 2) == 1e-4
    assert number(text, "fusion", 0) == layers * (attention + width)
    block = attention + 3 * width * ffn + 2 * width
    assert number(text, "text backbone", 0) == layers * block + 2 * vocabulary * width + width
    # Two operations a multiply-add, three passes; 20,468 image tokens fit the budget.
    texts, images, tera = 2048, 20_468, 1e12
    linears = 6 * texts * layers * (attention + 3 * width * ffn)
    assert number(text, "LLM, linears", 2) == pytest.approx(linears / tera, abs=0.01)
    projections = 6 * images * layers * 2 * width * keys
    assert number(text, "fusion, image projections", 2) == pytest.approx(
        projections / tera, abs=0.01
    )
    assert "128 packs on 64 ranks, 2 on each" in text
    assert "40,000 steps, 1,000 of warm-up, 8,000 of decay" in text


@pytest.mark.slow
def test_switches_cost_what_they_should() -> None:
    casa = report("+experiment=helium_casa")
    plain = report("+experiment=helium_ca")
    shared = report("+experiment=helium_ca_shared")
    replaced = report("+experiment=helium_ca_replace")
    inserted = report("+experiment=helium_insertion")
    assert number(plain, "total", 0) == number(casa, "total", 0)
    assert number(shared, "fusion", 0) == number(inserted, "fusion", 0) == 0
    assert number(plain, "fusion, attention", 2) < number(casa, "fusion, attention", 2)
    assert number(replaced, "LLM, self-attention", 2) < number(shared, "LLM, self-attention", 2)
    # Half the budgets, and still more work in the decoder.
    assert number(inserted, "LLM, linears", 2) > 5 * number(casa, "LLM, linears", 2)
    assert "256 packs on 64 ranks, 4 on each" in inserted


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen_ca", "qwen_casa", "helium_casa"])
def test_shared_projections_leave_nothing_new(name: str) -> None:
    own, shared = report(f"+experiment={name}"), report(f"+experiment={name}_shared")
    new = number(own, "fusion", 0)
    assert new > 0 == number(shared, "fusion", 0)
    assert number(own, "total", 0) - number(shared, "total", 0) == new
    # A frozen decoder's projections stay frozen where fusion uses them.
    trained = number(own, "text backbone", 0)
    assert number(shared, "text backbone", 0) == trained and (trained == 0) == ("qwen" in name)


@pytest.mark.slow
def test_activation_checkpointing_shows_in_memory_and_work() -> None:
    plain = report("+experiment=helium_casa")
    every = report("+experiment=helium_casa", "parallel.activation_checkpointing=all")
    assert number(every, "total, estimate", 0) < 0.5 * number(plain, "total, estimate", 0)
    assert number(every, "state", 0) == number(plain, "state", 0)
    # The model's own work, which MFU counts, is the same; its hours are not.
    for row in ("LLM, linears", "fusion, attention", "vision, trained blocks: linears"):
        assert number(every, row, 2) == number(plain, row, 2)
    assert "repeats 24.15 TFLOP" in every and "repeats" not in plain.partition("Assumed")[0]
    assert "540 ms" in every and "479 ms" in plain


@pytest.mark.slow
def test_later_stages_need_an_export_only_to_run(tmp_path: Path) -> None:
    for name in ("qwen_casa_video", "qwen_livecc"):
        with pytest.raises(UserError, match="model.init_from is 'runs/qwen_casa/export'"):
            open_sources(to_config(raw(f"+experiment={name}")))
        assert "is no export here" in report(f"+experiment={name}")
    recorded = json.loads(RECORDED.read_text())["Qwen/Qwen2.5-VL-3B-Instruct"]
    text = {**recorded, "num_hidden_layers": 5, "model_type": "qwen2_5_vl_text"}
    vision = text.pop("vision_config")
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": text, "vision_config": vision})
    )
    told = report("+experiment=qwen_livecc", f"model.init_from={tmp_path}")
    assert "5 blocks of width 2,048, frozen" in told and "RECORDED" not in told


def test_a_directory_comes_before_recorded_sizes(tmp_path: Path) -> None:
    sizes = json.loads(RECORDED.read_text())["kyutai/helium-1-2b"]
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "num_hidden_layers": 3}))
    told = report("+experiment=helium_casa", f"model.backbone.pretrained={tmp_path}")
    words = "".join(told.split())  # lines are broken wherever they are full
    assert "casa in 3 of 3 blocks" in told and f"{tmp_path}:fromits" in words


@pytest.mark.slow
def test_rows_of_added_tokens_count(tmp_path: Path) -> None:
    sizes = json.loads(RECORDED.read_text())["kyutai/helium-1-2b"]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({**sizes, "vocab_size": 500}))
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    base = [f"model.backbone.pretrained={tmp_path}/base", f"model.tokenizer={tmp_path}/tokenizer"]
    plain = report("+experiment=helium_casa", *base)
    told = report("+experiment=helium_casa", *base, "model.backbone.resize_embeddings=true")
    tied = sizes.get("tie_word_embeddings", False)
    rows = (1 if tied else 2) * (len(tokenizer) - 500)
    assert number(told, "total", 0) - number(plain, "total", 0) == 2048 * rows
    assert "500 rows there, 512 with new tokens" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.backbone.pretrained=owner/unknown"],
            ["owner/unknown", "HF_HUB_OFFLINE", "kyutai"],
        ),
        (["planned_ranks=48"], ["data.packs_per_step is 128", "planned_ranks=48"]),
        (["planned_ranks=0"], ["planned_ranks is 0"]),
        (["parallel.activation_checkpointing=some"], ["is 'some'", "none, decoder, vision or all"]),
        (["fusion.placement=replace"], ["placement"]),
        (["model.vision.train_last_blocks=33"], ["train_last_blocks is 33"]),
        (["optim.groups.fusion.patterns=[nothing]"], ["matches no group"]),
    ],
)
def test_mistakes_are_named(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        report("+experiment=helium_ca", *overrides)
    for word in words:
        assert word in str(caught.value)


KIND = "model.backbone.config.model_type="


def test_a_new_backbone_of_another_kind_by_its_own_defaults() -> None:
    """SmolLM3's padding token lies far behind a small vocabulary; Qwen3's heads may be wide."""
    plain = number(report("+experiment=demo"), "text backbone", 0)
    assert number(report("+experiment=demo", KIND + "smollm3"), "text backbone", 0) == plain
    wide = [KIND + "qwen3", "+model.backbone.config.head_dim=48"]
    # In each of 3 layers: queries and outputs of 4 heads, keys and values of 2, 16 wider than
    # width / heads, and norms of a query's and a key's head.
    more = 3 * (2 * 4 * 16 * 128 + 2 * 2 * 16 * 128 + 2 * 48)
    assert number(report("+experiment=demo", *wide), "text backbone", 0) == plain + more


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([KIND + "mistral"], "'mistral' with sliding_window=4096 is not supported"),
        (
            [KIND + "smollm3", "+model.backbone.config.no_rope_layers=[1]"],
            r"has no_rope_layers \[1\]; expected a number for each of its 3 layers",
        ),
        (
            [KIND + "qwen3", "+model.backbone.config.layer_types=[sliding_attention]"],
            "layer_types",
        ),
        ([KIND + "gemma3_text"], "model_type: backbone 'gemma3_text' is not supported; choose"),
    ],
)
def test_backbones_that_are_not_reproduced_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        report("+experiment=demo", *overrides)


def test_a_mistral_without_windows_is_taken() -> None:
    null = "+model.backbone.config.sliding_window=null"
    plain = number(report("+experiment=demo"), "text backbone", 0)
    assert number(report("+experiment=demo", KIND + "mistral", null), "text backbone", 0) == plain


@pytest.mark.fresh
@pytest.mark.slow
def test_the_command_touches_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from casa_train.__main__ import run\n"
        "sys.argv[1:] = ['-m', '+sweep=init', 'experiment=demo', 'dry_run=true', "
        f"'hydra.sweep.dir={tmp_path}', 'fusion.every=1,9']\n"
        "assert run() == 2; assert 'deepspeed' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("casa_train dry run: demo") == 3
    assert done.stderr.count("fusion.every is 9") == 3  # a failed job stops no other
    assert [path.name for path in tmp_path.iterdir()] == ["multirun.yaml"]


@pytest.mark.slow
def test_state_is_what_deepspeed_holds() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = run([*torchrun, "--nproc_per_node=2", "-m", "tests.helpers.zero_memory"])
    stages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(stages) == 3 and all(len(stage) == 5 for stage in stages)
    for stage in stages:
        assert {name: found for name, (found, _) in stage.items()} == {
            name: expected for name, (_, expected) in stage.items()
        }


def test_state_by_hand() -> None:
    groups, frozen = [[10, 7], [400_000]], [200_001, 9]
    total = 400_017
    one = state_bytes(groups, frozen, 2, 4, "bf16")
    # Each group is padded to a multiple of twice the ranks, then cut: 24 and 400,000 by four.
    own = 6 + 100_000
    assert one == {
        "parameters that train": 2 * total,
        "frozen parameters": 2 * 200_010,
        "gradients": 4 * own,
        "fp32 masters": 4 * own,
        "Adam's moments": 8 * own,
        "reduction bucket": 2 * total,
    }
    assert state_bytes(groups, frozen, 1, 4, "fp32")["gradients"] == 4 * total
    large = state_bytes([[2_000_000_000]], [], 2, 4, "bf16")
    assert large["reduction bucket"] == 2 * 500_000_000  # DeepSpeed's default is the most
    three = state_bytes(groups, frozen, 3, 4, "bf16")
    # Tensor by tensor: 3 + 2 + 100,000 of those that train.
    assert three["parameters that train"] == 2 * 100_005
    assert three["frozen parameters"] == 2 * (50_001 + 3)
    assert logits_bytes(10, 100, "bf16") == 14_000
