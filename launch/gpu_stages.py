"""The stages of gpu_check.py: what each runs, when it passes, and the figures that it reads.

A stage returns its key figures in words and leaves all of them in `figures`.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
import time
import xml.etree.ElementTree as ElementTree
from typing import Any

from casa_train.bench.faults import TINY, differences
from casa_train.io.numbers import GIB
from casa_train.metrics.sinks.jsonl import read_metrics
from casa_train.modeling.attention import BACKENDS
from casa_train.run.layout import METRICS_FILE
from launch.gpu_runner import ROOT, Failed, Running, Sizes, Stage, kill, quoted

CHECKPOINTED = ("none", "vision", "all")  # parallel.activation_checkpointing, the fastest first
TEST_PROCESSES = 4  # beside the other stages that only have to be right
FILLED = 0.95  # of a card's memory, at most; estimates were up to 6 % above the peak of an H100

FULL = Sizes(
    samples=1500,
    steps=60,
    every=20,
    kill=26,
    demo=["+experiment=demo"],
    experiments=["helium_casa", "helium_insertion"],
    dry_run=["+experiment=helium_casa,helium_insertion"],
    step=["--steps", "3", "--warm-up", "1"],
    streaming=["--size", "helium1-2b", "--image-size", "896", "--turns", "64"],
    stream=["--turns", "16"],
    attention=[],
    arms=(
        {
            "eager ": ",parallel.compile=off",
            "compiled ": ",parallel.compile=on",
            "compiled, fp8 ": ",parallel.compile=on,parallel.frozen_precision=fp8",
        },
        {"eager ": ",parallel.compile=off", "compiled ": ",parallel.compile=on"},
    ),
    patience=1,
)
REHEARSAL = Sizes(
    samples=120,
    steps=6,
    every=2,
    kill=3,
    demo=TINY,
    experiments=["demo", "demo,fusion=insertion"],
    dry_run=["fusion=casa,insertion", *TINY],
    step=["--steps", "1", "--warm-up", "0", "--set", *TINY[1:]],
    streaming=["--size", "tiny", "--image-size", "56", "--turns", "4", "--new-tokens", "3"],
    stream=["--image-size", "56", "--turns", "4", "--new-tokens", "3"],
    attention=["--scale", "0.02", "--repeats", "1"],
    # A compilation would take a CPU too long.
    arms=(
        {
            "": "",
            "fp8 ": ",model.vision.train_last_blocks=1,parallel.precision=bf16"
            ",parallel.frozen_precision=fp8",
        },
        {"": ""},
    ),
    patience=5,
)


# ----------------------------------------------------------------------- stages beside each other


def gpu_tests(running: Running) -> str:
    """All tests with the marker; those of `slow` do what a later stage does at full size."""
    files = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "pytest.mark.gpu" in path.read_text()
    ]
    if not files:
        raise Failed(f"there are no tests in {ROOT / 'tests'}: expected a checkout")
    report = running.check.out / "tests.xml"
    report.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", f"--junitxml={report}"]
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(TEST_PROCESSES)]
    required = {"GPU_REQUIRED": "1"} if running.check.card else {}
    try:
        running.run("-m", "pytest", *options, *files, **required)
    finally:
        if report.exists():
            suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
            for name in ("tests", "failures", "errors", "skipped"):
                running.figures[name] = int(suite.attrib[name])
    count = running.figures
    passed = count["tests"] - count["skipped"] - count["failures"] - count["errors"]
    if running.check.card and not passed:
        raise Failed("no test ran")
    return f"{passed} passed, {count['skipped']} skipped" + (
        " (flash-attn is not installed)" if running.check.card and count["skipped"] else ""
    )


def estimate(running: Running) -> str:
    """Total memory of a rank by experiment and activation checkpointing, in bytes."""
    choices = f"parallel.activation_checkpointing={','.join(CHECKPOINTED)}"
    text = running.run(
        *("-m", "casa_train", "-m", *running.sizes.dry_run, choices),
        *(
            "dry_run=true",
            "planned_ranks=1",
            quoted("hydra.sweep.dir", running.check.work / "dry_runs"),
        ),
    )
    totals = [float(x) * GIB for x in re.findall(r"^ *total, estimate +([\d.]+)$", text, re.M)]
    names = running.sizes.experiments
    if len(totals) != len(names) * len(CHECKPOINTED):
        raise Failed(f"{running.log} holds {len(totals)} estimates; expected one for each choice")
    for name in names:
        own, totals = totals[: len(CHECKPOINTED)], totals[len(CHECKPOINTED) :]
        running.figures[name] = dict(zip(CHECKPOINTED, own, strict=True))
    return (
        "; ".join(
            f"{name} " + ", ".join(f"{k} {v / GIB:.1f}" for k, v in running.figures[name].items())
            for name in names
        )
        + " GiB"
    )


def data(running: Running) -> str:
    """Pictures, and a tokenizer."""
    counts = ["--samples", str(running.sizes.samples), "--validation", "60"]
    words = [*counts, "--seed", "0", "--tasks", "colour,shape,count"]
    if running.check.card is None:
        words += ["--workers", "1"]
    out = str(running.check.work / "data")
    running.run("-m", "data_recipes", "synthetic", "--out", out, *words)
    return f"{running.sizes.samples:,} samples"


def train(running: Running) -> str:
    """The whole run, undisturbed."""
    text = running.run(*running.demo("demo"))
    parts = {}
    for name in ("worst case:", "audit of step", "validation of step"):
        found = re.search(rf"^{name}.*$", text, re.M)
        if found is None:
            raise Failed(f"{running.log} has no line of {name!r}")
        parts[name] = found.group()
    records = read_metrics(running.check.work / "demo" / METRICS_FILE)
    running.figures.update(parts)
    running.figures["first_loss"], running.figures["last_loss"] = (
        records[i]["loss"] for i in (0, -1)
    )
    seconds = statistics.median(record["seconds"] for record in records[1:])
    running.figures["seconds_a_step"] = seconds
    return (
        f"{len(records)} steps of {seconds * 1e3:.0f} ms, loss {records[0]['loss']:.2f} -> "
        f"{records[-1]['loss']:.2f}; audit, worst case, validation"
    )


def kill_run(running: Running) -> str:
    """The same run in another directory, killed between two checkpoints."""
    process = running.start(*running.demo("killed"))
    metrics = running.check.work / "killed" / METRICS_FILE
    reached = 0
    while reached < running.sizes.kill:
        if process.poll() is not None:
            running.finish(process)
            raise Failed(f"the run ended before its step {running.sizes.kill} was seen")
        if time.monotonic() > running.end:
            running.finish(process)
        time.sleep(0.01)
        if metrics.exists():
            reached = max((record["step"] for record in read_metrics(metrics)), default=0)
    kill(process)
    running.figures["step"] = reached
    return f"SIGKILL after step {reached} of {running.sizes.steps}"


def resume(running: Running) -> str:
    """The same command again; nothing may tell its end from the undisturbed run's."""
    text = running.run(*running.demo("killed"))
    found = re.search(r"^resuming from .* at step (\d+)$", text, re.M)
    unequal = differences(*(running.check.work / name for name in ("demo", "killed")))
    if unequal:
        raise Failed(f"not equal to the undisturbed run: {'; '.join(unequal)}")
    if found is None:
        raise Failed(f"{running.log} names no checkpoint that the run went on from")
    running.figures["from_step"] = int(found[1])
    return f"from step {found[1]}; metrics and checkpoint equal those of train bit for bit"


def export(running: Running) -> str:
    """Written only if its reloaded logits equal the model's."""
    work = running.check.work
    text = running.run("-m", "casa_train.export", str(work / "demo"), "--out", str(work / "export"))
    found = re.search(r"^export gate: (.*)$", text, re.M)
    if found is None:
        raise Failed(f"{running.log} has no line of the gate")
    running.figures["gate"] = found[1]
    return found[1]


def stream(running: Running) -> str:
    """Frames to the export of this check."""
    where = ["--export", str(running.check.work / "export"), "--dtype", "bf16"]
    return streams(running.benchmark("streaming", *where, *running.sizes.stream))


# -------------------------------------------------------------------- stages alone on the machine


def step(running: Running, index: int) -> str:
    """Steps of one experiment, with as little activation checkpointing as fits by the estimate."""
    name, arms = running.sizes.experiments[index], running.sizes.arms[index]
    estimates = running.check.results["estimate"].figures
    chosen = CHECKPOINTED[-1]
    if running.check.card is None:
        chosen = CHECKPOINTED[0]
    else:
        room = FILLED * running.check.card
        chosen = next((c for c in CHECKPOINTED if estimates[name][c] <= room), chosen)
    expected = estimates[name][chosen]
    running.figures.update(activation_checkpointing=chosen, estimated_bytes=expected)
    arm = f"{name},parallel.activation_checkpointing={chosen}"
    failed = None
    try:  # in one process, most of whose time goes to its start
        running.benchmark("step", *(arm + more for more in arms.values()), *running.sizes.step)
    except Failed as error:
        failed = error
    parts = []
    rows = running.figures.get("results", [])
    for label, row in zip(arms, rows, strict=failed is None):
        row["peak_of_estimate"] = row["peak_bytes"] / expected
        mfu = "" if row["mfu"] is None else f", {row['mfu']:.1%} MFU"
        parts.append(
            f"{label}{row['text_tokens_per_second']:,.0f} text tokens/s{mfu}, "
            f"{row['peak_bytes'] / GIB:.1f} GiB ({row['peak_of_estimate']:.2f} of the estimate)"
        )
    said = f"activation checkpointing {chosen}: {'; '.join(parts)}"
    if failed is not None:
        raise Failed(f"{failed}; before, {said}" if parts else str(failed))
    return said


def casa(running: Running) -> str:
    """Steps with image tokens beside the text."""
    return step(running, 0)


def insertion(running: Running) -> str:
    """Steps with image tokens in the text."""
    return step(running, 1)


def streaming(running: Running) -> str:
    """A long stream beside a short one."""
    return streams(running.benchmark("streaming", *running.sizes.streaming))


def attention(running: Running) -> str:
    """Every backend that runs on this machine."""
    rows = running.benchmark("attention", *running.sizes.attention)["rows"]
    parts = []
    for backend in BACKENDS[1:]:  # the first one chooses among the others
        ratios = [row["time_ratio"] for row in rows if row["backend"] == backend]
        parts.append(
            f"{backend} {min(ratios):.1f} to {max(ratios):.1f}x a dense mask's speed"
            if ratios
            else f"{backend} does not run here"
        )
    return "; ".join(parts)


def streams(found: dict[str, Any]) -> str:
    """What the benchmark of streams found, in words."""
    return "; ".join(
        f"{name}: first token {values['first_token']['last'] * 1e3:.1f} ms, "
        f"{values['tokens_per_second']['last']:.0f} tokens/s (first turns "
        f"{values['first_token']['first'] * 1e3:.1f}, {values['tokens_per_second']['first']:.0f})"
        for name, values in found["streams"].items()
    )


STAGES = (
    Stage("tests", 240, gpu_tests),
    Stage("estimate", 90, estimate),
    Stage("data", 60, data),
    Stage("train", 120, train, needs=("data",)),
    Stage("kill", 120, kill_run, needs=("data",)),
    Stage("resume", 90, resume, needs=("train", "kill")),
    Stage("export", 60, export, needs=("train",)),
    Stage("stream", 60, stream, needs=("export",)),
    Stage("casa", 200, casa, needs=("estimate",), timed=True),
    Stage("insertion", 150, insertion, needs=("estimate",), timed=True),
    Stage("streaming", 150, streaming, timed=True),
    Stage("attention", 90, attention, timed=True),
)
