"""Kills one run at random moments, and compares its end with that of an undisturbed run."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from casa_train.bench._benchmark import Benchmark, Report
from casa_train.checkpoint.manager import DELETED, CheckpointManager
from casa_train.checkpoint.saved import MANIFEST, STATE
from casa_train.checkpoint.slices import read_weights
from casa_train.config.bounds import local_path
from casa_train.config.schema import CheckpointConfig
from casa_train.distributed.ranks import Ranks
from casa_train.errors import UserError
from casa_train.io.tables import aligned
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.run.layout import CHECKPOINTS, METRICS_FILE, STARTS_FILE
from casa_train.run.starts import read_starts

METHOD = """\
Renders a few pictures, trains a tiny model on them without disturbance, and then trains it again
with the same command while it is killed: SIGKILL to one rank at random, a moment later to all that
is left, as srun does it. Every fifth kill falls into the start, at a random moment of its length;
the others fall up to three steps' time after a random step of the next two checkpoints' worth. The
same command then goes on, until all kills are done and it may finish.

At the end weights, optimiser, the state of data and random generators, and every step's loss,
gradient norm and samples must be those of the undisturbed run, bit for bit; otherwise the command
leaves with code 2 and keeps the directory. Always on the CPU.

phase           what the files show of the moment: writing (an unfinished checkpoint), hashing (all
                its files are there), committing (its manifest too), pruning (a checkpoint that lost
                its name), else starting or in a step
steps repeated  last step that was reported, less the newest checkpoint's
seconds lost    from the kill until the run was again where it had been
"""

PHASES = ("starting", "in a step", "writing", "hashing", "committing", "pruning")
EVERY = 5
SAMPLES = 240
EXACT = ("step", "loss", "gradient_norm", "rates", "answer_tokens", "samples_digest")
LONGEST_START = 900.0  # seconds; a machine may be busy
TINY = [
    "+experiment=demo",
    "trainer.log_every=10",
    "parallel.precision=fp32",
    "parallel.threads=1",
    "data.workers=0",
    "data.text_tokens=160",
    "data.image_tokens=64",
    "data.packs_per_step=2",
    "model.backbone.config.hidden_size=32",
    "model.backbone.config.intermediate_size=48",
    "model.backbone.config.num_hidden_layers=2",
    "model.backbone.config.num_attention_heads=2",
    "model.backbone.config.num_key_value_heads=1",
    "model.vision.config.depth=2",
    "model.vision.config.hidden_size=32",
    "model.vision.config.intermediate_size=48",
    "model.vision.config.num_heads=2",
    "model.vision.config.out_hidden_size=32",
    "model.vision.config.fullatt_block_indexes=[1]",
]


@dataclass
class Kill:
    """:param phase: one of `PHASES`; :param reached: last step that was reported before it."""

    phase: str
    rank: int
    reached: int
    steps_repeated: int
    seconds_lost: float = 0.0


class Run:
    """A training command of several ranks, started as often as needed.

    :param directory: of the run; its log goes beside it.
    """

    def __init__(self, directory: Path, overrides: Sequence[str], processes: int) -> None:
        self.directory, self.processes = directory, processes
        self.command = [sys.executable, "-m", "casa_train", *overrides, f"run_dir={directory}"]
        self.log = directory.with_suffix(".log")
        self.ranks: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common = {
            **os.environ,
            "WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("a") as log:
            self.ranks = [
                subprocess.Popen(
                    self.command,
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for rank in range(self.processes)
            ]

    def trains(self) -> bool:
        """Whether this start has got as far as its first step."""
        starts = read_starts(self.directory / STARTS_FILE)
        return bool(starts) and starts[-1].get("pid") == self.ranks[0].pid

    def reached(self) -> int:
        """The last step that was reported."""
        path = self.directory / METRICS_FILE
        return max((r["step"] for r in read_metrics(path)), default=0) if path.exists() else 0

    def ended(self) -> bool:
        """Whether all ranks finished the run.

        :raises UserError: one left without being killed.
        """
        codes = [process.poll() for process in self.ranks]
        if any(codes):
            self.kill(random.Random(0))
            raise UserError(
                f"{self.directory}: ranks left with {codes} though nobody killed them; expected 0. "
                f"The log is {self.log}:\n{self.log.read_text()[-2000:]}"
            )
        return all(code == 0 for code in codes)

    def kill(self, draw: random.Random) -> int:
        """SIGKILL to a random rank, soon after to all that is left; returns the first one."""
        first = draw.randrange(self.processes)
        self.ranks[first].kill()
        time.sleep(draw.uniform(0, 0.2))
        for process in self.ranks:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return first


def phase_of(checkpoints: Path, processes: int) -> str:
    """What a killed run was doing, by what it left."""
    for unfinished in checkpoints.glob("step_*.tmp"):
        if (unfinished / MANIFEST).exists():
            return "committing"
        whole = [unfinished / STATE, *(unfinished / f"rng_{r}.pt" for r in range(processes))]
        return "hashing" if all(path.exists() for path in whole) else "writing"
    return "pruning" if any(checkpoints.glob(f"*{DELETED}")) else "in a step"


def undisturbed(run: Run) -> tuple[float, float]:
    """Runs it; returns seconds until its first step, and seconds of a step with its saves."""
    began = time.monotonic()
    run.start()
    trains = 0.0
    while not run.ended():
        if not trains and run.trains():
            trains = time.monotonic()
        time.sleep(0.02)
    return trains - began, (time.monotonic() - trains) / run.reached()


def disturbed(run: Run, kills: int, start: float, step: float, draw: random.Random) -> list[Kill]:
    """Kills it so often, then lets it finish.

    :param start: seconds until the first step; :param step: seconds of a step.
    """
    done: list[Kill] = []
    behind: list[tuple[Kill, float]] = []  # kills whose step was not reached again, with their time
    checkpoints = run.directory / CHECKPOINTS
    manager = CheckpointManager(checkpoints, CheckpointConfig(), {}, Ranks())

    def look() -> bool:
        """Notes who has caught up; whether the run has ended."""
        time.sleep(0.03)
        if run.trains():
            reached = run.reached()
            for pair in list(behind):
                if reached >= pair[0].reached:
                    pair[0].seconds_lost = time.monotonic() - pair[1]
                    behind.remove(pair)
        return run.ended()

    bar = tqdm(total=kills, desc="kills", disable=None)
    while True:
        began = time.monotonic()
        longest = max(manager.steps(), default=0) + 2 * EVERY
        run.start()
        if len(done) == kills:
            while not look():
                pass
            bar.close()
            return done
        if len(done) % 5 == 0:
            moment = began + draw.uniform(0, start)
        else:
            # By its steps, not by the clock: the machine may be slower than before.
            target = max(manager.steps(), default=0) + draw.randrange(2 * EVERY)
            while not run.trains() or run.reached() < target:
                if look() or time.monotonic() - began > LONGEST_START:
                    raise UserError(f"{run.directory} does not come to step {target}: {run.log}")
            moment = time.monotonic() + draw.uniform(0, 3 * step)
        while time.monotonic() < moment and run.reached() < longest:
            if look():
                raise UserError(f"{run.directory} ended after {len(done)} of {kills} kills")
        trained = run.trains()
        rank = run.kill(draw)
        phase = phase_of(checkpoints, run.processes) if trained else "starting"
        reached = run.reached()
        saved = max(manager.steps(), default=0)
        kill = Kill(phase, rank, reached, max(0, reached - saved) if trained else 0)
        done.append(kill)
        behind.append((kill, time.monotonic()))
        bar.update()


def differences(one: Path, other: Path) -> list[str]:
    """What is not equal at the end of two runs."""
    found = []
    records = [read_metrics(path / METRICS_FILE) for path in (one, other)]
    exact = [[[r[name] for name in EXACT] for r in run] for run in records]
    if exact[0] != exact[1]:
        steps = [a[0] for a, b in zip(*exact, strict=False) if a != b]
        found.append(f"metrics of steps {steps[:5]} of {len(exact[0])} and {len(exact[1])}")
    last = [path / CHECKPOINTS / f"step_{records[0][-1]['step']}" for path in (one, other)]
    weights = [read_weights(path) for path in last]
    unequal = [n for n in weights[0] if not torch.equal(weights[0][n], weights[1][n])]
    if unequal or weights[0].keys() != weights[1].keys():
        found.append(f"weights: {unequal[:5]}")
    # Adam's moments, positions in the data, random states: every file by its digest.
    files = [json.loads((path / MANIFEST).read_text())["files"] for path in last]
    found += [name for name in files[0] if files[0][name] != files[1].get(name)]
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument(
        "--directory",
        type=local_path,
        metavar="DIR",
        help="to work in and keep (default: a new one)",
    )
    parser.add_argument("--processes", type=int, default=2, help="1 or 2 (default: 2)")


def run(arguments: argparse.Namespace) -> Report:
    """Runs both.

    :raises UserError: bad arguments, a run that failed by itself, or an end that differs.
    """
    if arguments.kills < 1 or arguments.processes not in (1, 2):
        raise UserError(
            f"--kills is {arguments.kills}, --processes {arguments.processes}; expected at least "
            "one kill, and one or two processes."
        )
    if arguments.directory and arguments.directory.exists():
        raise UserError(f"--directory {arguments.directory} exists; choose a new one.")
    base = arguments.directory or Path(tempfile.mkdtemp(prefix="casa_train_faults_"))
    data = base / "data"
    recipe = [sys.executable, "-m", "data_recipes", "synthetic", "--out", str(data)]
    counts = ["--samples", str(SAMPLES), "--validation", "24", "--workers", "1"]
    subprocess.run([*recipe, *counts, "--seed", "0"], check=True, stdout=subprocess.DEVNULL)
    steps = 2 * EVERY * arguments.kills + 3 * EVERY  # an attempt goes two checkpoints on
    overrides = [
        *TINY,
        f"model.tokenizer={data}/tokenizer",
        f"data.sources.synthetic.path={data}/train",
        f"data.validation.synthetic.path={data}/validation",
        f"trainer.steps={steps}",
        f"checkpoint.every={EVERY}",
        f"seed={arguments.seed}",
    ]
    quiet = Run(base / "undisturbed", overrides, arguments.processes)
    start, step = undisturbed(quiet)
    killed = Run(base / "killed", overrides, arguments.processes)
    began = time.monotonic()
    kills = disturbed(killed, arguments.kills, start, step, random.Random(arguments.seed))
    seconds = time.monotonic() - began
    if unequal := differences(quiet.directory, killed.directory):
        raise UserError(
            f"the killed run does not end as the undisturbed one: {'; '.join(unequal)} differ; "
            f"expected equal bits. Both are in {base}."
        )
    if not arguments.directory:
        shutil.rmtree(base)
    data_out = {
        "kills": [asdict(kill) for kill in kills],
        "steps": steps,
        "processes": arguments.processes,
        "start_seconds": start,
        "step_seconds": step,
        "undisturbed_seconds": start + steps * step,
        "killed_seconds": seconds,
    }
    return Report(f"{table(kills)}\n{summary(data_out)}", data_out)


def table(kills: Sequence[Kill]) -> str:
    rows = [["phase", "kills", "steps repeated, mean", "most", "seconds lost, mean", "most"]]
    for phase in (*PHASES, "all"):
        own = [kill for kill in kills if phase in (kill.phase, "all")]
        if own:
            steps = [kill.steps_repeated for kill in own]
            seconds = [kill.seconds_lost for kill in own]
            means = sum(steps) / len(own), sum(seconds) / len(own)
            rows.append(
                [phase, str(len(own)), f"{means[0]:.1f}", str(max(steps))]
                + [f"{means[1]:.1f}", f"{max(seconds):.1f}"]
            )
    return aligned(rows)


def summary(data: Mapping[str, Any]) -> str:
    return (
        f"{len(data['kills'])} kills in {data['steps']} steps on {data['processes']} processes, a "
        f"checkpoint every {EVERY} steps: {data['killed_seconds']:.0f} s, undisturbed "
        f"{data['undisturbed_seconds']:.0f} s, of which {data['start_seconds']:.1f} s until the "
        "first step\nweights, optimiser, data, random states and every step's loss, gradient norm "
        "and samples equal those of the undisturbed run bit for bit"
    )


BENCHMARK = Benchmark(
    measures="a run killed at random moments: does it end as if nothing had happened, and what "
    "does a kill cost",
    description=METHOD,
    add_arguments=add_arguments,
    run=run,
)
