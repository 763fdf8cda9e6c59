"""python -m launch.submit +experiment=helium_casa [--nodes 4 ...]: freezes code and configuration,
then gives the run to SLURM.

A job may wait for days and start many times. So a submission is a folder of its own, and nothing
that happens to the checkout afterwards changes the run:

    runs/submissions/NAME-TIME/
      code/                 HEAD and the changes of tracked files, or the installed packages
      changes.patch         those changes, if there are any
      jobs/N/config.yaml    the composed configuration of task N of the array; one job has N = 0
      mechanisms/           the files that CASA_MECHANISMS names, if it does
      job.sbatch            what sbatch got
      submission.json       who, when, from which commit, with which command
      log/                  output of the jobs; a requeued job appends

With --array lists of values make a sweep, one task of a SLURM array a combination:
    python -m launch.submit --array +experiment=demo fusion=casa,insertion seed=0,1
    python -m launch.submit --array +sweep=fusion
"""

from __future__ import annotations

import argparse
import getpass
import itertools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from casa_train import __version__
from casa_train.config.bounds import local_path
from casa_train.config.compose import (
    add_config_dir,
    job_directory,
    refuse_one_directory,
    search_path,
    to_config,
)
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.explain import explain
from casa_train.config.micro_steps import TASKS, micro_steps
from casa_train.config.overrides import as_typed
from casa_train.config.schema import Config
from casa_train.errors import UserError
from casa_train.io.environment import MECHANISMS_VARIABLE, own_mechanism_files
from casa_train.run.provenance import SNAPSHOT_FILE

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "launch/slurm.sbatch"


@dataclass(frozen=True)
class Job:
    """One run: its overrides and what they compose to."""

    overrides: list[str]
    config: Config


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; leaves with 2 after anything that the user can mend."""
    options = parse(arguments)
    try:
        submit(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command; everything else is an override of the configuration."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit",
        description="Freezes code and configuration and gives a run, or a sweep, to SLURM.",
        epilog=f"Where an option is left out, {SCRIPT} decides.",
    )
    parser.add_argument("overrides", nargs="*", help="as for python -m casa_train")
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--gpus-per-node", type=int, help="also the tasks per node; 0: CPUs only")
    parser.add_argument("--cpus-per-task", type=int)
    parser.add_argument("--shared", action="store_true", help="do not ask for whole nodes")
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--time", help="limit of one start, such as 24:00:00")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="more: --sbatch=--qos=long"
    )
    parser.add_argument(
        "--array", action="store_true", help="a sweep: lists of values, +sweep=NAME"
    )
    add_config_dir(parser)
    parser.add_argument("--max-running", type=int, help="tasks of the array at a time")
    parser.add_argument("--submissions", type=local_path, default=Path("runs/submissions"))
    parser.add_argument("--dry-run", action="store_true", help="print, write and submit nothing")
    return parser.parse_intermixed_args(arguments)


def submit(options: argparse.Namespace) -> None:
    """Checks, freezes and submits; prints what it did, or would do.

    :raises UserError: whatever the user can mend, before anything is written.
    """
    imported = CONF_DIR.parents[1]
    if imported != ROOT:
        raise UserError(
            f"casa_train is imported from {imported}; expected this script's own checkout. Run "
            f"python -m launch.submit in {ROOT}."
        )
    jobs = compose_jobs(options.overrides, options.array, options.config_dir)
    settings = sbatch_settings(options, len(jobs), jobs[0].config.name)
    check_jobs(jobs, settings)
    code = Code.of_checkout(ROOT) if (ROOT / "pyproject.toml").is_file() else Installed(ROOT)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = (options.submissions / f"{jobs[0].config.name}-{stamp}").absolute()
    script = batch_script(settings, folder)
    for line in code.describe():
        print(line)
    for number, job in enumerate(jobs):
        print(f"job {number}: {job.config.run_dir}  ({' '.join(job.overrides)})")
    if options.dry_run:
        print(f"would write {folder}/job.sbatch:")
        print(script, end="")
        if len(jobs) == 1:
            print("would freeze this configuration:")
            print(OmegaConf.to_yaml(OmegaConf.structured(jobs[0].config)), end="")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "sbatch was not found; expected SLURM's commands on this machine. Run this on a login "
            "node, or try --dry-run here."
        )
    write(folder, script, jobs, code)
    done = subprocess.run(
        ["sbatch", "--parsable", str(folder / "job.sbatch")], capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(
            f"sbatch refused {folder}/job.sbatch: {done.stderr.strip()}. Mend the options, or the "
            "script, and submit it with sbatch."
        )
    print(f"submitted job {done.stdout.strip()}; output: {folder}/log")


# Configurations


def compose_jobs(
    overrides: Sequence[str], array: bool, config_dir: Path | None = None
) -> list[Job]:
    """Composes every job as `python -m casa_train`, with -m for an array, would.

    :param config_dir: a folder of the user's own with more groups and experiments.
    :raises UserError: what is wrong with the configuration, or lists without --array.
    """
    overrides, where = as_typed(overrides), search_path(config_dir)
    if array:
        refuse_one_directory(overrides, "--array")
    try:
        parser = OverridesParser.create()
        parsed = parser.parse_overrides(list(overrides))
        swept = [o.input_line or "" for o in parsed if o.is_sweep_override()]
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            if not array:
                if swept:
                    raise UserError(
                        f"{swept[0]} is a list of values; expected one value for one job. Add "
                        "--array to make it a sweep."
                    )
                raw = compose("train", [*where, *overrides])
                return [Job(list(overrides), to_config(raw, overrides))]
            plain = [o for o in overrides if o not in swept]
            base = compose("train", [*where, *plain], return_hydra_config=True)
            of_sweep = [f"{k}={v}" for k, v in (base.hydra.sweeper.params or {}).items()]
            choices: dict[str, list[str]] = {}  # of a key given twice the last, as Hydra has it
            for override in parser.parse_overrides([*as_typed(of_sweep), *overrides]):
                key = override.get_key_element()
                if override.is_sweep_override():
                    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
                else:
                    values = [override.input_line or ""]
                choices[key] = values
            jobs = []
            for combination in itertools.product(*choices.values()):
                raw = compose("train", [*where, *combination])
                with open_dict(raw):
                    directory = job_directory(raw.name, combination)
                    raw.run_dir = f"{base.hydra.sweep.dir}/{directory}"
                jobs.append(Job(list(combination), to_config(raw, combination)))
            return jobs
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def check_jobs(jobs: Sequence[Job], settings: dict[str, str]) -> None:
    """Refuses what would fail, or do the wrong thing, once the nodes are there.

    :raises UserError: naming the field.
    """
    world = int(settings["nodes"]) * int(settings["ntasks-per-node"])
    for job in jobs:
        config = job.config
        if config.checkpoint.resume == "never":
            raise UserError(
                "checkpoint.resume is 'never', which would start over at every requeue; expected "
                "'auto'. Choose another name=..., or move the earlier run away."
            )
        if config.dry_run:
            raise UserError(
                "dry_run is true; expected a run. Print it here with python -m casa_train."
            )
        micro_steps(config.data, world, TASKS)
    directories = [job.config.run_dir for job in jobs]
    twice = {d for d in directories if directories.count(d) > 1}
    if twice:
        raise UserError(
            f"two jobs would write into {sorted(twice)[0]}; expected a directory for each. Give "
            "every override once."
        )


def frozen_yaml(job: Job) -> str:
    """A primary configuration for Hydra that composes to `job` without conf/."""
    primary: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "train.yaml"), resolve=False)
    overrides = [
        entry
        for entry in primary["defaults"]
        if isinstance(entry, dict) and next(iter(entry)).startswith("override ")
    ]
    del primary["hydra"]["sweep"]
    frame = {"defaults": [*overrides, "_self_"], "hydra": primary["hydra"]}
    return (
        f"# Composed by launch/submit.py from: {shlex.join(job.overrides)}\n"
        + OmegaConf.to_yaml(OmegaConf.create(frame))
        + OmegaConf.to_yaml(OmegaConf.structured(job.config))
    )


# Code


@dataclass(frozen=True)
class Code:
    """What of the checkout a snapshot holds.

    :param root: the checkout.
    :param head: the commit that it has.
    :param tree: the commit to archive: HEAD, or one of HEAD with the changes of tracked files.
    :param left_out: files that git does not know, in the folders that a run reads.
    """

    root: Path
    head: str
    tree: str
    left_out: list[str]

    @classmethod
    def of_checkout(cls, root: Path) -> Code:
        """:raises UserError: git, or a commit, is missing."""
        head = _git(root, "rev-parse", "--verify", "HEAD").strip()
        # Makes a commit object of the working tree; no branch, index or file is touched. An
        # identity is given because not everybody has set one.
        nobody = ["-c", "user.name=submit", "-c", "user.email=submit@localhost"]
        tree = _git(root, *nobody, "stash", "create").strip() or head
        read = ["casa_train", "conf", "data_recipes", "launch"]
        others = _git(root, "ls-files", "--others", "--exclude-standard", "--", *read)
        return cls(root, head, tree, others.splitlines())

    @property
    def name(self) -> str:
        """As `environment.json` of the run records it."""
        return self.head + ("+dirty" if self.tree != self.head else "")

    def describe(self) -> list[str]:
        lines = [f"code: {self.name}"]
        if self.left_out:
            lines.append(
                f"warning: git does not track {', '.join(self.left_out[:8])}; the snapshot goes "
                "without. Add what the run needs with git add."
            )
        return lines

    def write(self, folder: Path) -> None:
        """Writes the snapshot into a new directory `folder`/code."""
        archive = folder / "code.tar"
        _git(self.root, "archive", "--format=tar", f"--output={archive}", self.tree)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "code", filter="data")
        archive.unlink()
        (folder / "code" / SNAPSHOT_FILE).write_text(self.name + "\n")
        if self.tree != self.head:
            _git(
                self.root,
                "diff",
                "--binary",
                f"--output={folder}/changes.patch",
                self.head,
                self.tree,
            )


@dataclass(frozen=True)
class Installed:
    """What a snapshot holds where the project was installed and there is no checkout.

    :param root: the folder that holds its packages.
    """

    root: Path

    @property
    def name(self) -> str:
        """As `environment.json` of the run records it."""
        return f"casa_train {__version__}, installed"

    def describe(self) -> list[str]:
        return [f"code: {self.name} in {self.root}"]

    def write(self, folder: Path) -> None:
        """Copies the packages into a new directory `folder`/code."""
        for package in ("casa_train", "data_recipes", "launch"):  # conf lies in casa_train
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(self.root / package, folder / "code" / package, ignore=ignored)
        (folder / "code" / SNAPSHOT_FILE).write_text(self.name + "\n")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        detail = (getattr(error, "stderr", "") or str(error)).strip()
        raise UserError(
            f"{root} cannot be frozen: {detail}; expected a git checkout. `sbatch {SCRIPT} "
            "OVERRIDES` runs the code as it lies there."
        ) from error
    return done.stdout


# SLURM


def sbatch_settings(options: argparse.Namespace, jobs: int, name: str) -> dict[str, str]:
    """The script's own #SBATCH options, then the command's; "" stands for an option without value.

    :param jobs: how many runs there are.
    """
    settings: dict[str, str] = {}
    for line in (ROOT / SCRIPT).read_text().splitlines():
        if line.startswith("#SBATCH --"):
            key, _, value = line.removeprefix("#SBATCH --").partition("=")
            settings[key] = value
    settings["job-name"] = name
    settings["chdir"] = str(Path.cwd())
    gpus = options.gpus_per_node
    if gpus is not None:
        settings["gpus-per-node"] = str(gpus)
        settings["ntasks-per-node"] = str(max(1, gpus))
        if gpus == 0:
            del settings["gpus-per-node"]
    if options.shared:
        del settings["exclusive"], settings["mem"]
    for key in ("nodes", "cpus-per-task", "partition", "account", "time"):
        value = getattr(options, key.replace("-", "_"))
        if value is not None:
            settings[key] = str(value)
    if options.array:
        limit = f"%{options.max_running}" if options.max_running else ""
        settings["array"] = f"0-{jobs - 1}{limit}"
    for option in options.sbatch:
        if not option.startswith("--"):
            raise UserError(
                f"--sbatch got {option!r}; expected a long option of sbatch, written as "
                "--sbatch=--qos=long."
            )
        key, _, value = option.removeprefix("--").partition("=")
        settings[key] = value
    for key in ("nodes", "ntasks-per-node"):
        if not settings[key].isdecimal() or int(settings[key]) < 1:
            raise UserError(f"--{key} is {settings[key]!r}; expected a number, at least 1.")
    return settings


def batch_script(settings: dict[str, str], folder: Path) -> str:
    """What sbatch gets: the options, where the frozen things lie, and the snapshot's own script."""
    if sys.version_info < (3, 11):
        raise UserError(
            f"Python {sys.version.split()[0]} puts the current directory's code in front of the "
            "snapshot's; expected 3.11 or newer. Submit with a newer one, or with "
            f"sbatch {SCRIPT}."
        )
    array = "array" in settings
    settings = {**settings, "output": f"{folder}/log/{'%A_%a' if array else '%j'}.out"}
    quoted = shlex.quote
    header = [
        f"#SBATCH --{key}={quoted(value)}" if value else f"#SBATCH --{key}"
        for key, value in settings.items()
    ]
    body = [
        f"# {shlex.join(['python', *sys.argv])}",
        f"export CASA_JOBS={quoted(f'{folder}/jobs')}",
        f"export CASA_PYTHON={quoted(sys.executable)}",
        f"export PYTHONPATH={quoted(f'{folder}/code')}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # keeps the current directory's code out",
        *_own_mechanisms(folder),
        f"exec bash {quoted(f'{folder}/code/{SCRIPT}')}",
    ]
    return "\n".join(["#!/usr/bin/env bash", *header, *body]) + "\n"


def _own_mechanisms(folder: Path) -> list[str]:
    """The script's line for fusion mechanisms of the user's own, which are frozen as well.

    :raises UserError: no such file.
    """
    files = own_mechanism_files()
    for file in files:
        if not file.is_file():
            raise UserError(f"{MECHANISMS_VARIABLE} names {file}, which is no file.")
    frozen = os.pathsep.join(str(folder / "mechanisms" / file.name) for file in files)
    return [f"export {MECHANISMS_VARIABLE}={shlex.quote(frozen)}"] if files else []


def write(folder: Path, script: str, jobs: Sequence[Job], code: Code | Installed) -> None:
    """Writes the submission; a folder that is there already is refused."""
    try:
        (folder / "log").mkdir(parents=True)
        code.write(folder)
        for file in own_mechanism_files():
            (folder / "mechanisms").mkdir(exist_ok=True)
            shutil.copy(file, folder / "mechanisms")
        for number, job in enumerate(jobs):
            directory = folder / "jobs" / str(number)
            directory.mkdir(parents=True)
            (directory / "config.yaml").write_text(frozen_yaml(job), encoding="utf-8")
        record = {
            "code": code.name,
            "command": sys.argv,
            "directory": str(Path.cwd()),
            "user": getpass.getuser(),
            "host": socket.gethostname(),
            "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "run_dirs": [job.config.run_dir for job in jobs],
        }
        (folder / "submission.json").write_text(json.dumps(record, indent=1) + "\n")
        (folder / "job.sbatch").write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the submission {folder} cannot be written: {error}; expected a new directory on a "
            "file system that all nodes share. Choose another --submissions DIR."
        ) from error


if __name__ == "__main__":
    sys.exit(main())
