"""launch/gpu_check.sh [OUT]: does everything run on this GPU, how fast, and in how much memory?

Every stage has its own time limit, and a stage that fails stops no other, but for those that need
what it makes. First those that only have to be right, beside each other, then those that are timed,
one by one on the otherwise idle machine:

    tests       every test that needs a GPU; here none may skip itself
    estimate    what a dry run says a step takes of memory, by activation checkpointing
    data        pictures for the demo
    train       the demo in bf16, deterministic, with audit, worst case and a validation
    kill        the same run again, until SIGKILL
    resume      the killed run to its end: metrics and checkpoint are those of train, bit for bit
    export      the trained demo, through the gate
    stream      frames to that export
    casa, insertion    steps of helium_casa and helium_insertion at full size, random weights:
                eager, compiled, and the former with its frozen vision blocks in fp8
    streaming   a stream of frames of 896x896 to Helium1-2B, random weights
    attention   every backend against a dense mask

OUT (runs/gpu_check) gets a log of each stage and gpu_check.json: card, driver, versions, commit and
every figure. It needs no network. Exit code: 0 all passed, 1 a stage failed, 2 it cannot begin.
With --cpu-rehearsal all of it runs tiny on a CPU, and shows that the check itself works.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from casa_train.config.bounds import local_path
from casa_train.errors import UserError
from casa_train.io.files import write_atomic
from casa_train.io.numbers import GIB
from casa_train.io.tables import aligned
from casa_train.run.provenance import code_commit
from launch.gpu_runner import ROOT, Check, Result, Stage, verdict
from launch.gpu_stages import FULL, REHEARSAL, STAGES

RESULT = "gpu_check.json"
FACTS = """
import json, torch
from casa_train.run.provenance import environment
facts = environment()
if torch.cuda.is_available():
    card = torch.cuda.get_device_properties(0)
    facts["memory_bytes"] = card.total_memory
    facts["compute_capability"] = f"{card.major}.{card.minor}"
print(json.dumps(facts))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    options = parse(arguments)
    try:
        stages = chosen_stages(options)
        environment = child_environment(options.cpu_rehearsal)
        facts = machine_facts(options.cpu_rehearsal, environment)
        out = options.out.absolute()
        lock = prepare(out, stages)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C, so that no stage stays behind
        signal.signal(name, leave)
    print(describe(facts), flush=True)
    work = Path(tempfile.mkdtemp(prefix="work_", dir=out))
    sizes = REHEARSAL if options.cpu_rehearsal else FULL
    card = None if options.cpu_rehearsal else facts["card"]["memory_bytes"]
    began = time.monotonic()
    check = Check(stages, out, work, sizes, card, environment, 60 * options.minutes)
    check.run()
    results = list(check.results.values())
    passed = all(result.passed for result in results)
    found = {
        "passed": passed,
        "rehearsal": options.cpu_rehearsal,
        "seconds": time.monotonic() - began,
        **facts,
        "stages": [vars(result) for result in results],
    }
    write_atomic(out / RESULT, json.dumps(found, indent=1) + "\n")
    print(f"\n{table(results)}\n\n{describe(facts)}\n{found['seconds']:.0f} s; {out / RESULT}")
    lock.close()
    if passed:
        shutil.rmtree(work)
    else:
        print(f"data, runs and export of this check are kept in {work}")
    return 0 if passed else 1


def leave(number: int, frame: Any) -> None:
    """A signal ends the check; its stages end with it."""
    raise SystemExit(128 + number)


def prepare(out: Path, stages: Sequence[Stage]) -> IO[str]:
    """Makes the folder of results, without those of an earlier check.

    :return: its lock, while this is open.
    :raises UserError: it cannot be made, or another check is at work there.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in (RESULT, *(f"{s.name}.{end}" for s in stages for end in ("log", "json"))):
            (out / name).unlink(missing_ok=True)
    except BlockingIOError:
        raise UserError(f"OUT is {out}, where another check is at work; name another.") from None
    except OSError as error:
        raise UserError(
            f"OUT is {out}: {error.strerror}; expected a folder that can be written. Name another."
        ) from error
    return lock


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(
        prog="launch/gpu_check.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out", nargs="?", type=local_path, default=Path("runs/gpu_check"), metavar="OUT"
    )
    parser.add_argument("--cpu-rehearsal", action="store_true", help="all of it, tiny, on a CPU")
    parser.add_argument("--minutes", type=float, default=8, help="for all stages (default: 8)")
    parser.add_argument(
        "--only", action="append", default=[], metavar="STAGE", help="it and what it needs"
    )
    parser.add_argument(
        "--limit", action="append", default=[], metavar="STAGE=SECONDS", help="another time limit"
    )
    return parser.parse_args(arguments)


def chosen_stages(options: argparse.Namespace) -> list[Stage]:
    """The stages that --only asks for, with the limits of --limit.

    :raises UserError: an unknown stage, or a limit that is no number.
    """
    known = {stage.name: stage for stage in STAGES}
    limits: dict[str, float] = {}
    for word in options.limit:
        name, _, seconds = word.partition("=")
        if not re.fullmatch(r"\d+(\.\d+)?", seconds):
            raise UserError(f"--limit is {word!r}; expected STAGE=SECONDS.")
        limits[name] = float(seconds)
    for name in (*options.only, *limits):
        if name not in known:
            raise UserError(f"{name!r} is no stage; expected one of {', '.join(known)}.")
    wanted = set(options.only) or set(known)
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.needs)
    return [
        Stage(s.name, limits.get(s.name, s.seconds), s.work, s.needs, s.timed)
        for s in STAGES
        if s.name in wanted
    ]


def child_environment(rehearsal: bool) -> dict[str, str]:
    """What every command gets: this checkout and no network; in a rehearsal no GPU, one thread."""
    found = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    paths = found.get("PYTHONPATH", "").split(os.pathsep)
    if str(ROOT) not in paths:
        found["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, paths)])
    if rehearsal:
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return found


def machine_facts(rehearsal: bool, environment: Mapping[str, str]) -> dict[str, Any]:
    """Card, driver, versions and commit.

    :raises UserError: there is no GPU, and it is no rehearsal.
    """
    # In a process of its own: one that has seen the GPU keeps some of its memory.
    command = [sys.executable, "-c", FACTS]
    asked = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if asked.returncode:
        raise UserError(
            f"{sys.executable} cannot run this project: {asked.stderr.strip()[-300:]} Expected an "
            "environment with its packages; name its interpreter with PYTHON=..."
        )
    found = json.loads(asked.stdout.splitlines()[-1])
    if found["gpu"] is None and not rehearsal:
        raise UserError(
            f"no GPU: torch {found['packages']['torch']} of {sys.executable} finds none; expected "
            "a CUDA device and a torch that is built for it. --cpu-rehearsal runs every stage tiny "
            "on a CPU."
        )
    card = {"name": found["gpu"], "driver": None if rehearsal else driver()}
    card |= {key: found.get(key) for key in ("memory_bytes", "compute_capability")}
    versions = {"python": found["python"], "cuda": found["cuda"], **found["packages"]}
    return {"card": card, "versions": versions, "commit": code_commit(ROOT)}


def driver() -> str | None:
    """The version of the GPU's driver, where nvidia-smi is there to say it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        asked = subprocess.run(ask, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if asked.returncode else next(iter(asked.stdout.split()), None)


def describe(facts: dict[str, Any]) -> str:
    """Card, versions and commit on a line or two."""
    card, versions = facts["card"], facts["versions"]
    where = "CPU (a rehearsal)"
    if card["name"]:
        where = f"{card['name']}, {card['memory_bytes'] / GIB:.1f} GiB, driver {card['driver']}"
    names = ("python", "torch", "cuda", "transformers", "deepspeed", "flash-attn")
    said = ", ".join(f"{name} {versions[name]}" for name in names if versions[name])
    return f"{where}; {said}\ncommit {facts['commit']}"


def table(results: Sequence[Result]) -> str:
    """Stage, result, seconds and key figures, or why it failed."""
    rows = [["stage", "result", "seconds", "figures"]]
    rows += [[r.stage, verdict(r), f"{r.seconds:.0f}", r.said] for r in results]
    return aligned(rows, left=4)


if __name__ == "__main__":
    sys.exit(main())
