"""launch/submit.py: what a submission freezes, what it asks of SLURM, and what it refuses."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from casa_train.config.compose import to_config
from casa_train.errors import UserError
from casa_train.run.provenance import code_commit
from launch.submit import (
    ROOT,
    Code,
    Installed,
    Job,
    batch_script,
    compose_jobs,
    frozen_yaml,
    main,
    write,
)

DEMO = ["+experiment=demo", "data.packs_per_step=32"]


def read_frozen(directory: Path) -> Job:
    with initialize_config_dir(str(directory), version_base="1.3"):
        return Job([], to_config(compose("config")))


def test_a_frozen_configuration_is_the_composed_one(tmp_path: Path) -> None:
    (job,) = compose_jobs([*DEMO, "name=a b", "fusion=insertion", "seed=7"], array=False)
    (tmp_path / "config.yaml").write_text(frozen_yaml(job))
    assert read_frozen(tmp_path).config == job.config
    assert job.config.seed == 7 and job.config.run_dir == "runs/a b"


def test_a_sweep_is_every_combination_in_directories_of_its_own() -> None:
    jobs = compose_jobs(["+experiment=demo", "fusion=casa,insertion", "seed=0,1"], array=True)
    assert [(j.config.fusion["mechanism"], j.config.seed, j.config.run_dir) for j in jobs] == [
        ("casa", 0, "runs/demo,fusion=casa,seed=0"),
        ("casa", 1, "runs/demo,fusion=casa,seed=1"),
        ("insertion", 0, "runs/demo,fusion=insertion,seed=0"),
        ("insertion", 1, "runs/demo,fusion=insertion,seed=1"),
    ]


def test_a_named_sweep_is_read_from_conf() -> None:
    jobs = compose_jobs(["+sweep=every", "experiment=demo"], array=True)
    assert [j.config.fusion["every"] for j in jobs] == [1, 2, 4]
    assert [j.config.run_dir for j in jobs] == [f"runs/demo,fusion.every={n}" for n in (1, 2, 4)]
    with pytest.raises(UserError, match="run_dir=x beside --array: .*hydra.sweep.dir"):
        compose_jobs(["+experiment=demo", "seed=1,2", "run_dir=x"], array=True)


def test_a_value_given_again_takes_the_place_of_the_sweep_s_own(tmp_path: Path) -> None:
    """As under -m, where the last one counts and stands where the key stood first."""
    sweep = tmp_path / "conf" / "sweep" / "mine.yaml"
    sweep.parent.mkdir(parents=True)
    params = "      seed: 3,4\n      fusion: casa,insertion\n"
    head = (
        "# @package _global_\ndefaults:\n  - /experiment: demo\nhydra:\n  sweeper:\n    params:\n"
    )
    sweep.write_text(head + params)
    for given, seeds in ((["seed=8"], [8]), (["seed=8,9"], [8, 9])):
        jobs = compose_jobs(["+sweep=mine", *given], True, tmp_path / "conf")
        assert [Path(job.config.run_dir).name for job in jobs] == [
            f"demo,seed={seed},fusion={name}" for seed in seeds for name in ("casa", "insertion")
        ]
        assert [job.config.seed for job in jobs] == [seed for seed in seeds for _ in range(2)]


def test_how_many_jobs_run_at_once_is_no_matter_of_an_array(tmp_path: Path) -> None:
    """SLURM starts the tasks; each is one run, under the name that a local sweep gives."""
    sweep = tmp_path / "conf" / "sweep" / "mine.yaml"
    sweep.parent.mkdir(parents=True)
    text = (
        "# @package _global_\ndefaults:\n  - /experiment: demo\nhydra:\n  sweep:\n    jobs: auto\n"
    )
    sweep.write_text(text + "  sweeper:\n    params:\n      seed: 3,4\n")
    for more in ([], ["hydra.sweep.jobs=2", f"hydra.sweep.dir={tmp_path}"]):
        jobs = compose_jobs(["+sweep=mine", *more], True, tmp_path / "conf")
        where = tmp_path if more else Path("runs")
        assert [Path(job.config.run_dir) for job in jobs] == [
            where / "demo,seed=3",
            where / "demo,seed=4",
        ]
        command, _, frozen = frozen_yaml(jobs[1]).partition("\n")
        assert command.startswith("# Composed by") and "jobs:" not in frozen
        (tmp_path / "config.yaml").write_text(frozen)
        assert read_frozen(tmp_path).config == jobs[1].config


def test_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dry-run", "--nodes", "2", "--gpus-per-node", "4", "--time", "10:00:00"]
    where = ["--partition", "big", "--sbatch=--qos=long", "--submissions", str(tmp_path / "s s")]
    assert main([*options, *where, *DEMO]) == 0
    printed = capsys.readouterr().out
    for option in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=big", "qos=long"):
        assert f"#SBATCH --{option}\n" in printed
    for option in ("requeue", "open-mode=append", "signal=USR1@300", "time=10:00:00", "exclusive"):
        assert f"#SBATCH --{option}\n" in printed
    assert f"#SBATCH --output='{tmp_path}/s s/demo-" in printed
    assert "packs_per_step: 32" in printed
    assert not list(tmp_path.iterdir())


def test_an_array_without_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dry-run", "--array", "--max-running", "2", "--gpus-per-node", "0", "--shared"]
    assert main([*options, "+experiment=demo", "data.packs_per_step=4", "seed=1,2,3"]) == 0
    printed = capsys.readouterr().out
    assert "#SBATCH --array=0-2%2\n" in printed and "#SBATCH --ntasks-per-node=1\n" in printed
    assert "gpus-per-node=" not in printed and "--exclusive" not in printed
    assert "job 2: runs/demo,data.packs_per_step=4,seed=3" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["+experiment=demo", "seed=1,2"], "seed=1,2 is a list of values"),
        (["+experiment=demo", "data.packs_per_step=30"], "which 32 tasks do not divide"),
        ([*DEMO, "checkpoint.resume=never"], "start over at every requeue"),
        ([*DEMO, "dry_run=true"], "dry_run is true"),
        ([*DEMO, "sede=1"], "Could not override 'sede'"),
        ([*DEMO, "--nodes", "0"], "--nodes is '0'"),
        ([*DEMO, "--sbatch=-q"], "--sbatch got '-q'"),
        (["--array", *DEMO, "seed=1,1"], "two jobs would write into runs/demo"),
    ],
)
def test_what_would_fail_later_is_refused_now(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dry-run", *arguments]) == 2
    assert message in capsys.readouterr().err


def git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), "-c", "user.name=t", "-c", "user.email=t@t", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_installed_code_has_no_commit_of_the_checkout_around_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("a project of somebody's, with an environment in it\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message=first")
    site = tmp_path / "site-packages"
    (site / "casa_train").mkdir(parents=True)
    (site / "casa_train" / "provenance.py").write_text("")
    assert code_commit(site) is None
    assert code_commit(ROOT) is not None


def test_a_snapshot_holds_tracked_changes_and_leaves_the_checkout_alone(tmp_path: Path) -> None:
    root = tmp_path / "checkout"
    (root / "casa_train").mkdir(parents=True)
    (root / "casa_train" / "a.py").write_text("committed\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message=first")
    head = git(root, "rev-parse", "HEAD").strip()

    clean = tmp_path / "clean"
    clean.mkdir()
    Code.of_checkout(root).write(clean)
    assert (clean / "code/casa_train/a.py").read_text() == "committed\n"
    assert code_commit(clean / "code") == head
    assert not (clean / "changes.patch").exists()

    (root / "casa_train" / "a.py").write_text("changed\n")
    (root / "casa_train" / "new.py").write_text("unknown to git\n")
    before = git(root, "status", "--porcelain")
    changed = tmp_path / "changed"
    changed.mkdir()
    code = Code.of_checkout(root)
    code.write(changed)
    assert (changed / "code/casa_train/a.py").read_text() == "changed\n"
    assert not (changed / "code/casa_train/new.py").exists()
    assert "casa_train/new.py" in code.describe()[1]
    assert code_commit(changed / "code") == head + "+dirty"
    assert "+changed" in (changed / "changes.patch").read_text()
    assert git(root, "status", "--porcelain") == before
    assert git(root, "stash", "list") == ""


def test_mechanisms_of_the_users_own_are_frozen_with_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mine" / "toy.py"
    monkeypatch.setenv("CASA_MECHANISMS", str(file))
    settings, folder = {"job-name": "mine"}, tmp_path / "frozen"
    with pytest.raises(UserError, match=f"CASA_MECHANISMS names {file}"):
        batch_script(settings, folder)
    file.parent.mkdir()
    file.write_text("# a mechanism\n")
    assert f"\nexport CASA_MECHANISMS={folder}/mechanisms/toy.py\n" in batch_script(
        settings, folder
    )
    code = Installed(tmp_path)
    for package in ("casa_train", "data_recipes", "launch"):
        (tmp_path / package).mkdir()
    write(folder, "#!/bin/sh\n", [], code)
    assert (folder / "mechanisms" / "toy.py").read_text() == "# a mechanism\n"
    monkeypatch.delenv("CASA_MECHANISMS")
    assert "CASA_MECHANISMS" not in batch_script(settings, folder)
