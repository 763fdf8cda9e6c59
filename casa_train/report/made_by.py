"""What made the jobs of a comparison: code, packages, machines and one job's command, as a reader
needs them who wants to cite the figures or to get them again.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from casa_train.io.numbers import count
from casa_train.report.compared_jobs import Say, say_groups
from casa_train.report.jobs import BROKEN
from casa_train.report.training_costs import machines_of
from casa_train.report.variants import Trial
from casa_train.run.layout import ENVIRONMENT_FILE
from casa_train.run.provenance import CHANGED

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


def say_whose_code_differs(found: Mapping[str, Mapping[str, Any]], say: Say) -> None:
    """What a difference between jobs may be due to, too: other code, or other packages.

    :param found: by job, its environment.
    """
    for what, of in (("code", _commit), ("packages", _packages)):
        title = (
            f"jobs were trained by different {what}, so that their differences may be due to that"
        )
        say_groups(title, {name: of(own) for name, own in found.items()}, say)
    changed = [name for name, own in found.items() if CHANGED in str(own.get("git_commit"))]
    if changed:
        say(
            f"the code that trained {count(len(changed), 'job')} had changes that no commit holds: "
            f"nobody can get it again ({', '.join(changed)})."
        )


def made_by(
    trials: Sequence[Trial], found: Mapping[str, Mapping[str, Any]], sweep: Path
) -> list[tuple[str, str]]:
    """Names and values for the page; nothing of what was not recorded.

    :param found: by job, its environment.
    """
    own = [found[trial.name] for trial in trials if trial.name in found]
    steps = sorted({trial.job.steps for trial in trials})
    seeds = sorted({trial.seed for trial in trials})
    rows = [
        ("code", "; ".join(dict.fromkeys(map(_commit, own)))),
        ("packages", "; ".join(dict.fromkeys(map(_packages, own)))),
        ("machine", "; ".join(machines_of(trials, sweep))),
        ("steps", ", ".join(f"{number:,}" for number in steps)),
        ("seeds", ", ".join(map(str, seeds))),
    ]
    commands = [one["command"] for one in own if isinstance(one.get("command"), list)]
    if commands:
        rows.append(("one job", _command(commands[0])))
    return [(name, value) for name, value in rows if value]


def _command(argv: Sequence[Any]) -> str:
    words = [str(word) for word in argv[1:] if not str(word).startswith(HERE)]
    return shlex.join(["python", "-m", "casa_train", *words])


def _commit(environment: Mapping[str, Any]) -> str:
    commit, changed, _ = str(environment.get("git_commit") or "").partition(CHANGED)
    version = str(environment.get("casa_train") or "of a version that was not recorded")
    if not commit:
        return f"casa_train {version}"
    return f"casa_train {version}, commit {commit[:NAMED]}{' with changes' if changed else ''}"


def _packages(environment: Mapping[str, Any]) -> str:
    own = environment.get("packages")
    own = own if isinstance(own, dict) else {}
    named = [("Python", environment.get("python")), *((n, own.get(n)) for n in SHOWN)]
    return ", ".join(f"{name} {version}" for name, version in named if version) or "not recorded"
