"""`hydra.sweep.jobs`: how many jobs of a sweep run at once, each in a process of its own.

It stands beside Hydra's own `hydra.sweep.dir` and belongs to the sweep: no run keeps it. Hydra
still composes the jobs; a launcher plugin would have to lie in its package `hydra_plugins`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.conf import HydraConf, SweepDir
from hydra.core.config_store import ConfigStore

from casa_train.config.schema import Config
from casa_train.errors import UserError

AUTO = "auto"
# Settings of Hydra's that make a sweep of a command; a job is none.
OF_THE_SWEEP = ("hydra.mode=", "hydra.sweep.", "hydra.sweeper", "hydra.launcher", "hydra/")


@dataclass
class SweepDirAndJobs(SweepDir):  # type: ignore[misc]
    """Hydra's settings of a sweep, and ours."""

    jobs: Any = 1


@dataclass
class HydraConfWithJobs(HydraConf):  # type: ignore[misc]
    """All of Hydra's settings."""

    sweep: SweepDirAndJobs = field(default_factory=SweepDirAndJobs)


def store_settings() -> None:
    """Gives Hydra these settings in place of its own."""
    ConfigStore.instance().store(group="hydra", name="config", node=HydraConfWithJobs())


@dataclass(frozen=True)
class SweepJob:
    """One job of a sweep that is to run in a process of its own.

    :param overrides: what it is composed of, Hydra's own settings among them, without the run
        directory; :param run_dir: absolute.
    :param config: None where the configuration does not hold, which the job then says itself.
    :param at_once: `hydra.sweep.jobs`, as it was given.
    """

    overrides: Sequence[str]
    run_dir: Path
    config: Config | None
    at_once: Any


def sweep_job(hydra: HydraConf, config: Config | None) -> SweepJob:
    """:param hydra: Hydra's settings while it calls the job."""
    own = [o for o in hydra.overrides.hydra if not o.lstrip("+~").startswith(OF_THE_SWEEP)]
    overrides, run_dir = [*own, *hydra.overrides.task], Path(hydra.runtime.output_dir)
    return SweepJob(overrides, run_dir, config, hydra.sweep.jobs)


def wanted_jobs(jobs: Any) -> int | None:
    """How many at once `hydra.sweep.jobs` says; None for "auto".

    :raises UserError: neither a number from 1 up nor "auto".
    """
    if jobs == AUTO:
        return None
    if isinstance(jobs, int) and not isinstance(jobs, bool) and jobs >= 1:
        return jobs
    raise UserError(
        f"hydra.sweep.jobs is {jobs!r}; expected how many jobs of the sweep run at once, 1 or "
        f"more, or {AUTO}."
    )
