"""Whether a run needs no further start, told by its files alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from casa_train.config.compose import to_config
from casa_train.config.matched import as_given
from casa_train.config.places import absolute, as_before, places, relocated
from casa_train.config.schema import Config, flatten
from casa_train.errors import UserError
from casa_train.run.layout import CHECKPOINTS, CONFIG_FILE, FAILURE_FILE, REQUEUE_FILE, STARTS_FILE
from casa_train.run.starts import FINISHED, read_starts


def is_finished(config: Config | None, run_dir: Path) -> bool:
    """Whether another start of the run would find nothing to do, and nothing to refuse.

    Only what is sure counts: its last start took the last step and left a checkpoint of it, every
    field of its configuration is the same, as it was given or with the numbers that matched its
    parameters, and nothing that it names has changed since. A run that exports while it goes on is
    never sure, and neither is one that reads from a hub.

    :param config: as it would be started now; None: it does not hold.
    """
    if config is None:
        return False
    steps = config.trainer.steps
    if config.export.every or config.export.best or config.checkpoint.resume != "auto":
        return False
    if not (run_dir / CHECKPOINTS / f"step_{steps}").is_dir():
        return False
    try:
        last = read_starts(run_dir / STARTS_FILE)[-1:]
        if not last or last[0].get("left") != FINISHED or last[0].get("step") != steps:
            return False
        ended = (run_dir / STARTS_FILE).stat().st_mtime
        stored = to_config(OmegaConf.load(run_dir / CONFIG_FILE))  # type: ignore[arg-type]
        now = absolute(as_before(config, relocated(stored, run_dir)))
        here = flatten(replace(now, run_dir=str(run_dir.absolute())))
        if here not in (flatten(stored), flatten(as_given(stored))):
            return False
        failed = run_dir / FAILURE_FILE
        if (run_dir / REQUEUE_FILE).exists() or (failed.exists() and _changed(failed) > ended):
            return False
        named = [getattr(holder, name) for _, holder, name in places(stored)]
        return all(_newest(Path(value)) < ended for value in named if value is not None)
    except (OSError, ValueError, LookupError, TypeError, YAMLError, OmegaConfBaseException):
        return False
    except UserError:
        return False


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _newest(place: Path) -> float:
    """When the newest file of a directory was written; never, for us, where it is not there."""
    if not place.exists():
        return float("inf")
    inside = (Path(folder, name) for folder, _, names in os.walk(place) for name in names)
    return max(map(_changed, inside), default=_changed(place))
