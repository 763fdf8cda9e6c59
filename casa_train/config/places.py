"""Where a run's sources lie: a run keeps absolute paths, so that its commands work in any folder.

Paths are relative to the folder of the command that starts a run. What it stores is absolute, and
found again if the run was moved together with its sources.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from casa_train.config.schema import Config


def places(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Every field that names a directory (some of them a hub id): its dotted name, and the object
    and the attribute that hold it.
    """
    model, data = config.model, config.data
    yield "model.tokenizer", model, "tokenizer"
    yield "model.init_from", model, "init_from"
    yield "model.backbone.pretrained", model.backbone, "pretrained"
    yield "model.vision.pretrained", model.vision, "pretrained"
    for section, sources in (("sources", data.sources), ("validation", data.validation)):
        for name, source in sources.items():
            yield f"data.{section}.{name}.path", source, "path"
    for name, dataset in data.stream.datasets.items():
        yield f"data.stream.datasets.{name}.source", dataset, "source"
    for name, benchmark in config.evaluation.benchmarks.items():
        yield f"evaluation.benchmarks.{name}.source", benchmark, "source"


def absolute(config: Config) -> Config:
    """A copy whose places, where they are there, are absolute; hub ids stay as they are."""
    return _changed(config, lambda _, value: _here(value))


def relocated(config: Config, run: Path) -> Config:
    """A copy of what a run stored whose places are found from any folder.

    :param run: the run's directory, perhaps moved, together with its sources or without them.
    """
    began = Path(config.run_dir)  # where it was; an earlier version stored it as it was given

    def find(_: str, value: str) -> str:
        path = Path(value).expanduser()
        if path.is_absolute() and path.exists():
            return value
        if path.is_absolute() == began.is_absolute():
            beside = os.path.normpath(run.resolve() / os.path.relpath(path, began))
            if os.path.exists(beside):
                return beside
        return _here(value)

    return _changed(config, find)


def as_before(config: Config, before: Config) -> Config:
    """A copy that takes from the run's own configuration the places that are not there seen from
    this folder, though they are the same names: the same command, given elsewhere.

    :param before: what the run stored, `relocated`.
    """
    known = {name: getattr(holder, field) for name, holder, field in places(before)}

    def find(name: str, value: str) -> str:
        own, stored = Path(value), known.get(name)
        if own.is_absolute() or own.exists() or stored is None or not Path(stored).is_absolute():
            return value
        return stored if Path(stored).parts[-len(own.parts) :] == own.parts else value

    return _changed(config, find)


def same_place(one: str | None, other: str | None) -> bool:
    """Whether two values of such a field name one directory."""
    if one is None or other is None or one == other:
        return one == other
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def shown(config: Config) -> Config:
    """A copy to publish: of absolute paths, which tell of users and machines, only the end."""
    changed = _changed(config, lambda _, value: _end(value))
    changed.run_dir = _end(config.run_dir)
    return changed


def _changed(config: Config, change: Callable[[str, str], str]) -> Config:
    """:param change: a field's dotted name and value -> its new value."""
    config = copy.deepcopy(config)
    for name, holder, field in places(config):
        value = getattr(holder, field)
        if value is not None:
            setattr(holder, field, change(name, value))
    return config


def _here(value: str) -> str:
    path = Path(value).expanduser()
    return os.path.abspath(path) if path.exists() else value


def _end(value: str) -> str:
    path = Path(value)
    return str(Path(*path.parts[1:][-2:])) if path.is_absolute() else value
