"""Hydra entry: python -m casa_train +experiment=helium_casa"""

from __future__ import annotations

from casa_train.io.environment import set_environment

set_environment(training=True)  # before anything imports torch

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from casa_train import __version__
from casa_train.config.compose import refuse_one_directory, to_config
from casa_train.config.conf_dir import CONF_DIR
from casa_train.config.explain import explain
from casa_train.config.overrides import as_typed, quoted
from casa_train.config.schema import Config
from casa_train.config.sweep_jobs import AUTO, SweepJob, sweep_job, wanted_jobs
from casa_train.errors import RankError, UserError
from casa_train.io.log import drop_unwritten
from casa_train.io.log import log as say
from casa_train.run.layout import CONSOLE_FILE
from casa_train.training.signals import EXIT_REQUEUE, StopRequest

# Options of Hydra that take the word behind them.
VALUED = {"--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"}
VALUED |= {"--cfg", "-c", "--experimental-rerun"}


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")  # type: ignore[untyped-decorator]
def main(raw: DictConfig) -> None:
    """Trains one run; under `-m` Hydra calls it once a job. A failed job does not stop the next."""
    try:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            with open_dict(raw):
                raw.run_dir = HydraConfig.get().runtime.output_dir
            if raw.get("dry_run") is not True and by_processes(HydraConfig.get().sweep.jobs):
                _jobs.append(sweep_job(HydraConfig.get(), holding(raw)))
                return
        config = to_config(raw, HydraConfig.get().overrides.task)
        # Heavy imports only once the configuration holds.
        if config.dry_run:
            from casa_train.cost.dry_run import dry_run

            try:
                log(*dry_run(config))
            finally:
                if HydraConfig.get().mode == RunMode.MULTIRUN:
                    with contextlib.suppress(OSError):  # Hydra made it; a run's own is not empty
                        os.rmdir(config.run_dir)
            return
        with StopRequest(config.trainer.max_hours) as stop:  # a signal may come from now on
            from casa_train.train import train

            code = train(config, stop, last=HydraConfig.get().mode != RunMode.MULTIRUN)
        if code:
            raise SystemExit(code)  # a sweep's later jobs wait too, until it is started again
    except UserError as error:  # Hydra would print the whole command line in front of it
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        alone = isinstance(error, RankError)
        if sweep and raw.get("dry_run") is not True:
            from casa_train.run.directory import record_failure

            record_failure(Path(raw.run_dir), str(error))
        report(f"job {raw.run_dir}: {error}" if sweep else str(error), alone)
        if alone:
            abandon(2)
    finally:
        free_memory()


def ranks() -> int:
    """Processes that this command was started as, which train each run together."""
    alone = os.environ.get("SLURM_NTASKS", "1") if "SLURM_PROCID" in os.environ else "1"
    return int(os.environ.get("WORLD_SIZE", alone))


def by_processes(jobs: object) -> bool:
    """Whether each job of a sweep has a process of its own; :param jobs: `hydra.sweep.jobs`."""
    return (jobs != 1 or jobs is True) and not (jobs == AUTO and ranks() > 1)


def holding(raw: DictConfig) -> Config | None:
    """A job's configuration; None if it does not hold, which the job says itself."""
    with contextlib.suppress(UserError):
        return to_config(raw, HydraConfig.get().overrides.task)
    return None


def complain(message: str) -> None:
    """`report` of one job, by which a console that takes no more ends no other."""
    with contextlib.suppress(OSError):
        report(message)


def side_by_side(jobs: Sequence[SweepJob], wanted: int | None) -> None:
    """Runs the jobs of a sweep in processes of their own.

    :param wanted: how many at once; None: as many as fit.
    :raises SystemExit: one left early (75), or else one crashed (1).
    :raises UserError: several jobs at once in several ranks.
    """
    if ranks() > 1:
        raise UserError(
            f"hydra.sweep.jobs is {wanted}, but this command was started as {ranks()} ranks, which "
            "train each job together; expected 1. Give hydra.sweep.jobs=1, or start the sweep "
            "without torchrun or srun."
        )
    with StopRequest(max_hours=0) as stop:
        import torch

        from casa_train.run.finished import is_finished
        from casa_train.run.side_by_side import Job, Pool, at_once, places

        gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
        count = at_once(wanted, [job.config for job in jobs], cores, gpus)
        options, _ = split_options(sys.argv[1:])
        options = [option for option in options if option not in ("-m", "--multirun")]
        say(f"{len(jobs)} jobs, {count} at once; what each prints: its directory's {CONSOLE_FILE}")
        starts = [
            Job(
                job.run_dir,
                [*options, *job.overrides, f"run_dir={quoted(str(job.run_dir))}"],
                partial(is_finished, job.config, job.run_dir),
            )
            for job in jobs
        ]
        outcome = Pool(places(count, gpus), stop, EXIT_REQUEUE, say, complain).run(starts)
    if outcome.left or outcome.crashed:
        raise SystemExit(EXIT_REQUEUE if outcome.left else 1)


def free_memory() -> None:
    """Gives back what a job held: the next one of a sweep may need all of the GPU."""
    gc.collect()  # the engine and its hooks refer to each other
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def log(*lines: str) -> None:
    """Prints on the first rank only."""
    if int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
        print(*lines, sep="\n", flush=True)


_messages: list[str] = []
_jobs: list[SweepJob] = []  # of a sweep, each to have a process of its own


def report(message: str, alone: bool = False) -> None:
    """Prints what the user can mend.

    :param alone: only this rank has the message; otherwise all have it, and the first one speaks.
    """
    _messages.append(message)
    if alone or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0:
        print(f"error: {message}", file=sys.stderr)


def run() -> int:
    """The command; leaves with 2 after anything that the user can mend, 75 to be started again."""
    if "--version" in sys.argv[1:]:  # Hydra would print its own
        print(f"casa_train {__version__}")
        return 0
    _messages.clear()
    _jobs.clear()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would swallow the exception otherwise
    try:
        sys.argv[1:] = as_typed(list(chain(*split_options(sys.argv[1:]))))
        if sweep := {"-m", "--multirun", "hydra.mode=MULTIRUN"} & {*sys.argv[1:]}:
            refuse_one_directory(sys.argv[1:], min(sweep))
        main()
        if _jobs:
            side_by_side(_jobs, wanted_jobs(_jobs[0].at_once))
    except UserError as error:
        report(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        report(explain(error))
    except SystemExit as leave:
        if leave.code != EXIT_REQUEUE:
            raise
        return EXIT_REQUEUE
    except KeyboardInterrupt:
        print(
            "interrupted; the same command goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        abandon(130)
        return 130
    except BaseException:
        traceback.print_exc()
        abandon(1)
        return 1
    finally:
        if engine := sys.modules.get("casa_train.engine.engine"):  # only if a job got that far
            engine.leave_processes()
        drop_unwritten()
    return 2 if _messages else 0


def split_options(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's options, and the overrides: its parser takes no overrides on both sides of them."""
    options, overrides = [], []
    left = list(arguments)
    while left:
        item = left.pop(0)
        if not item.startswith("-"):
            overrides.append(item)
            continue
        options.append(item)
        if left and (item in VALUED or (item in ("--info", "-i") and "=" not in left[0])):
            options.append(left.pop(0))
    return options, overrides


def abandon(code: int) -> None:
    """Ends this rank at once where others may wait for it."""
    drop_unwritten()
    if engine := sys.modules.get("casa_train.engine.engine"):
        engine.abandon_processes(code)


if __name__ == "__main__":
    sys.exit(run())
