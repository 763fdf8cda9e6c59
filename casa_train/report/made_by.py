"""What made the jobs of a comparison: code, packages, machines and one job's command, as a reader
needs them who wants to cite the figures or to get them again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_train.io.numbers import count
from casa_train.report.jobs import BROKEN
from casa_train.report.training_costs import machines_of
from casa_train.report.variants import Trial, Variant
from casa_train.run.layout import ENVIRONMENT_FILE

CHANGED = "+dirty"  # as run/provenance.py writes it
SHOWN = ("torch", "transformers", "deepspeed", "flash-attn")
NAMED = 12  # characters of a commit
HERE = ("run_dir=", "hydra.")  # overrides that say where a job ran, not what it is


def environments(trials: Iterable[Trial], sweep: Path) -> dict[str, Mapping[str, Any]]:
    """By job what was recorded at its first start; nothing of a job that recorded nothing."""
    found: dict[str, Mapping[str, Any]] = {}
    for trial in trials:
        try:
            content = json.loads((sweep / trial.name / ENVIRONMENT_FILE).read_text())
        except BROKEN:
            continue
        if isinstance(content, dict):
            found[trial.name] = content
    return found


def say_whose_code_differs(
    variants: Sequence[Variant], sweep: Path, say: Callable[[str], None]
) -> None:
    """What a difference between jobs may be due to, too: other code, or other packages."""
    found = environments((t for v in variants for t in v.trials), sweep)
    for what, values in (
        ("code", {name: _commit(own) for name, own in found.items()}),
        ("packages", {name: _packages(own) for name, own in found.items()}),
    ):
        groups = _grouped(values)
        if len(groups) > 1:
            said = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            say(
                f"jobs were trained by different {what}, so that their differences may be due to "
                f"that: {said}."
            )
    changed = [name for name, own in found.items() if CHANGED in str(own.get("git_commit"))]
    if changed:
        say(
            f"the code that trained {count(len(changed), 'job')} had changes that no commit holds: "
            f"nobody can get it again ({', '.join(changed)})."
        )


def made_by(variants: Sequence[Variant], sweep: Path) -> list[tuple[str, str]]:
    """Names and values for the page; nothing of what was not recorded."""
    trials = [trial for variant in variants for trial in variant.trials]
    found = environments(trials, sweep)
    steps = sorted({trial.job.steps for trial in trials})
    seeds = sorted({trial.seed for trial in trials})
    rows = [
        ("code", "; ".join(_grouped({name: _commit(own) for name, own in found.items()}))),
        ("packages", "; ".join(_grouped({name: _packages(own) for name, own in found.items()}))),
        ("machine", "; ".join(machines_of(trials, sweep))),
        ("steps", ", ".join(f"{number:,}" for number in steps)),
        ("seeds", ", ".join(map(str, seeds))),
    ]
    commands = [own["command"] for own in found.values() if isinstance(own.get("command"), list)]
    if commands:
        rows.append(("one job", _command(commands[0])))
    return [(name, value) for name, value in rows if value]


def _command(argv: Sequence[Any]) -> str:
    words = [str(word) for word in argv[1:] if not str(word).startswith(HERE)]
    return shlex.join(["python", "-m", "casa_train", *words])


def _commit(environment: Mapping[str, Any]) -> str:
    commit, _, changed = str(environment.get("git_commit") or "").partition("+")
    version = str(environment.get("casa_train") or "of a version that was not recorded")
    if not commit:
        return f"casa_train {version}"
    return f"casa_train {version}, commit {commit[:NAMED]}{' with changes' if changed else ''}"


def _packages(environment: Mapping[str, Any]) -> str:
    own = environment.get("packages")
    own = own if isinstance(own, dict) else {}
    named = [("Python", environment.get("python")), *((n, own.get(n)) for n in SHOWN)]
    return ", ".join(f"{name} {version}" for name, version in named if version) or "not recorded"


def _grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return groups
