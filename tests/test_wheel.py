"""The project as users install it: an archive, a wheel made from that, used in another folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.commands import ROOT, environment

BUILD = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
MINE = "# @package _global_\ndefaults:\n  - demo\nname: mine\ntrainer: {steps: 77}\n"


pytestmark = [pytest.mark.slow, pytest.mark.fresh]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which pip installed the wheel of a copy of this checkout."""
    base = tmp_path_factory.mktemp("wheel")
    source = base / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("casa_train", "conf", "data_recipes", "launch"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    offline = ["--no-build-isolation", "--no-index", "--no-deps", "--disable-pip-version-check"]

    def call(*command: str) -> None:
        done = subprocess.run(command, cwd=source, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    call(sys.executable, "-c", BUILD, str(base / "dist"))
    (archive,) = (base / "dist").glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip"]
    call(*pip, "wheel", *offline, "--wheel-dir", str(base / "dist"), str(archive))
    (wheel,) = (base / "dist").glob("*.whl")
    call(*pip, "install", *offline, "--target", str(base / "site"), str(wheel))
    return base / "site"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A folder with a user's own experiment in `mine/`."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "mine.yaml").write_text(MINE)
    return tmp_path


def run_installed(
    site: Path, folder: Path, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    """A command of the installed project; its folder is the only way to it."""
    env = {**environment(), "PYTHONPATH": str(site), **more}
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_a_wheel_holds_every_file(site: Path) -> None:
    for here, there in (
        ("casa_train", "casa_train"),
        ("conf", "casa_train/conf"),
        ("data_recipes", "data_recipes"),
        ("launch", "launch"),
    ):
        assert files(ROOT / here) - files(site / there) == set(), here
    assert "experiment/demo.yaml" in files(site / "casa_train" / "conf")
    assert os.access(site / "launch" / "torchrun.sh", os.X_OK)
    assert sorted(p.name for p in site.iterdir() if not p.name.endswith(".dist-info")) == [
        "casa_train",
        "data_recipes",
        "launch",
    ]


def test_an_installed_project_starts_in_any_folder(site: Path, elsewhere: Path) -> None:
    where = "import casa_train, launch.submit; print(casa_train.__file__, launch.submit.__file__)"
    env = {**environment(), "PYTHONPATH": str(site)}
    found = subprocess.check_output(
        [sys.executable, "-c", where], cwd=elsewhere, env=env, text=True
    )
    assert found.split() == [str(site / "casa_train/__init__.py"), str(site / "launch/submit.py")]

    # In one process the project's experiment and the user's own, which is a change of it, with a
    # ready template, too, which the package reads by itself.
    own = ["-m", "--config-dir", "mine", "+experiment=demo,mine"]
    own += ["model.template=chatml", "dry_run=true"]
    done = run_installed(site, elsewhere, "casa_train", *own)
    assert done.returncode == 0, done.stderr
    assert "casa_train dry run: demo" in done.stdout
    assert "casa_train dry run: mine" in done.stdout and "77" in done.stdout
    # And without a folder of one's own.
    done = run_installed(site, elsewhere, "casa_train", "+experiment=demo")
    assert done.returncode == 2
    assert "tokenizer 'demo_data/tokenizer'" in done.stderr and "Traceback" not in done.stderr


def test_an_installed_project_is_frozen_by_its_packages(site: Path, elsewhere: Path) -> None:
    (elsewhere / "bin").mkdir()
    sbatch = elsewhere / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 4711\n")
    sbatch.chmod(0o755)
    options = ["--nodes", "1", "--gpus-per-node", "2", "--config-dir", "mine", "+experiment=mine"]
    path = f"{sbatch.parent}:{os.environ['PATH']}"
    done = run_installed(site, elsewhere, "launch.submit", *options, PATH=path)
    assert done.returncode == 0, done.stderr
    assert "submitted job 4711" in done.stdout and "installed" in done.stdout
    (folder,) = (elsewhere / "runs" / "submissions").iterdir()
    for name in ("casa_train", "launch"):
        assert files(folder / "code" / name) == files(site / name)
    # As the batch script starts it: the snapshot's code, without the user's own folder.
    frozen = ["--config-path", str(folder / "jobs" / "0"), "--config-name", "config"]
    shown = [*frozen, "--cfg", "job", "--package", "trainer.steps"]
    done = run_installed(folder / "code", elsewhere, "casa_train", *shown)
    assert done.returncode == 0, done.stderr
    assert "77" in done.stdout
