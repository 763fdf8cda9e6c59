"""The configuration that a run stored, and whether another is the same run's."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from omegaconf import OmegaConf
from yaml import YAMLError

from casa_train.config.compose import to_config
from casa_train.config.places import absolute, as_before, places, relocated, same_place
from casa_train.config.schema import Config, run_fields
from casa_train.errors import UserError
from casa_train.modeling.configuration_casa import CasaConfig
from casa_train.run.layout import CONFIG_FILE, MODEL_CONFIG_FILE
from casa_train.run.resume_fields import reason_to_keep


def stored_config(path: Path) -> Config:
    """The configuration that a run wrote.

    :raises UserError: it cannot be read.
    """
    try:
        return to_config(OmegaConf.load(path))  # type: ignore[arg-type]
    except (OSError, ValueError, YAMLError, UserError) as error:
        raise UserError(
            f"{path} cannot be read as this version's configuration of a run "
            f"({str(error).rstrip('.')}). Restore it from a backup; a new run needs another name, "
            "or checkpoint.resume=never to start over."
        ) from error


def check_same_run(stored: Path, config: Config) -> None:
    """Refuses a run directory of another configuration.

    :raises UserError: listing every differing field that `resume_allow` does not name.
    """
    theirs = run_fields(relocated(stored_config(stored), stored.parent))
    ours = run_fields(config)
    located = {name for name, *_ in places(config)}
    names = [
        name
        for name in sorted({*theirs, *ours})
        if theirs.get(name) != ours.get(name)
        and not (name in located and same_place(theirs.get(name), ours.get(name)))
        and name not in config.checkpoint.resume_allow
    ]
    if names:
        differing = [
            f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} now"
            for name in names
        ]
        kept = [name for name in names if reason_to_keep(name)]
        but = f" (not {', '.join(kept)}: a run with a checkpoint keeps it)" if kept else ""
        raise UserError(
            f"{stored.parent} belongs to another configuration: {'; '.join(differing)}. Choose "
            "another name=..., start over with checkpoint.resume=never, or allow the fields by "
            f"name with checkpoint.resume_allow=[...]{but}."
        )


def load_run_config(run: Path) -> Config:
    """The configuration that a run stored, with paths that hold in any folder.

    :raises UserError: not a run directory.
    """
    path = run / CONFIG_FILE
    if not path.is_file():
        raise UserError(
            f"{run} is not a run directory: {CONFIG_FILE} is missing. Expected the run_dir of a "
            "training, such as runs/demo."
        )
    return relocated(stored_config(path), run)


def load_model_config(run: Path) -> CasaConfig:
    """The Hugging Face configuration that a run stored.

    :raises UserError: it is missing or damaged.
    """
    path = run / MODEL_CONFIG_FILE
    again = "start the run's command once more to write it"
    if not path.is_file():
        raise UserError(f"{path} is missing; {again}.")
    try:
        stored = json.loads(path.read_text())
        return CasaConfig.from_dict(stored)  # type: ignore[no-any-return]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); expected the model's configuration as JSON: {again}."
        ) from error


def find_places(config: Config, run_dir: Path) -> Config:
    """The configuration with absolute paths; what is not there from this folder is where the run
    itself found it before.
    """
    if (run_dir / CONFIG_FILE).is_file():
        with contextlib.suppress(UserError):  # `prepare_run_directory` says it
            config = as_before(config, load_run_config(run_dir))
    return absolute(config)
