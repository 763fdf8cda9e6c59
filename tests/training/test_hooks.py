"""What watches the loop: the order of hooks, what they may answer, and that all are closed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from casa_train.checkpoint.manager import CheckpointManager
from casa_train.config.schema import Config, GroupConfig, OptimConfig
from casa_train.distributed.ranks import Ranks
from casa_train.errors import SaveError, UserError
from casa_train.evaluate.validation import Validator
from casa_train.export.background_exports import BackgroundExports
from casa_train.train import build_run
from casa_train.training.audit import Audit
from casa_train.training.garbage import ScheduledCollection
from casa_train.training.hooks import Hook, Hooks, Leave
from casa_train.training.memory_probe import MemoryProbe
from casa_train.training.reporting import Attempt, Reporting
from casa_train.training.state import Progress
from casa_train.training.stopping import Stopping
from casa_train.training.watchdog import Watchdog
from tests.helpers.tiny_run import Lines, Packs, PlainEngine, tiny_settings

Seen = list[tuple[str, str, Any]]


class Watching(Hook):
    """Notes what it is told, and answers a step as it was asked to."""

    def __init__(self, name: str, seen: Seen, answers: dict[int, bool | Leave] | None = None):
        self.name, self.seen, self.answers = name, seen, answers or {}

    def begin(self, progress: Progress) -> None:
        self.seen.append((self.name, "begin", progress.step))

    def before_update(self, step: int, rates: Any, pairs: float) -> None:
        self.seen.append((self.name, "before_update", (step, rates, pairs)))

    def after_step(self, record: dict[str, Any]) -> bool | Leave:
        self.seen.append((self.name, "after_step", record["step"]))
        return self.answers.get(record["step"], False)

    def after_save(self, step: int) -> None:
        self.seen.append((self.name, "after_save", step))

    def after_failed_save(self, step: int) -> None:
        self.seen.append((self.name, "after_failed_save", step))

    def close(self, reason: str | None) -> None:
        self.seen.append((self.name, "close", reason))


def settings(steps: int = 3, every: int = 100) -> Config:
    config = tiny_settings(OptimConfig(groups={"all": GroupConfig(["."], 1e-3)}), stage=2, packs=1)
    config.trainer = replace(config.trainer, steps=steps, audit=False, gc_every=0)
    config.checkpoint = replace(config.checkpoint, every=every)
    return config


def run(
    config: Config, seen: Seen, hooks: list[Hook], tmp_path: Path, checkpoints: Any = None
) -> tuple[Any, list[str]]:
    """A run in this process; the engine is a plain one, everything else is a run's own."""
    lines: list[str] = []
    ranks = Ranks(out=lines.append)
    if checkpoints is None:
        checkpoints = CheckpointManager(tmp_path / "checkpoints", config.checkpoint, {}, ranks)
    engine: Any = PlainEngine(seen)
    built = build_run(
        config, ranks, engine, Packs(), tmp_path, checkpoints, sinks=[Lines(lines)], hooks=hooks
    )
    return built, lines


def test_hooks_see_a_run_in_their_order_and_are_closed_in_reverse(tmp_path: Path) -> None:
    seen: Seen = []
    hooks: list[Hook] = [Watching("one", seen), Watching("two", seen, {2: True})]
    built, lines = run(settings(steps=3), seen, hooks, tmp_path)
    assert built.trainer.run() is None
    calls = [(name, what) for name, what, _ in seen]
    assert calls[:2] == [("one", "begin"), ("two", "begin")]
    both = [("one", "before_update"), ("two", "before_update"), ("engine", "step")]
    both += [("one", "after_step"), ("two", "after_step")]
    saved = [("one", "after_save"), ("two", "after_save")]
    assert calls[2:-2] == [*both, *both, *saved, *both, *saved]  # step 2 was wanted, 3 is the last
    assert seen[-2:] == [("two", "close", None), ("one", "close", None)]
    rates, pairs = next(value for _, what, value in seen if what == "before_update")[1:]
    assert rates == {"all": 1e-3} and pairs == 1
    assert [line for line in lines if line.startswith("saved")] == [
        "saved checkpoint of step 2",
        "saved checkpoint of step 3",
    ]


def test_who_leaves_saves_the_step_and_asks_nobody_behind(tmp_path: Path) -> None:
    seen: Seen = []
    leaving = Watching("one", seen, {2: Leave("signal")})
    built, _ = run(settings(steps=9), seen, [leaving, Watching("two", seen)], tmp_path)
    assert built.trainer.run() == "signal"
    assert ("one", "after_step", 2) in seen and ("two", "after_step", 2) not in seen
    assert ("two", "after_save", 2) in seen and ("two", "after_save", 1) not in seen
    assert seen[-2:] == [("two", "close", "signal"), ("one", "close", "signal")]
    assert built.state.progress.step == 2


class Failing(Watching):
    """Fails where it is asked to."""

    def __init__(self, name: str, seen: Seen, where: str) -> None:
        super().__init__(name, seen)
        self.where = where

    def begin(self, progress: Progress) -> None:
        super().begin(progress)
        if self.where == "begin":
            raise UserError("no room\nfor this")

    def after_step(self, record: dict[str, Any]) -> bool | Leave:
        if self.where == "after_step":
            raise UserError("no room\nfor this")
        return super().after_step(record)

    def close(self, reason: str | None) -> None:
        super().close(reason)
        if self.where == "close":
            raise OSError("cannot close")


@pytest.mark.parametrize("where", ["begin", "after_step"])
def test_a_failure_closes_in_reverse_whoever_began(tmp_path: Path, where: str) -> None:
    seen: Seen = []
    hooks: list[Hook] = [
        Watching("one", seen),
        Failing("two", seen, where),
        Failing("three", seen, "close"),
    ]
    built, lines = run(settings(), seen, hooks, tmp_path)
    expected = ["two", "one"] if where == "begin" else ["three", "two", "one"]
    with pytest.raises(UserError if where == "begin" else OSError):
        built.trainer.run()
    closed = [(name, reason) for name, what, reason in seen if what == "close"]
    # Neither a failure nor one that cannot be closed keeps the others from it.
    assert closed == [(name, "UserError: no room") for name in expected]
    starts = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert '"left": "UserError: no room"' in starts[-1]
    built.state.log.log("printed, since the sinks are closed")
    assert lines[-1] == "printed, since the sinks are closed"


def test_a_hook_is_closed_once() -> None:
    seen: Seen = []
    hooks = Hooks([Watching("one", seen)])
    hooks.begin(Progress())
    hooks.close("signal")
    hooks.close(None)
    assert [what for _, what, _ in seen] == ["begin", "close"]


class FullDisk:
    """Checkpoints that a disk refuses."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def watched_by(self, *_: Any) -> None: ...

    def steps(self) -> list[int]:
        return []

    def save(self, step: int, write: Any, state: Any) -> None:
        raise SaveError(f"no room for step {step}")


def test_a_save_that_fails_is_told_and_ends_the_run_at_its_last_step_alone(tmp_path: Path) -> None:
    seen: Seen = []
    full = FullDisk(tmp_path / "checkpoints")
    built, lines = run(settings(2, every=1), seen, [Watching("one", seen)], tmp_path, full)
    with pytest.raises(SaveError, match="step 2"):
        built.trainer.run()
    told = [(what, step) for _, what, step in seen if "save" in what]
    assert told == [("after_failed_save", 1), ("after_failed_save", 2)]
    assert "warning: no room for step 1 Training goes on; the next save tries again." in lines


def test_the_order_of_a_runs_own_hooks(tmp_path: Path) -> None:
    config = settings()
    config.trainer.audit = True
    config.evaluation.every = 1
    ranks = Ranks()
    engine: Any = PlainEngine([])
    checkpoints = CheckpointManager(tmp_path / "checkpoints", config.checkpoint, {}, ranks)
    last = Watching("mine", [])
    whole = build_run(
        config,
        ranks,
        engine,
        Packs(),
        tmp_path,
        checkpoints,
        stop=SimpleNamespace(flags=lambda: (False, False)),
        measured=SimpleNamespace(),  # type: ignore[arg-type]
        hooks=[last],
    )
    assert [type(hook) for hook in whole.trainer.hooks.hooks] == [
        Audit,
        Reporting,
        Watchdog,
        Attempt,
        ScheduledCollection,
        MemoryProbe,
        Stopping,
        Validator,
        BackgroundExports,
        Watching,
    ]
    # Without a directory nothing is written, watched or validated.
    bare = build_run(config, ranks, engine, Packs())
    assert [type(hook) for hook in bare.trainer.hooks.hooks] == [
        Audit,
        Reporting,
        Attempt,
        ScheduledCollection,
        MemoryProbe,
    ]
    assert not (tmp_path / "starts.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "answer"),
    [((False, False), False), ((True, True), Leave("signal")), ((False, True), Leave("max_hours"))],
)
def test_stopping_says_why(flags: tuple[bool, bool], answer: bool | Leave) -> None:
    stopping = Stopping(SimpleNamespace(flags=lambda: flags), Ranks(), steps=5)
    assert stopping.after_step({"step": 4}) == answer
    assert stopping.after_step({"step": 5}) is False  # it is done anyway
