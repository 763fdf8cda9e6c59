"""Runs of two ranks to which something happens: kills in a save, damaged checkpoints, full disks.

`python -m tests.helpers.fault_cases KINDS DIR [DISK]` prints one JSON line a case of these kinds
(kill,damage,...); DISK is a small file system of its own. Every attempt of a run is a pair of
processes forked from here, since loading the libraries takes longer than any case. They train a
tiny model, whose backbone is frozen, in a run that `train.build_run` puts together.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from casa_train.checkpoint.disk_space import checkpoint_bytes
from casa_train.checkpoint.frozen import FROZEN_DIRECTORY
from casa_train.checkpoint.manager import CheckpointManager
from casa_train.config.schema import GroupConfig, OptimConfig
from casa_train.distributed.random_state import seed_all
from casa_train.engine.engine import init_processes, leave_processes
from casa_train.engine.starting import build_engine
from casa_train.errors import UserError
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.train import build_run
from casa_train.training.hooks import Hook
from tests.helpers.small_disk import Filler, remount
from tests.helpers.tiny import tiny_model
from tests.helpers.tiny_run import Lines, tiny_batch, tiny_settings

STEPS, EVERY = 8, 2
OPTIM = OptimConfig(groups={"all": GroupConfig(["."], 1e-2, 0.1)})
EXACT = ("step", "loss", "gradient_norm", "rates", "answer_tokens", "samples_digest")


Save = Callable[[Path], Any]


@dataclass
class Attempt:
    """What one rank meets between a start and its end.

    :param phase: told by the checkpoints what comes next.
    :param write: writes the engine's state with `Engine.save`, which it gets, into a directory.
    :param answers: answer tokens of a rank's pack in a step; 4 where it is not named.
    :param stop: the step after which a signal arrives; 0: none.
    :param after_save: called after every save, failed or not.
    """

    phase: Callable[[str], None] = lambda name: None
    write: Callable[[Save, Path], None] = lambda save, path: save(path)
    answers: Callable[[int], int] = lambda step: 4
    stop: int = 0
    after_save: Callable[[int], None] = lambda step: None


class Packs:
    """Packs that random numbers choose, so that a resumed run needs the saved generators."""

    def __init__(self, rank: int, answers: Callable[[int], int]) -> None:
        self.rank, self.answers, self.step = rank, answers, 0

    def next_step(self) -> list[Any]:
        self.step += 1
        seed = int(torch.randint(0, 1000, ()))
        name = f"step{self.step} rank{self.rank} seed{seed}"
        return [tiny_batch(seed, name, [("a", self.answers(self.step))])]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class SignalAfter:
    """As if a signal had come in a step."""

    def __init__(self, packs: Packs, step: int) -> None:
        self.packs, self.step = packs, step

    def flags(self) -> tuple[bool, bool]:
        return self.packs.step == self.step, False


class Checkpoints(CheckpointManager):
    """Checkpoints of an attempt: they are written as it will have it."""

    attempt = Attempt()

    def save(self, step: int, write: Save, state: dict[str, Any]) -> Path:
        return super().save(step, functools.partial(self.attempt.write, write), state)


class AfterSaves(Hook):
    """Tells an attempt of every save."""

    def __init__(self, attempt: Attempt) -> None:
        self.attempt = attempt

    def after_save(self, step: int) -> None:
        self.attempt.after_save(step)

    def after_failed_save(self, step: int) -> None:
        self.attempt.after_save(step)


def train(run: Path, attempt: Attempt, stage: int = 2) -> dict[str, Any]:
    """One rank's attempt, from its start to the last step; returns what came of it."""
    said: list[str] = []
    ranks = replace(init_processes(), out=said.append)
    result: dict[str, Any] = {"rank": ranks.rank, "said": said, "error": None, "resumed": 0}
    config = tiny_settings(OPTIM, stage)
    config.trainer = replace(config.trainer, steps=STEPS, log_every=4, audit=False)
    config.checkpoint = replace(config.checkpoint, every=EVERY)
    checkpoints = Checkpoints(run / "checkpoints", config.checkpoint, {}, ranks)
    checkpoints.attempt = attempt
    checkpoints.watched_by(attempt.phase)
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".fusion." in name)
    model.visual.set_trainable(1)
    engine = build_engine(config, model, ranks)
    seed_all(ranks.rank)
    packs = Packs(ranks.rank, attempt.answers)
    run.mkdir(parents=True, exist_ok=True)
    try:
        found = checkpoints.latest()
        result["resumed"] = found.step if found is not None else 0
        built = build_run(
            config,
            ranks,
            engine,
            packs,
            run,
            checkpoints,
            found,
            stop=SignalAfter(packs, attempt.stop),
            sinks=[Lines(said)] if ranks.first else [],
            hooks=[AfterSaves(attempt)],
        )
        result["left"] = built.trainer.run()
    except UserError as error:
        result["error"] = str(error)
    digest = hashlib.sha256()
    for _, parameter in sorted(engine.module.named_parameters()):
        digest.update(engine.full_parameter(parameter).numpy().tobytes())
    result |= {
        "weights": digest.hexdigest()[:16],
        "checkpoint_bytes": checkpoint_bytes(engine.module.parameters(), "fp32"),
    }
    engine.close()
    leave_processes()
    return result


def pair(run: Path, attempts: Sequence[Attempt], grace: float = 3.0, **options: Any) -> list[Any]:
    """Two ranks, forked; when one is killed, the other gets the same, as srun would do it.

    :param grace: how long the other one may take to end by itself; then it counts as hanging.
    :return: their results; for one that was killed or ended in a crash, how.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    out = run.parent / f"{run.name}.results"
    out.mkdir(parents=True, exist_ok=True)
    pids = []
    for rank, attempt in enumerate(attempts):
        (out / str(rank)).unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            code = 1
            try:
                result = train(run, attempt, **options)
                (out / str(rank)).write_text(json.dumps(result))
                code = 0
            except BaseException:
                (out / "traceback").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    ends: dict[int, Any] = {}
    deadline = time.monotonic() + 120
    while len(ends) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in ends:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    ends[rank] = os.waitstatus_to_exitcode(status)
                    if ends[rank]:
                        deadline = min(deadline, time.monotonic() + grace)
        if time.monotonic() > deadline:
            for rank, pid in enumerate(pids):
                if rank not in ends:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ends[rank] = "hung"
        time.sleep(0.01)
    results = [
        json.loads((out / str(rank)).read_text()) if ends[rank] == 0 else ends[rank]
        for rank in range(len(pids))
    ]
    crash = out / "traceback"
    if -signal.SIGKILL not in results and crash.exists():
        raise AssertionError(f"{run}: {results}\n{crash.read_text()}")
    crash.unlink(missing_ok=True)
    return results


def exact(run: Path) -> list[Any]:
    return [[r[name] for name in EXACT] for r in read_metrics(run / "metrics.jsonl")]


def held(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.name != FROZEN_DIRECTORY)


def frozen(run: Path) -> list[str]:
    """Files of frozen weights."""
    return sorted(path.name for path in (run / "checkpoints" / FROZEN_DIRECTORY).glob("*"))


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(name: str) -> Attempt:
    """Killed when the save of step 6 is about to do this."""
    return Attempt(
        phase=lambda phase: die() if phase.startswith(f"saving step 6: {name}") else None
    )


def half_a_file(save: Save, path: Path) -> None:
    """Killed with its shard of step 6 written in part."""
    save(path)
    if path.name == "step_6.tmp":
        shard = path / "engine" / f"rank_0000{os.environ['RANK']}.pt"
        with shard.open("r+b") as file:
            file.truncate(shard.stat().st_size // 2)
        die()


def half_the_frozen(save: Any, path: Path) -> None:
    """Killed with the frozen weights written in part."""
    engine = save.__self__
    whole, left = engine.full_parameter, iter(range(5))

    def read(parameter: Any) -> Any:
        if next(left, None) is None:
            die()
        return whole(parameter)

    engine.full_parameter = read
    save(path)


def at_first(name: str) -> Attempt:
    """Killed when the first save, of step 2, is about to do this."""
    return Attempt(
        phase=lambda phase: die() if phase.startswith(f"saving step 2: {name}") else None
    )


# By name: who is killed where, and the step that the next start must find.
KILLS: dict[str, tuple[int, Attempt, tuple[int, ...]]] = {
    "writing": (0, at("writing"), (4,)),
    "writing, rank 1": (1, at("writing"), (4,)),
    "half a shard": (0, Attempt(write=half_a_file), (4,)),
    "half a shard, rank 1": (1, Attempt(write=half_a_file), (4,)),
    "hashing": (0, at("hashing"), (4,)),
    "hashing, rank 1": (1, at("hashing"), (4,)),
    "after hashing": (0, at("committing"), (4,)),
    "after hashing, rank 1": (1, at("committing"), (4, 6)),  # rank 0 may commit without it
    "between manifest and rename": (0, at("renaming"), (4,)),
    "after the rename": (0, at("pruning"), (6,)),
    "after the rename, rank 1": (1, at("pruning"), (6,)),
    "between deletions": (0, at("deleting"), (6,)),
    "half the frozen weights": (0, Attempt(write=half_the_frozen), (0,)),
    "frozen weights without a checkpoint": (0, at_first("hashing"), (0,)),
}


def kill_case(name: str, run: Path, whole: dict[str, Any]) -> dict[str, Any]:
    rank, attempt, expected = KILLS[name]
    attempts = [Attempt(), Attempt()]
    attempts[rank] = attempt
    ends = pair(run, attempts)
    left, frozen_left = held(run), frozen(run)
    again = pair(run, [Attempt(), Attempt()])
    return {
        "killed": ends[rank] == -signal.SIGKILL,
        "other_left": ends[1 - rank],
        "left": left,
        "frozen_left": frozen_left,
        "resumed": again[0]["resumed"],
        "resumed_well": again[0]["resumed"] in expected,
        **compare(run, again, whole),
    }


def compare(run: Path, results: Sequence[Any], whole: dict[str, Any]) -> dict[str, Any]:
    """Against the undisturbed run, bit for bit."""
    return {
        "weights": all(result["weights"] == whole["weights"] for result in results),
        "metrics": exact(run) == whole["metrics"],
        "held": held(run),
        "frozen": frozen(run) == whole["frozen"],
        "said": results[0]["said"],
        "errors": [result["error"] for result in results],
    }


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(shard: Path) -> None:
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 1)


def another_step(shard: Path) -> None:
    other = Path(str(shard).replace("step_8", "step_6"))
    assert other.stat().st_size == shard.stat().st_size
    shutil.copyfile(other, shard)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit flip": flip,
    "truncation": truncate,
    "missing shard": Path.unlink,
    "shard of another step": another_step,
}


def lost_frozen(damage: Callable[[Path], None], run: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """A start with the frozen weights damaged, and one with the file back."""
    (file,) = (run / "checkpoints" / FROZEN_DIRECTORY).iterdir()
    content = file.read_bytes()
    damage(file)
    refused = [result["error"] for result in pair(run, [Attempt(), Attempt()])]
    left = held(run)
    file.write_bytes(content)
    results = pair(run, [Attempt(), Attempt()])
    more = {"file": str(file), "refused": refused, "left": left, "resumed": results[0]["resumed"]}
    return {**more, **compare(run, results, whole)}


def rank_1_shard(checkpoint: Path) -> Path:
    return checkpoint / "engine" / "rank_00001.pt"


def slow_writer(run: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 takes a second longer; notes what rank 0 has done by then."""
    early: list[str] = []

    def write(save: Save, path: Path) -> None:
        save(path)
        time.sleep(1)
        names = {p.name for p in path.iterdir()} | {p.name for p in path.parent.iterdir()}
        early.extend(names & {"manifest.json", path.stem})
        (run / "early").write_text(json.dumps(early))

    results = pair(run, [Attempt(), Attempt(write=write)])
    return {"early": json.loads((run / "early").read_text()), **compare(run, results, whole)}


def full(disk: Path, step: int = 4) -> list[Attempt]:
    """The disk is full when a step is saved, and has room again after that."""
    filler = Filler(disk)

    def phase(name: str) -> None:
        if name == f"saving step {step}: writing":
            filler.fill()

    return [Attempt(phase=phase, after_save=lambda step: filler.empty()), Attempt(phase=phase)]


def full_for_one(disk: Path, steps: Sequence[int]) -> list[Attempt]:
    """Rank 1 finds the disk full once rank 0 has written all of its part in these steps."""
    filler = Filler(disk)

    def write(save: Save, path: Path) -> None:
        if path.name in [f"step_{step}.tmp" for step in steps]:
            others = path / "state.json", path / "rng_0.pt"
            while not all(file.exists() and file.stat().st_size for file in others):
                time.sleep(0.01)
            time.sleep(0.2)
            filler.fill()
        save(path)

    return [Attempt(), Attempt(write=write, after_save=lambda step: filler.empty())]


def remounts(disk: Path) -> Attempt:
    """The disk turns read-only during the save of step 4, and comes back after it."""

    def phase(name: str) -> None:
        if name == "saving step 4: hashing":
            remount(disk, "ro")

    def after(step: int) -> None:
        if step == 4:
            remount(disk, "rw")

    return Attempt(phase=phase, after_save=after)


DISKS: dict[str, Callable[[Path], list[Attempt]]] = {
    "full during a save": full,
    "full during the first save": lambda disk: full(disk, step=2),
    "full during the first save, ZeRO-3": lambda disk: full(disk, step=2),
    "full for rank 1 alone": lambda disk: full_for_one(disk, [2, 4]),
    "full at the last step": lambda disk: full_for_one(disk, [STEPS]),
    "full when leaving": lambda disk: [Attempt(stop=7), full_for_one(disk, [7])[1]],
    "read-only during a save": lambda disk: [remounts(disk), Attempt()],
}


def disk_case(name: str, run: Path, disk: Path, whole: dict[str, Any]) -> dict[str, Any]:
    """Metrics stay outside, so that the disk's state is the checkpoints' alone."""
    shutil.rmtree(disk / "checkpoints", ignore_errors=True)
    (disk / "checkpoints").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(disk / "checkpoints")
    results = pair(run, DISKS[name](disk), stage=3 if "ZeRO-3" in name else 2)
    return {**compare(run, results, whole), "left": results[0].get("left")}


def no_answers(run: Path, stage: int) -> dict[str, Any]:
    """Rank 1 has no answer token in step 2, nobody has one in step 3."""
    zero = Attempt(answers=lambda step: 0 if step == 3 else 4)
    one = Attempt(answers=lambda step: 0 if step in (2, 3) else 4)
    results = pair(run, [zero, one], stage=stage)
    records = read_metrics(run / "metrics.jsonl")
    return {
        "losses": [r["loss"] for r in records],
        "norms": [r["gradient_norm"] for r in records],
        "answers": [r["answer_tokens"] for r in records],
        "skipped": [r["skipped"] for r in records],
        "errors": [result["error"] for result in results],
    }


def report(kind: str, name: str, result: dict[str, Any]) -> None:
    print(json.dumps({"kind": kind, "case": name, **result}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    kinds, base = sys.argv[1].split(","), Path(sys.argv[2])
    disk = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    undisturbed = base / "undisturbed"
    first = pair(undisturbed, [Attempt(), Attempt()])
    whole = {
        "weights": first[0]["weights"],
        "metrics": exact(undisturbed),
        "frozen": frozen(undisturbed),
    }
    sizes = {
        name: sum(p.stat().st_size for p in (undisturbed / "checkpoints" / name).rglob("*.*"))
        for name in ("step_8", FROZEN_DIRECTORY)
    }
    facts = {
        "held": held(undisturbed),
        "bytes": list(sizes.values()),
        "expected_bytes": first[0]["checkpoint_bytes"],
    }
    report("undisturbed", "", facts)

    def damaged(run: Path, names: Sequence[str], damage: Callable[[Path], None]) -> dict[str, Any]:
        shutil.copytree(undisturbed, run)
        for name in names:
            damage(rank_1_shard(run / "checkpoints" / name))
        results = pair(run, [Attempt(), Attempt()])
        return {"resumed": results[0]["resumed"], **compare(run, results, whole)}

    def without_frozen(damage: Callable[[Path], None], run: Path) -> dict[str, Any]:
        shutil.copytree(undisturbed, run)
        return lost_frozen(damage, run, whole)

    cases: list[tuple[str, str, Callable[[Path], dict[str, Any]]]] = [
        *(("kill", name, functools.partial(kill_case, name, whole=whole)) for name in KILLS),
        ("slow", "writer", functools.partial(slow_writer, whole=whole)),
        *(
            ("damage", name, functools.partial(damaged, names=["step_8"], damage=damage))
            for name, damage in DAMAGES.items()
        ),
        ("damage", "all", functools.partial(damaged, names=held(undisturbed), damage=flip)),
        *(
            ("damage", f"frozen weights, {name}", functools.partial(without_frozen, damage))
            for name, damage in (("bit flip", flip), ("missing", Path.unlink))
        ),
        *(("answers", f"ZeRO-{s}", functools.partial(no_answers, stage=s)) for s in (1, 2, 3)),
    ]
    if disk is not None:
        cases += [
            ("disk", name, functools.partial(disk_case, name, disk=disk, whole=whole))
            for name in DISKS
        ]
    for number, (kind, name, case) in enumerate(cases):
        if kind in kinds:
            began = time.monotonic()
            result = case(base / str(number))
            report(kind, name, {**result, "seconds": time.monotonic() - began})


if __name__ == "__main__":
    main()
