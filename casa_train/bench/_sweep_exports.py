"""The exports of a sweep whose streams are measured: one of each variant."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from casa_train.config.schema import Config, flatten
from casa_train.errors import UserError
from casa_train.export.writer import exported_step
from casa_train.io.files import EXPORT_MARKER
from casa_train.run.configuration import load_run_config
from casa_train.run.layout import CONFIG_FILE, EXPORT
from casa_train.run.sweep import run_directories


@dataclass(frozen=True)
class SweepExport:
    """A job that stands for its variant.

    :param job: the name of its directory; :param step: that was exported, if it tells.
    """

    job: str
    path: Path
    seed: int
    step: int | None
    threads: int


@dataclass(frozen=True)
class LeftOut:
    """A job whose stream is not measured, and why."""

    job: str
    why: str


def sweep_exports(sweep: Path, only: str) -> tuple[list[SweepExport], list[LeftOut]]:
    """One export of each variant, in the order of the directories: of the lowest seed that has one.

    :param only: a pattern of the directories' names.
    :raises UserError: no run there, or no export.
    """
    configs: dict[str, Config] = {}
    left: list[LeftOut] = []
    for run in run_directories(sweep, only):
        if not (run / CONFIG_FILE).is_file():
            left.append(LeftOut(run.name, "it never began"))
            continue
        try:
            configs[run.name] = load_run_config(run)
        except UserError as error:
            left.append(LeftOut(run.name, str(error)))
    variants: dict[str, list[str]] = defaultdict(list)
    for job, config in configs.items():
        variants[_variant(config)].append(job)
    chosen = []
    for jobs in variants.values():
        taken: str | None = None
        for job in sorted(jobs, key=lambda job: configs[job].seed):
            path = sweep / job / EXPORT
            if not (path / EXPORT_MARKER).is_file():
                how = f"python -m casa_train.export {sweep / job} --out {path}"
                left.append(LeftOut(job, f"no export in {path} ({how})"))
            elif taken is not None:
                left.append(LeftOut(job, f"{taken} stands for it: only the seed differs"))
            else:
                taken, threads = job, configs[job].parallel.threads
                step = exported_step(path)
                chosen.append(SweepExport(job, path, configs[job].seed, step, threads))
    if not chosen:
        raise UserError(
            f"--sweep {sweep}: no job of {only!r} has an export of its own; expected "
            f"JOB/{EXPORT}. Write them with python -m casa_train.evaluate --sweep {sweep}, or one "
            "with python -m casa_train.export."
        )
    order = list(configs)
    return sorted(chosen, key=lambda one: order.index(one.job)), left


def _variant(config: Config) -> str:
    """All fields of a job but its name and place, and seeds at any depth."""
    fields = {
        name: value
        for name, value in flatten(config).items()
        if name not in ("name", "run_dir") and name.rpartition(".")[2] != "seed"
    }
    return json.dumps(fields, sort_keys=True)
